"""Plans: what one rank does, step by step, as pure data. One form for every exchange.

A *block* is what one rank holds of the tensors that move; it is named by that rank. A *slice* is some rows of a block.
In a step a rank posts the step's messages, computes, and then releases buffers. The plan says, or implies, what a rank
waits for:

- it waits for a slice when a compute or a send first needs it, often many steps after the receive was posted;
- it waits for a returned gradient when a compute or a send needs the sum that it is added to; returns to this rank's
  own block are awaited in the step that lists them, since its own computes do not depend on them;
- it waits for a send in the step after which its buffer is reused.

All ranks have the same number of steps, a message stands in the same step of its sender and its receiver, and
messages between two ranks stand in the same order at both. So no step waits for a later one, and no two messages can be
confused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import accumulate, pairwise, product

from ringattn.geometry.masks import K_START, Q_START
from ringattn.geometry.tiles import Tiles
from ringattn.plan.payload import AttentionShape, Payload
from ringattn.types import Rows

__all__ = ["BlockSlice", "ComputeTiles", "Payload", "Phase", "Plan", "Program", "Step", "Transfer"]


@dataclass(frozen=True)
class BlockSlice:
    """Rows of the block of rank `block`, as ascending ranges of its local rows; None is all of them."""

    block: int
    rows: Rows | None = None

    def num_rows(self, block_rows: int) -> int:
        """Returns the number of rows of the slice of a block of `block_rows` rows."""
        return block_rows if self.rows is None else sum(map(len, self.rows))

    def __str__(self) -> str:
        return f"{self.block}" if self.rows is None else f"{self.block}: {self.num_rows(0)} rows"


@dataclass(frozen=True)
class Transfer:
    """One message: `payload` of a slice, to or from rank `peer`.

    A received return is accumulated into the sum held for its rows: of this rank's own block, or of the slice.
    """

    payload: Payload
    slice: BlockSlice
    peer: int


@dataclass(frozen=True)
class ComputeTiles:
    """Tiles to compute; moving rows are numbered in the slice, the others in a chunk of the side that stays."""

    slice: BlockSlice
    tiles: Tiles
    chunk: int = 0


@dataclass(frozen=True)
class Step:
    """Post the messages, compute, and at the end wait and release what is listed."""

    computes: tuple[ComputeTiles, ...] = ()
    sends: tuple[Transfer, ...] = ()
    receives: tuple[Transfer, ...] = ()
    wait_sends: tuple[Transfer, ...] = ()  # sends, of this step or before, whose buffers are free at its end
    wait_returns: tuple[Transfer, ...] = ()  # returns, of this step or before, that are accumulated by its end
    release: tuple[BlockSlice, ...] = ()  # slices that no later step computes with or sends


class Phase(Enum):
    """The direction, and which side moves in it."""

    FORWARD = "forward"
    FORWARD_BY_QUERIES = "forward by queries"
    BACKWARD = "backward"
    BACKWARD_BY_QUERIES = "backward by queries"

    @property
    def moving(self) -> Payload:
        """What moves to other ranks."""
        return _MOVING[self]

    @property
    def returning(self) -> Payload | None:
        """What returns to the block's own rank; None where nothing does."""
        return None if self is Phase.FORWARD else self.moving.returning

    @property
    def is_backward(self) -> bool:
        """Whether gradients are computed."""
        return self in (Phase.BACKWARD, Phase.BACKWARD_BY_QUERIES)


_MOVING = {
    Phase.FORWARD: Payload.KV,
    Phase.FORWARD_BY_QUERIES: Payload.Q,
    Phase.BACKWARD: Payload.KV,
    Phase.BACKWARD_BY_QUERIES: Payload.Q_BACKWARD,
}


@dataclass(frozen=True)
class Program:
    """One rank's steps in one direction.

    Args:
        moving: what moves; `moving.returning` is what returns, if anything does.
        block_rows: rows of each rank's block.
        steps: what this rank does.
    """

    moving: Payload
    block_rows: tuple[int, ...]
    steps: tuple[Step, ...]

    @property
    def computes(self) -> tuple[ComputeTiles, ...]:
        """All computes, in order."""
        return tuple(compute for step in self.steps for compute in step.computes)

    def rows_sent(self, payload: Payload) -> int:
        """Returns how many rows of `payload` this rank sends."""
        return sum(self.rows_of(t) for step in self.steps for t in step.sends if t.payload is payload)

    def rows_of(self, transfer: Transfer) -> int:
        """Returns how many rows a transfer carries."""
        return transfer.slice.num_rows(self.block_rows[transfer.slice.block])

    def bytes_sent(self, shape: AttentionShape) -> int:
        """Returns the bytes that this rank sends."""
        return sum(self.rows_sent(p) * shape.row_bytes(p) for p in (self.moving, self.moving.returning))

    @property
    def communicates(self) -> bool:
        """Whether this rank sends or receives anything."""
        return any(step.sends or step.receives for step in self.steps)

    def without_returns(self) -> Program:
        """Returns the program of a backward in which the gradients of what moves are not wanted."""

        def kept(transfers: tuple[Transfer, ...]) -> tuple[Transfer, ...]:
            return tuple(t for t in transfers if t.payload is self.moving)

        steps = tuple(
            replace(s, sends=kept(s.sends), receives=kept(s.receives), wait_sends=kept(s.wait_sends), wait_returns=())
            for s in self.steps
        )
        return replace(self, steps=steps)

    def in_chunks(self, rank: int, q_rows: Sequence[int], kv_rows: Sequence[int]) -> Program:
        """Returns rank's program where its own queries and keys lie in chunks of so many rows."""
        moves_queries = self.moving.moves_queries
        staying, own = (kv_rows, q_rows) if moves_queries else (q_rows, kv_rows)
        column, own_column = (K_START, Q_START) if moves_queries else (Q_START, K_START)

        def cut_own(compute: ComputeTiles) -> Iterator[ComputeTiles]:
            if len(own) == 1 or compute.slice != BlockSlice(rank):
                yield compute
                return
            for rows in _consecutive(own):
                if tiles := compute.tiles.select((rows,), own_column, renumber=True):
                    yield replace(compute, slice=BlockSlice(rank, (rows,)), tiles=tiles)

        def cut(computes: tuple[ComputeTiles, ...]) -> Iterator[ComputeTiles]:
            for whole in computes:
                for compute, (number, rows) in product(cut_own(whole), enumerate(_consecutive(staying))):
                    if tiles := compute.tiles.select((rows,), column, renumber=True):
                        yield replace(compute, tiles=tiles, chunk=number)

        return replace(self, steps=tuple(replace(step, computes=tuple(cut(step.computes))) for step in self.steps))

    def describe(self, name: str) -> str:
        """Returns a table of the steps for people to read."""
        lines = []
        for index, step in enumerate(self.steps):
            moves = [f"{t.payload.value}[{t.slice}] → {t.peer}" for t in step.sends]
            moves += [f"{t.payload.value}[{t.slice}] ← {t.peer}" for t in step.receives]
            work = [f"block {c.slice}, {len(c.tiles)} tiles, area {c.tiles.area():,}" for c in step.computes]
            lines.append(f"  {name} {index}: {' + '.join(work) or 'no work'}; {', '.join(moves) or 'nothing moves'}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Plan:
    """One rank's programs: `forward` makes the output, `backward` the gradients, everything moving once more."""

    exchange: str
    rank: int
    world_size: int
    forward: Program
    backward: Program
    work: tuple[int, ...] = field(repr=False)  # (query, key) pairs of every rank, over the batch rows' masks

    def in_chunks(self, q_rows: Sequence[int], kv_rows: Sequence[int]) -> Plan:
        """Returns the plan where this rank's own queries and keys lie in chunks of so many rows."""
        forward, backward = (x.in_chunks(self.rank, q_rows, kv_rows) for x in (self.forward, self.backward))
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


def _consecutive(num_rows: Sequence[int]) -> list[range]:
    """Returns the rows of chunks that follow one another."""
    return [range(*ends) for ends in pairwise(accumulate(num_rows, initial=0))]
