"""The ring, and the ring of rings: blocks go round, and each stops at the last rank that needs it.

One level: in step t a rank attends to the block of rank - t and passes it on to rank + 1.

Two levels, for a slow axis of O groups and a fast one of I ranks in each: in turn u the blocks of group o - u go once
round the I ranks of group o. Meanwhile, for the whole turn, the block that a rank began the turn with is on its way
to the same place in group o + 1. Every message stays on one axis.

    turn 0    block (o, i), (o, i - 1), ...     fast axis; (o, i) itself goes to (o + 1, i) on the slow axis
    turn 1    block (o - 1, i), ...             the same, with what came meanwhile

In the backward blocks go in two halves, one after the other. The sum of a half's gradients begins with the first rank
that it visits, and follows it, under the other half's work. What a rank adds for its own block stays with it. At the
end of a turn a sum goes back to the block's own place in the fast axis; and from there on the slow axis straight
home, where it is added. The second half of a rank's own block is computed last, for that to travel under.

    step 0      own block, 1st half      1st half of the neighbour's block comes
    step 1      neighbour's, 1st half    2nd half comes
    step 2      neighbour's, 2nd half    gradients of the 1st half go on; the next block's 1st half comes
    ...
    last step   own block, 2nd half      the last gradients go home

Source: Liu et al. 2023, arXiv:2310.01889; Li et al. 2021, arXiv:2105.13120; for two levels Gu et al. 2024,
arXiv:2406.18485.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ringattn.geometry.rows import halves
from ringattn.plan.comm_pattern import CommPattern
from ringattn.plan.exchanges.program_builder import ProgramBuilder
from ringattn.plan.exchanges.ring_schedule import BackwardSteps, ForwardSteps, RingSchedule
from ringattn.plan.plan import BlockSlice, Program


@dataclass(frozen=True)
class Ring:
    """Blocks go round; `num_outer` groups of ranks on the slow axis, of which a plain ring has one."""

    num_outer: int = 1

    @property
    def name(self) -> str:
        """For people."""
        return "ring" if self.num_outer == 1 else "double ring"

    def program(self, travel: CommPattern, rank: int, backward: bool) -> Program:
        """Returns rank's steps; in the backward the gradients' sums travel, too."""
        writer = _BackwardWriter if backward else _ForwardWriter
        return writer(travel, rank, RingSchedule(travel, self.num_outer)).program()

    def rows_moved(self, travel: CommPattern) -> tuple[int, int]:
        """Returns how many rows all ranks together send: of what is carried, and of its gradients' sums."""
        turns = RingSchedule(travel, self.num_outer)
        rows = np.array(travel.block_rows, dtype=np.int64)
        carried = np.maximum(turns.reach, 0).sum(axis=1) + turns.outer_reach
        # Along the way from the first rank that adds to the last; to the block's own place; then home.
        along = np.where(turns.first <= turns.reach, turns.reach - turns.first + (turns.reach > 0), 0).sum(axis=1)
        home = (turns.reach[:, 1:] >= 0).sum(axis=1)
        return int((rows * carried).sum()), int((rows * (along + home)).sum())


class _Writer:
    """Writes the steps of the rank at place `inner` of group `outer`."""

    def __init__(self, travel: CommPattern, rank: int, turns: RingSchedule, num_steps: int) -> None:
        self._travel, self._rank, self._turns = travel, rank, turns
        self._outer, self._inner = divmod(rank, turns.num_inner)
        self._tiles = travel.tiles(rank)
        self._schedule = ProgramBuilder(travel, rank, num_steps)
        self._after, self._before = self._at(self._outer, self._inner + 1), self._at(self._outer, self._inner - 1)

    def _at(self, outer: int, inner: int) -> int:
        return outer % self._turns.num_outer * self._turns.num_inner + inner % self._turns.num_inner

    def _block(self, turn: int, hop: int) -> int:
        return self._at(self._outer - turn, self._inner - hop)


class _ForwardWriter(_Writer):
    def __init__(self, travel: CommPattern, rank: int, turns: RingSchedule) -> None:
        self._steps = ForwardSteps(turns)
        super().__init__(travel, rank, turns, self._steps.num_steps)

    def program(self) -> Program:
        for turn, length in enumerate(self._turns.lengths):
            for hop in range(length):
                self._write_hop(turn, hop)
            self._write_outer(turn)
        return self._schedule.program()

    def _write_hop(self, turn: int, hop: int) -> None:
        """The block that is here at this hop: attend to it, and pass it on."""
        step, block = self._steps.starts[turn] + hop, self._block(turn, hop)
        reach = int(self._turns.reach[block, turn])
        if 0 < hop <= reach:
            self._schedule.receive(step - 1, BlockSlice(block), of=self._before)
        if block in self._tiles:
            self._schedule.visit(step, BlockSlice(block), self._tiles[block])
        if hop < reach:
            self._schedule.carry(step, BlockSlice(block), to=self._after)

    def _write_outer(self, turn: int) -> None:
        """The block that the turn begins with goes to the next group, and the next turn's comes."""
        start, stop = self._steps.starts[turn], self._steps.starts[turn + 1]
        here, coming = self._block(turn, 0), self._block(turn + 1, 0)
        if self._turns.outer_reach[here] > turn:
            self._schedule.carry(start, BlockSlice(here), to=self._at(self._outer + 1, self._inner), until=stop - 1)
        if self._turns.outer_reach[coming] > turn:
            self._schedule.receive(start, BlockSlice(coming), of=self._at(self._outer - 1, self._inner))


class _BackwardWriter(_Writer):
    def __init__(self, travel: CommPattern, rank: int, turns: RingSchedule) -> None:
        self._steps = BackwardSteps(turns)
        super().__init__(travel, rank, turns, self._steps.num_steps)
        self._block_rows = travel.block_rows

    def program(self) -> Program:
        self._schedule.visit_own(self._steps.own, self._tiles.get(self._rank))
        for half in range(2):
            for turn, length in enumerate(self._turns.lengths):
                for hop in range(length):
                    self._write_carried(turn, hop, half)
                    if turn or hop:
                        self._write_hop(turn, hop, half)
                self._write_outer(turn, half)
                self._write_home(turn, half)
        return self._schedule.program()

    def _piece(self, block: int, half: int) -> BlockSlice | None:
        """Half a block; None if there is nothing in it."""
        rows = halves(self._block_rows[block])[half]
        return BlockSlice(block, rows) if rows else None

    def _write_carried(self, turn: int, hop: int, half: int) -> None:
        """The half that is here at this hop came from the rank before, and is passed on."""
        block = self._block(turn, hop)
        piece, reach = self._piece(block, half), int(self._turns.reach[block, turn])
        if piece is None:
            return
        if 0 < hop <= reach:
            self._schedule.receive(self._steps.posted(turn, hop, half), piece, of=self._before)
        if hop < reach:
            step = self._steps.posted(turn, hop + 1, half)
            self._schedule.carry(step, piece, to=self._after, until=max(step, half))

    def _write_hop(self, turn: int, hop: int, half: int) -> None:
        """Its gradients are added to the sum that came one step before the work, and goes on one step after it."""
        step, block = self._steps.at(turn, hop, half), self._block(turn, hop)
        piece, tiles = self._piece(block, half), self._tiles.get(block)
        if piece is None:
            return
        assert piece.rows is not None
        here = tiles.select(piece.rows, self._travel.column, renumber=True) if tiles else None
        if here:
            self._schedule.visit(step, piece, here)
        reach, first = int(self._turns.reach[block, turn]), int(self._turns.first[block, turn])
        if first < hop <= reach:
            self._schedule.take_sum(self._steps.at(turn, hop - 1, half) + 1, piece, of=self._before)
        if first <= hop < reach:
            self._schedule.give_sum(step + 1, piece, to=self._after)
        elif hop == reach > 0:
            self._schedule.give_sum(step + 1, piece, to=self._at(self._outer, self._inner - hop))

    def _write_outer(self, turn: int, half: int) -> None:
        """The block that the turn begins with goes to the next group, and the next turn's comes."""
        start = self._steps.at(turn, 0, half) if turn else 0
        here, coming = self._block(turn, 0), self._block(turn + 1, 0)
        piece = self._piece(here, half)
        if piece and self._turns.outer_reach[here] > turn:
            until = self._steps.at(turn + 1, 0, half) - 1
            self._schedule.carry(start, piece, to=self._at(self._outer + 1, self._inner), until=until)
        piece = self._piece(coming, half)
        if piece and self._turns.outer_reach[coming] > turn:
            self._schedule.receive(start, piece, of=self._at(self._outer - 1, self._inner))

    def _write_home(self, turn: int, half: int) -> None:
        """The sum of what this group added comes to the block's place, and goes home."""
        guest = self._block(turn, 0)
        piece, reach = self._piece(guest, half), int(self._turns.reach[guest, turn])
        if turn and piece and reach >= 0:
            if reach > 0:
                last = self._at(self._outer, self._inner + reach)
                self._schedule.take_sum(self._steps.at(turn, reach, half) + 1, piece, of=last)
            when = self._steps.home(turn, reach, half), self._steps.there(turn, reach, half)
            self._schedule.give_sum(when[0], piece, to=self._at(self._outer - turn, self._inner), until=when[1])
        # The same of this rank's own block, seen from home.
        piece, reach = self._piece(self._rank, half), int(self._turns.reach[self._rank, turn])
        if piece and (reach > 0 or (turn and reach == 0)):
            last = self._at(self._outer + turn, self._inner if turn else self._inner + reach)
            when = self._steps.home(turn, reach, half), self._steps.there(turn, reach, half)
            self._schedule.take_sum(when[0], piece, of=last, until=when[1])
