"""The ring, and the ring of rings: blocks go round, and each stops at the last rank that needs it.

One level: in step t a rank attends to the block of rank - t and passes it on to rank + 1.

Two levels, for a slow axis of O groups and a fast one of I ranks in each: in turn u the blocks of group o - u go once
round the I ranks of group o. Meanwhile, for the whole turn, the block that a rank began the turn with is on its way
to the same place in group o + 1. Every message stays on one axis.

    turn 0    block (o, i), (o, i - 1), ...     fast axis; (o, i) itself goes to (o + 1, i) on the slow axis
    turn 1    block (o - 1, i), ...             the same, with what came meanwhile

The sum of a block's gradients follows one step behind it. At the end of a turn it goes back to the block's own place
in the fast axis; and from there, under a later turn, on the slow axis straight home, where it is added.

Source: Liu et al. 2023, arXiv:2310.01889; Li et al. 2021, arXiv:2105.13120; for two levels Gu et al. 2024,
arXiv:2406.18485.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ringattn.geometry.exchanges.schedule import Schedule
from ringattn.geometry.layout import Ints
from ringattn.geometry.plan import Piece, Program
from ringattn.geometry.tiles import Bools
from ringattn.geometry.travel import Travel


@dataclass(frozen=True)
class Ring:
    """Blocks go round; `num_outer` groups of ranks on the slow axis, of which a plain ring has one."""

    num_outer: int = 1

    @property
    def name(self) -> str:
        """For people."""
        return "ring" if self.num_outer == 1 else "double ring"

    def program(self, travel: Travel, rank: int, backward: bool) -> Program:
        """Returns rank's steps; in the backward the gradients' sums travel, too."""
        return _Writer(travel, rank, backward, Turns(travel, self.num_outer)).program()

    def rows_moved(self, travel: Travel) -> tuple[int, int]:
        """Returns how many rows all ranks together send: of what is carried, and of its gradients' sums."""
        turns = Turns(travel, self.num_outer)
        rows = np.array(travel.block_rows, dtype=np.int64)
        carried = np.maximum(turns.reach, 0).sum(axis=1) + turns.outer_reach
        # Along the way from the first rank that adds to the last; to the block's own place; then home.
        along = np.where(turns.reach >= 0, turns.reach - turns.first + (turns.reach > 0), 0).sum(axis=1)
        home = (turns.reach[:, 1:] >= 0).sum(axis=1)
        return int((rows * carried).sum()), int((rows * (along + home)).sum())


class Turns:
    """How far each block goes in each turn, and when turns begin: the same on every rank."""

    def __init__(self, travel: Travel, num_outer: int) -> None:
        self.num_outer, self.num_inner = num_outer, travel.world_size // num_outer
        # [block, turn]: the furthest hop at which it is needed, -1 if at none; the nearest one.
        self.reach, self.first = _hops(travel.needed, num_outer)
        turn = np.arange(num_outer)
        self.outer_reach: Ints = np.where(self.reach >= 0, turn, 0).max(axis=1)
        num_turns = int(self.outer_reach.max()) + 1
        lengths = np.maximum(self.reach[:, :num_turns].max(axis=0), 0) + 1
        self.starts: list[int] = [0, *np.cumsum(lengths).tolist()]
        self.num_turns = num_turns

    def num_steps(self, backward: bool) -> int:
        """Returns how many steps every rank has: in the backward, until the last sum is home."""
        steps = self.starts[-1]
        if not backward:
            return steps
        start = np.array(self.starts[:-1])
        reach = self.reach[:, : self.num_turns]
        begun = start + reach + (reach > 0) + (np.arange(self.num_turns) > 0)
        moved = (reach > 0) | ((np.arange(self.num_turns) > 0) & (reach == 0))
        return max(steps, int(np.where(moved, begun, 0).max()) + 1)


def _hops(needed: Bools, num_outer: int) -> tuple[Ints, Ints]:
    world = len(needed)
    inner = world // num_outer
    rank = np.arange(world)
    hop = (rank[None, :] % inner - rank[:, None] % inner) % inner
    turn = (rank[None, :] // inner - rank[:, None] // inner) % num_outer
    reach = np.full((world, num_outer), -1, dtype=np.int64)
    first = np.full((world, num_outer), inner, dtype=np.int64)
    for u in range(num_outer):
        here = needed & (turn == u)
        reach[:, u] = np.where(here, hop, -1).max(axis=1)
        first[:, u] = np.where(here, hop, inner).min(axis=1)
    return reach, first


class _Writer:
    """Writes the steps of the rank at place `inner` of group `outer`."""

    def __init__(self, travel: Travel, rank: int, backward: bool, turns: Turns) -> None:
        self._rank, self._backward, self._turns = rank, backward, turns
        self._outer, self._inner = divmod(rank, turns.num_inner)
        self._tiles = travel.tiles(rank)
        self._last_step = turns.num_steps(backward) - 1
        self._schedule = Schedule(travel, rank, self._last_step + 1)

    def program(self) -> Program:
        for turn in range(self._turns.num_turns):
            length = self._turns.starts[turn + 1] - self._turns.starts[turn]
            for hop in range(min(length, self._turns.num_inner)):
                self._write_hop(turn, hop)
            self._write_outer(turn)
            if self._backward:
                self._write_returns(turn)
        return self._schedule.program()

    def _at(self, outer: int, inner: int) -> int:
        return outer % self._turns.num_outer * self._turns.num_inner + inner % self._turns.num_inner

    def _block(self, turn: int, hop: int) -> int:
        return self._at(self._outer - turn, self._inner - hop)

    def _write_hop(self, turn: int, hop: int) -> None:
        """The block that is here at this hop: attend to it, pass it on, and its gradients one step behind."""
        step, block = self._turns.starts[turn] + hop, self._block(turn, hop)
        reach, first = int(self._turns.reach[block, turn]), int(self._turns.first[block, turn])
        piece = Piece(block)
        after, before = self._at(self._outer, self._inner + 1), self._at(self._outer, self._inner - 1)
        own_place = self._at(self._outer, self._inner - hop)
        if 0 < hop <= reach:
            self._schedule.receive(step - 1, piece, of=before)
        if block in self._tiles:
            self._schedule.visit(step, piece, self._tiles[block])
        if hop < reach:
            self._schedule.carry(step, piece, to=after)
        if not self._backward:
            return
        if first < hop <= reach:
            self._schedule.take_sum(step, piece, of=before)
        if first <= hop < reach:
            self._schedule.give_sum(step + 1, piece, to=after)
        elif hop == reach > 0:
            self._schedule.give_sum(step + 1, piece, to=own_place)

    def _write_outer(self, turn: int) -> None:
        """The block that the turn begins with goes to the next group, and the next turn's comes."""
        start, stop = self._turns.starts[turn], self._turns.starts[turn + 1]
        here, coming = self._block(turn, 0), self._block(turn + 1, 0)
        if self._turns.outer_reach[here] > turn:
            self._schedule.carry(start, Piece(here), to=self._at(self._outer + 1, self._inner), until=stop - 1)
        if self._turns.outer_reach[coming] > turn:
            self._schedule.receive(start, Piece(coming), of=self._at(self._outer - 1, self._inner))

    def _write_returns(self, turn: int) -> None:
        """The sum of what this group added comes to the block's place, and goes home."""
        guest, start = self._block(turn, 0), self._turns.starts[turn]
        reach = int(self._turns.reach[guest, turn])
        home_step = start + reach + (1 if reach > 0 else 0)  # in which the sum comes to the block's place
        if reach > 0:
            last = self._at(self._outer, self._inner + reach)
            self._schedule.take_sum(home_step, Piece(guest), of=last, until=None if turn else home_step)
        if turn and reach >= 0:
            home = self._at(self._outer - turn, self._inner)
            self._schedule.give_sum(home_step + 1, Piece(guest), to=home, until=self._turn_later(turn, home_step + 1))
        # The same of this rank's own block, seen from home.
        reach = int(self._turns.reach[self._rank, turn])
        if turn and reach >= 0:
            step = start + reach + (2 if reach > 0 else 1)
            group = self._at(self._outer + turn, self._inner)
            self._schedule.take_sum(step, Piece(self._rank), of=group, until=self._turn_later(turn, step))

    def _turn_later(self, turn: int, step: int) -> int:
        """The step by whose end a message of the slow axis is through: it has a whole turn for its way."""
        length = self._turns.starts[turn + 1] - self._turns.starts[turn]
        return min(step + length - 1, self._last_step)
