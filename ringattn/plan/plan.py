"""Plans: what one rank does, step by step, as pure data. One shape for every exchange.

A *block* is what one rank holds of what travels, and is named by that rank; a *piece* is some rows of a block. In a
step a rank first posts the step's messages, then attends to the pieces of its visits, and at its end lets go of
what is done with. What makes a rank wait stands here or follows from it:

- a piece that is on its way is awaited when a visit, or a send, first needs it: often many steps after it was posted;
- so is a gradient that is added to a sum which a visit or a send needs; of this rank's own block, it is awaited in the
  step that says so, as the visits of that block need not know of it;
- a send is awaited in the step at whose end its buffer is free.

Every rank has as many steps as the others, a message stands in the same step of its sender and its receiver, and
messages between two ranks stand in the same order at both. So no step waits for a later one, and no two
messages can be confused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import accumulate, pairwise, product

from ringattn.geometry.masks import K_START, Q_START
from ringattn.geometry.tiles import Tiles
from ringattn.plan.payload import AttentionShape, Payload

__all__ = ["BlockSlice", "ComputeTiles", "Payload", "Phase", "Plan", "Program", "Step", "Transfer"]


@dataclass(frozen=True)
class BlockSlice:
    """Rows of the block of rank `block`, ascending ranges of its local rows; None is all of them."""

    block: int
    rows: tuple[range, ...] | None = None

    def num_rows(self, block_rows: int) -> int:
        """Returns how many rows the piece has, being of a block of so many."""
        return block_rows if self.rows is None else sum(map(len, self.rows))

    def __str__(self) -> str:
        return f"{self.block}" if self.rows is None else f"{self.block}: {self.num_rows(0)} rows"


@dataclass(frozen=True)
class Transfer:
    """One message: `payload` of a piece, to or from rank `peer`.

    A gradient that is received ADDS to the sum that is held of its rows: of this rank's own block, or of the piece.
    """

    payload: Payload
    piece: BlockSlice
    peer: int


@dataclass(frozen=True)
class ComputeTiles:
    """Tiles to compute; the rows on the travelling side are numbered in the piece, the others in a part of theirs."""

    piece: BlockSlice
    tiles: Tiles
    part: int = 0


@dataclass(frozen=True)
class Step:
    """Post the messages, compute the visits, and at the end finish what is listed."""

    visits: tuple[ComputeTiles, ...] = ()
    sends: tuple[Transfer, ...] = ()
    receives: tuple[Transfer, ...] = ()
    sent: tuple[Transfer, ...] = ()  # sends, of this step or before, whose buffers are free at its end
    added: tuple[Transfer, ...] = ()  # gradients, of this step or before, that are added by its end
    frees: tuple[BlockSlice, ...] = ()  # pieces that no later step visits or sends


@dataclass(frozen=True)
class Program:
    """One rank's steps in one direction.

    Args:
        carried: what travels, KV or Q; its gradients' sums are `carried.gradient`.
        block_rows: rows of each rank's block.
        steps: what this rank does.
    """

    carried: Payload
    block_rows: tuple[int, ...]
    steps: tuple[Step, ...]

    @property
    def visits(self) -> tuple[ComputeTiles, ...]:
        """All visits, in order."""
        return tuple(visit for step in self.steps for visit in step.visits)

    def rows_sent(self, payload: Payload) -> int:
        """Returns how many rows of `payload` this rank sends."""
        return sum(self.rows_of(t) for step in self.steps for t in step.sends if t.payload is payload)

    def rows_of(self, transfer: Transfer) -> int:
        """Returns how many rows a transfer carries."""
        return transfer.piece.num_rows(self.block_rows[transfer.piece.block])

    def bytes_sent(self, sizes: AttentionShape) -> int:
        """Returns the bytes that this rank sends."""
        return sum(self.rows_sent(p) * sizes.row_bytes(p) for p in (self.carried, self.carried.gradient))

    @property
    def communicates(self) -> bool:
        """Whether this rank sends or receives anything at all."""
        return any(step.sends or step.receives for step in self.steps)

    def without_gradients(self) -> Program:
        """Returns the program of a backward in which nobody wants the gradients of what travels."""

        def kept(transfers: tuple[Transfer, ...]) -> tuple[Transfer, ...]:
            return tuple(t for t in transfers if t.payload is self.carried)

        steps = tuple(
            replace(s, sends=kept(s.sends), receives=kept(s.receives), sent=kept(s.sent), added=()) for s in self.steps
        )
        return replace(self, steps=steps)

    def in_parts(self, rank: int, q_rows: Sequence[int], kv_rows: Sequence[int]) -> Program:
        """Returns rank's program for queries and keys of its own that lie in parts of so many rows."""
        stays, own = (q_rows, kv_rows) if self.carried is Payload.KV else (kv_rows, q_rows)
        column, own_column = (Q_START, K_START) if self.carried is Payload.KV else (K_START, Q_START)

        def of_own(visit: ComputeTiles) -> Iterator[ComputeTiles]:
            if len(own) == 1 or visit.piece != BlockSlice(rank):
                yield visit
                return
            for rows in _runs(own):
                if tiles := visit.tiles.select((rows,), own_column, renumber=True):
                    yield replace(visit, piece=BlockSlice(rank, (rows,)), tiles=tiles)

        def cut(visits: tuple[ComputeTiles, ...]) -> Iterator[ComputeTiles]:
            for whole in visits:
                for visit, (number, rows) in product(of_own(whole), enumerate(_runs(stays))):
                    if tiles := visit.tiles.select((rows,), column, renumber=True):
                        yield replace(visit, tiles=tiles, part=number)

        return replace(self, steps=tuple(replace(step, visits=tuple(cut(step.visits))) for step in self.steps))

    def describe(self, name: str) -> str:
        """Returns a table of the steps for people to read."""
        lines = []
        for index, step in enumerate(self.steps):
            moves = [f"{t.payload.value}[{t.piece}] → {t.peer}" for t in step.sends]
            moves += [f"{t.payload.value}[{t.piece}] ← {t.peer}" for t in step.receives]
            visits = [f"block {v.piece}, {len(v.tiles)} tiles, area {v.tiles.area():,}" for v in step.visits]
            lines.append(f"  {name} {index}: {' + '.join(visits) or 'no work'}; {', '.join(moves) or 'nothing moves'}")
        return "\n".join(lines)


class Phase(Enum):
    """Forward; or backward, by what travels in it: keys and values, or queries."""

    FORWARD = "forward"
    BACKWARD = "backward"
    BACKWARD_BY_QUERIES = "backward by queries"

    @property
    def carried(self) -> Payload:
        """What travels."""
        return Payload.Q if self is Phase.BACKWARD_BY_QUERIES else Payload.KV

    @property
    def is_backward(self) -> bool:
        """Whether gradients are made."""
        return self is not Phase.FORWARD


@dataclass(frozen=True)
class Plan:
    """One rank's programs: `forward` makes the output, `backward` the gradients, everything travelling once more."""

    exchange: str
    rank: int
    world_size: int
    forward: Program
    backward: Program
    work: tuple[int, ...] = field(repr=False)  # (query, key) pairs of every rank, over the batch rows' masks

    def in_parts(self, q_rows: Sequence[int], kv_rows: Sequence[int]) -> Plan:
        """Returns the plan for queries and keys of this rank that lie in parts of so many rows."""
        forward, backward = (x.in_parts(self.rank, q_rows, kv_rows) for x in (self.forward, self.backward))
        return replace(self, forward=forward, backward=backward)

    @property
    def imbalance(self) -> float:
        """How much more work the busiest rank has than the average one: 0 is even, 1 is twice the average."""
        total = sum(self.work)
        return max(self.work) * self.world_size / total - 1.0 if total else 0.0

    @property
    def communicates(self) -> bool:
        """Whether this rank sends or receives anything at all."""
        return self.forward.communicates or self.backward.communicates

    def describe(self) -> str:
        """Returns a table of the steps for people to read."""
        title = (
            f"{self.exchange} plan of rank {self.rank} of {self.world_size}: "
            f"work {self.work[self.rank]:,} pairs, imbalance {self.imbalance:.1%}"
        )
        return "\n".join([title, self.forward.describe("forward"), self.backward.describe("backward")])


def _runs(num_rows: Sequence[int]) -> list[range]:
    """The rows of parts that follow one another."""
    return [range(*ends) for ends in pairwise(accumulate(num_rows, initial=0))]
