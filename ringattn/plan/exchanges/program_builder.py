"""Writing down a program: which message in which step; what ends where follows."""

from __future__ import annotations

from dataclasses import dataclass, field

from ringattn.geometry.rows import halves
from ringattn.geometry.tiles import Tiles
from ringattn.plan.comm_pattern import CommPattern
from ringattn.plan.payload import Payload
from ringattn.plan.plan import BlockSlice, ComputeTiles, Program, Step, Transfer

_ORDER = {payload: index for index, payload in enumerate(Payload)}


@dataclass
class _StepDraft:
    visits: list[ComputeTiles] = field(default_factory=list)
    sends: list[Transfer] = field(default_factory=list)
    receives: list[Transfer] = field(default_factory=list)
    sent: list[Transfer] = field(default_factory=list)
    added: list[Transfer] = field(default_factory=list)
    frees: list[BlockSlice] = field(default_factory=list)


class ProgramBuilder:
    """The steps of one rank while a builder writes them.

    Args:
        travel: what travels.
        rank: whose steps.
        num_steps: as many as every rank has.
    """

    def __init__(self, travel: CommPattern, rank: int, num_steps: int) -> None:
        self._travel, self._rank = travel, rank
        self._steps = [_StepDraft() for _ in range(num_steps)]
        self._last_use = {BlockSlice(rank): 0}

    def visit(self, step: int, piece: BlockSlice, tiles: Tiles) -> None:
        """Computes tiles of a piece in a step."""
        self._steps[step].visits.append(ComputeTiles(piece, tiles))
        self._use(piece, step)

    def visit_own(self, steps: tuple[int, int], tiles: Tiles | None) -> None:
        """Computes the rank's own block, in two halves if the steps are two: nothing has to come for it."""
        first, second = steps
        if tiles and first == second:
            self.visit(first, BlockSlice(self._rank), tiles)
        elif tiles:
            for step, rows in zip(steps, halves(self._travel.block_rows[self._rank]), strict=True):
                part = tiles.select(rows, self._travel.column, renumber=False)
                if part:
                    self.visit(step, BlockSlice(self._rank), part)

    def carry(self, step: int, piece: BlockSlice, *, to: int, until: int | None = None) -> None:
        """Sends a piece; its buffer is needed until the end of step `until`, by default the same one."""
        self._send(step, Transfer(self._travel.carried, piece, to), until)
        self._use(piece, step if until is None else until)

    def receive(self, step: int, piece: BlockSlice, *, of: int) -> None:
        """Receives a piece, to be used in later steps."""
        self._steps[step].receives.append(Transfer(self._travel.carried, piece, of))
        self._use(piece, step)

    def give_sum(self, step: int, piece: BlockSlice, *, to: int, until: int | None = None) -> None:
        """Sends the sum of a piece's gradients; its buffer is needed until the end of step `until`."""
        self._send(step, Transfer(self._travel.carried.gradient, piece, to), until)

    def take_sum(self, step: int, piece: BlockSlice, *, of: int, until: int | None = None) -> None:
        """Receives gradients; they are added by the end of step `until`, or where a visit or a send needs the sum."""
        transfer = Transfer(self._travel.carried.gradient, piece, of)
        self._steps[step].receives.append(transfer)
        if until is not None:
            self._steps[until].added.append(transfer)

    def program(self) -> Program:
        """Returns what was written."""
        for piece, step in self._last_use.items():
            self._steps[step].frees.append(piece)
        return Program(self._travel.carried, self._travel.block_rows, tuple(map(self._step, self._steps)))

    def _send(self, step: int, transfer: Transfer, until: int | None) -> None:
        self._steps[step].sends.append(transfer)
        self._steps[step if until is None else until].sent.append(transfer)

    def _use(self, piece: BlockSlice, step: int) -> None:
        self._last_use[piece] = max(self._last_use.get(piece, step), step)

    def _step(self, draft: _StepDraft) -> Step:
        # In one order at both ends of every message, which is what backends without tags go by; and gradients are
        # added in the order of ranks.
        def ordered(transfers: list[Transfer]) -> tuple[Transfer, ...]:
            return tuple(sorted(transfers, key=_order_of))

        return Step(
            tuple(draft.visits),
            ordered(draft.sends),
            ordered(draft.receives),
            ordered(draft.sent),
            ordered(draft.added),
            tuple(sorted(draft.frees, key=_order_of_slice)),
        )


def _order_of(transfer: Transfer) -> tuple[int, int, tuple[int, int]]:
    return transfer.peer, _ORDER[transfer.payload], _order_of_slice(transfer.piece)


def _order_of_slice(piece: BlockSlice) -> tuple[int, int]:
    return piece.block, piece.rows[0].start if piece.rows else -1
