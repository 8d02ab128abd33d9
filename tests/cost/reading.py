"""Reading a timetable out of the programs of all ranks, waits as the executor has them.

What geometry/timetables.py writes for all ranks at once is held against this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ringattn.cost.timetable import AFTER, BEFORE, NONE, Draft, Timetable
from ringattn.plan.payload import AttentionShape
from ringattn.plan.plan import BlockSlice, Program, Transfer


def timetable_of(
    programs: Sequence[Program],
    sizes: AttentionShape,
    flops_per_pair: int,
    copies: int,
    axis: Callable[[int, int], int],
) -> Timetable:
    """Returns the timetable of the programs of all ranks.

    Args:
        programs: one direction, of every rank in order.
        sizes: of the tensors.
        flops_per_pair: what one (query, key) pair costs, over the heads.
        copies: how many batch rows a mask for all of them stands for.
        axis: the axis on which a message goes, given its two ranks.
    """
    draft = Draft(len(programs))
    draft.steps(len(programs[0].steps))
    numbers: dict[tuple[int, int, Transfer], int] = {}  # (step, sender, as it was sent)
    for rank, program in enumerate(programs):
        for index, step in enumerate(program.steps):
            for t in step.sends:
                num_bytes = program.rows_of(t) * sizes.row_bytes(t.payload)
                until = index + 1  # about when a gradient is added or passed on
                if t.payload is program.carried:
                    until = next(i for i, s in enumerate(programs[t.peer].steps) if t.piece in s.frees)
                found = draft.message(
                    index, np.array([rank]), np.array([t.peer]), num_bytes, until,
                    axis=axis(rank, t.peer), gradient=int(t.payload is not program.carried),
                )  # fmt: skip
                numbers[index, rank, t] = int(found[0])
        _Reader(draft, rank, program, sizes).packs()
    for rank, program in enumerate(programs):
        _Reader(draft, rank, program, sizes).read(numbers, flops_per_pair, copies)
    return draft.timetable()


class _Reader:
    """Reads what one rank waits for out of its program, as the executor does."""

    def __init__(self, draft: Draft, rank: int, program: Program, sizes: AttentionShape) -> None:
        self._draft, self._rank, self._program, self._sizes = draft, np.array([rank]), program, sizes
        self._home = BlockSlice(rank)
        self._pieces: dict[BlockSlice, int] = {}  # on their way: by which message
        self._sums: dict[BlockSlice, list[Transfer]] = {}
        self._number: dict[Transfer, int] = {}

    def packs(self) -> None:
        """Notes each piece of the rank's own block once, where it is first sent."""
        freed = {piece: index for index, step in enumerate(self._program.steps) for piece in step.frees}
        packed = set()
        for index, step in enumerate(self._program.steps):
            for t in step.sends:
                own = t.payload is self._program.carried and t.piece.block == self._home.block
                if own and t.piece not in packed:
                    packed.add(t.piece)
                    num_bytes = self._program.rows_of(t) * self._sizes.row_bytes(t.payload)
                    self._draft.pack(index, self._rank, np.array([num_bytes]), freed[t.piece])

    def read(self, numbers: dict[tuple[int, int, Transfer], int], flops_per_pair: int, copies: int) -> None:
        """Notes waits and visits."""
        rank = int(self._rank[0])
        for index, step in enumerate(self._program.steps):
            for t in step.sends:
                if t.payload is self._program.carried:
                    self._wait(index, BEFORE, self._pieces.pop(t.piece, NONE))
                else:
                    self._add_sums(index, BEFORE, t.piece)
            for t in step.receives:
                number = numbers[index, t.peer, Transfer(t.payload, t.piece, rank)]
                if t.payload is self._program.carried:
                    self._pieces[t.piece] = number
                else:
                    self._number[t] = number
                    self._sums.setdefault(self._target(t), []).append(t)
            for order, visit in enumerate(step.visits):
                coming = self._sums.pop(visit.piece, []) if visit.piece != self._home else []
                total = self._number.pop(coming[0]) if coming else NONE
                flops = visit.tiles.area(copies) * flops_per_pair
                piece = self._pieces.pop(visit.piece, NONE)
                self._draft.visit(index, self._rank, np.array([float(flops)]), piece, total, order)
            for t in step.added:
                if t in self._sums.get(self._target(t), []):
                    self._sums[self._target(t)].remove(t)
                    self._wait(index, AFTER, self._number.pop(t), self._bytes_added(t))
            for t in step.sent:
                sent_in = next(i for i in range(index, -1, -1) if (i, rank, t) in numbers)
                self._wait(index, AFTER, numbers[sent_in, rank, t])

    def _add_sums(self, index: int, moment: int, target: BlockSlice) -> None:
        for t in self._sums.pop(target, []):
            self._wait(index, moment, self._number.pop(t), self._bytes_added(t))

    def _wait(self, index: int, moment: int, message: int, copied: int = 0) -> None:
        self._draft.wait(index, moment, self._rank, np.array([message]), copied)

    def _bytes_added(self, t: Transfer) -> int:
        """What is added to the sum at home; elsewhere what comes is the sum."""
        at_home = t.piece.block == self._home.block
        return self._program.rows_of(t) * self._sizes.row_bytes(t.payload) if at_home else 0

    def _target(self, t: Transfer) -> BlockSlice:
        return self._home if t.piece.block == self._home.block else t.piece
