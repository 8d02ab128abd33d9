"""Writing a program: which message in which step. When buffers and gradients are awaited follows."""

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
    computes: list[ComputeTiles] = field(default_factory=list)
    sends: list[Transfer] = field(default_factory=list)
    receives: list[Transfer] = field(default_factory=list)
    wait_sends: list[Transfer] = field(default_factory=list)
    wait_returns: list[Transfer] = field(default_factory=list)
    release: list[BlockSlice] = field(default_factory=list)


class ProgramBuilder:
    """The steps of one rank while an exchange writes them.

    Args:
        pattern: what moves.
        rank: whose steps.
        num_steps: the number of steps, the same on every rank.
    """

    def __init__(self, pattern: CommPattern, rank: int, num_steps: int) -> None:
        self._pattern, self._rank = pattern, rank
        self._steps = [_StepDraft() for _ in range(num_steps)]
        self._last_use = {BlockSlice(rank): 0}

    def compute(self, step: int, block_slice: BlockSlice, tiles: Tiles) -> None:
        """Computes tiles of a slice in a step."""
        self._steps[step].computes.append(ComputeTiles(block_slice, tiles))
        self._use(block_slice, step)

    def compute_own(self, steps: tuple[int, int], tiles: Tiles | None) -> None:
        """Computes the rank's own block, in two halves if the steps are two: it waits for no message."""
        first, second = steps
        if tiles and first == second:
            self.compute(first, BlockSlice(self._rank), tiles)
        elif tiles:
            for step, rows in zip(steps, halves(self._pattern.block_rows[self._rank]), strict=True):
                part = tiles.select(rows, self._pattern.column, renumber=False)
                if part:
                    self.compute(step, BlockSlice(self._rank), part)

    def send(self, step: int, block_slice: BlockSlice, *, to: int, until: int | None = None) -> None:
        """Sends a slice; its buffer is needed until the end of step `until`, by default the same one."""
        self._send(step, Transfer(self._pattern.moving, block_slice, to), until)
        self._use(block_slice, step if until is None else until)

    def receive(self, step: int, block_slice: BlockSlice, *, source: int) -> None:
        """Receives a slice, to be used in later steps."""
        self._steps[step].receives.append(Transfer(self._pattern.moving, block_slice, source))
        self._use(block_slice, step)

    def send_return(self, step: int, block_slice: BlockSlice, *, to: int, until: int | None = None) -> None:
        """Sends what was accumulated for a slice; its buffer is needed until the end of step `until`."""
        self._send(step, Transfer(self._pattern.moving.returning, block_slice, to), until)

    def receive_return(self, step: int, block_slice: BlockSlice, *, source: int, until: int | None = None) -> None:
        """Receives a return, accumulated by the end of step `until`, or where a compute or a send needs the sum."""
        transfer = Transfer(self._pattern.moving.returning, block_slice, source)
        self._steps[step].receives.append(transfer)
        if until is not None:
            self._steps[until].wait_returns.append(transfer)

    def program(self) -> Program:
        """Returns what was written."""
        for block_slice, step in self._last_use.items():
            self._steps[step].release.append(block_slice)
        return Program(self._pattern.moving, self._pattern.block_rows, tuple(map(self._step, self._steps)))

    def _send(self, step: int, transfer: Transfer, until: int | None) -> None:
        self._steps[step].sends.append(transfer)
        self._steps[step if until is None else until].wait_sends.append(transfer)

    def _use(self, block_slice: BlockSlice, step: int) -> None:
        self._last_use[block_slice] = max(self._last_use.get(block_slice, step), step)

    def _step(self, draft: _StepDraft) -> Step:
        # One order at both ends of every message, which backends without tags rely on; and gradients are added in the
        # order of ranks.
        def ordered(transfers: list[Transfer]) -> tuple[Transfer, ...]:
            return tuple(sorted(transfers, key=_order_of))

        return Step(
            tuple(draft.computes),
            ordered(draft.sends),
            ordered(draft.receives),
            ordered(draft.wait_sends),
            ordered(draft.wait_returns),
            tuple(sorted(draft.release, key=_order_of_slice)),
        )


def _order_of(transfer: Transfer) -> tuple[int, int, tuple[int, int]]:
    return transfer.peer, _ORDER[transfer.payload], _order_of_slice(transfer.slice)


def _order_of_slice(block_slice: BlockSlice) -> tuple[int, int]:
    return block_slice.block, block_slice.rows[0].start if block_slice.rows else -1
