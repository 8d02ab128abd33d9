"""The timetable of a ring, of one level or two: what `exchanges/ring.py` writes for one rank, as arrays over all."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ringattn.cost.timetable import AFTER, BEFORE, NONE, Draft
from ringattn.geometry.rows import count_rows, halves
from ringattn.plan.exchanges.ring_schedule import BackwardSteps, ForwardSteps, RingSchedule, rank_at
from ringattn.types import Floats, Ints


class Loads(Protocol):
    """What a ring's ranks compute and send."""

    @property
    def flops(self) -> Floats:
        """What each rank computes with each block: (world, world), [rank, block]."""
        ...

    @property
    def flops_of_halves(self) -> tuple[Floats, Floats]:
        """The same with each half of it."""
        ...

    @property
    def block_rows(self) -> tuple[int, ...]:
        """Rows of each block."""
        ...

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of what travels."""
        ...

    @property
    def sum_row_bytes(self) -> int:
        """Bytes of a row of its gradients; 0 where they do not travel."""
        ...


def write_ring(draft: Draft, turns: RingSchedule, loads: Loads, backward: bool) -> int:
    """Writes the steps of a ring, and returns how many there are."""
    return (_Backward if backward else _Forward)(draft, turns, loads).write()


class _Writer:
    def __init__(self, draft: Draft, turns: RingSchedule, loads: Loads) -> None:
        self._draft, self._turns, self._loads = draft, turns, loads
        self._rank = np.arange(len(loads.block_rows))
        self._outer, self._inner = np.divmod(self._rank, turns.num_inner)
        self._after = self._at(self._outer, self._inner + 1)
        self._next_group = self._at(self._outer + 1, self._inner)
        self._crosses = turns.outer_reach > 0

    def _at(self, outer: Ints, inner: Ints) -> Ints:
        return rank_at(self._turns, outer, inner)

    def _block(self, turn: int, hop: int) -> Ints:
        return self._at(self._outer - turn, self._inner - hop)

    def _none(self) -> Ints:
        return np.full(len(self._rank), NONE, dtype=np.int64)

    def _received(self, target: Ints, sent: Ints) -> Ints:
        came = self._none()
        came[target] = sent
        return came


class _Forward(_Writer):
    def write(self) -> int:
        steps = ForwardSteps(self._turns)
        rows = np.array(self._loads.block_rows, dtype=np.int64)
        self._bytes, self._flops = rows * self._loads.row_bytes, self._loads.flops
        packed = np.flatnonzero((self._turns.reach[:, 0] > 0) | self._crosses)
        until = np.where(self._crosses, steps.starts[1] - 1, 0)[packed]
        self._draft.pack(0, packed, self._bytes[packed], until)
        came = self._none()
        for turn, length in enumerate(self._turns.lengths):
            to_come = self._write_outer(turn, steps.starts, came)
            for hop in range(length):
                came = self._write_hop(turn, hop, steps.starts[turn] + hop, came)
            came = to_come
        return steps.num_steps

    def _write_outer(self, turn: int, starts: list[int], came: Ints) -> Ints:
        """The block that the turn begins with goes to the next group; returns by which messages others come."""
        guest = self._block(turn, 0)
        goes = np.flatnonzero(self._turns.outer_reach[guest] > turn)
        self._draft.wait(starts[turn], BEFORE, goes, came[goes])
        until = starts[min(turn + 2, self._turns.num_turns)] - 1
        target = self._next_group[goes]
        sent = self._draft.message(starts[turn], goes, target, self._bytes[guest[goes]], until, axis=1)
        self._draft.wait(starts[turn + 1] - 1, AFTER, goes, sent)
        return self._received(target, sent)

    def _write_hop(self, turn: int, hop: int, step: int, came: Ints) -> Ints:
        """The block at hand is passed on and attended to; returns by which messages the next come."""
        block = self._block(turn, hop)
        goes = np.flatnonzero(hop < self._turns.reach[block, turn])
        self._draft.wait(step, BEFORE, goes, came[goes])
        sent = self._draft.message(step, goes, self._after[goes], self._bytes[block[goes]], step + 1)
        self._draft.wait(step, AFTER, goes, sent)
        at = np.flatnonzero(self._flops[self._rank, block] > 0)
        self._draft.visit(step, at, self._flops[at, block[at]], came[at], NONE, 0)
        return self._received(self._after[goes], sent)


class _Backward(_Writer):
    def write(self) -> int:
        self._steps = BackwardSteps(self._turns)
        own = self._steps.own
        whole, parts = self._loads.flops.diagonal(), self._loads.flops_of_halves
        for step, flops in zip(own, [p.diagonal() for p in parts], strict=True) if own[1] else [(0, whole)]:
            at = np.flatnonzero(flops)
            self._draft.visit(step, at, flops[at], NONE, NONE, 0)
        if not own[1]:
            return self._steps.num_steps
        for half in range(2):
            self._flops = parts[half]
            rows = np.array([count_rows(halves(n)[half]) for n in self._loads.block_rows], dtype=np.int64)
            self._some, self._bytes = rows > 0, rows * self._loads.row_bytes
            self._sum_bytes = rows * self._loads.sum_row_bytes
            self._write_half(half)
        return self._steps.num_steps

    def _write_half(self, half: int) -> None:
        self._pack(half)
        came = self._none()
        for turn, length in enumerate(self._turns.lengths):
            to_come = self._write_outer(turn, half, came)
            total, guest_sum = self._none(), self._none()
            for hop in range(length):
                going = self._write_carried(turn, hop, half, came)
                if turn or hop:
                    total = self._write_work(turn, hop, half, came, total, guest_sum)
                came = going
            if turn and self._loads.sum_row_bytes:
                self._write_home(turn, half, guest_sum)
            came = to_come

    def _pack(self, half: int) -> None:
        """A rank's own half is copied when it is first sent."""
        around = self._turns.reach[:, 0] > 0
        first = self._steps.posted(0, 1, half) if around.any() else 0
        step = np.where(self._crosses, 0, first)
        last = np.where(around, max(first, half), 0)
        if self._turns.num_turns > 1:
            last = np.maximum(last, np.where(self._crosses, self._steps.at(1, 0, half) - 1, 0))
        for when in np.unique(step):
            packed = np.flatnonzero((around | self._crosses) & (step == when) & self._some)
            self._draft.pack(int(when), packed, self._bytes[packed], last[packed])

    def _write_outer(self, turn: int, half: int, came: Ints) -> Ints:
        """What the turn begins with goes to the next group; returns by which messages others come."""
        guest = self._block(turn, 0)
        goes = np.flatnonzero((self._turns.outer_reach[guest] > turn) & self._some[guest])
        if not len(goes):
            return self._none()
        step = self._steps.at(turn, 0, half) if turn else 0
        until = self._steps.at(turn + 1, 0, half)
        self._draft.wait(step, BEFORE, goes, came[goes])
        target = self._next_group[goes]
        sent = self._draft.message(step, goes, target, self._bytes[guest[goes]], until, axis=1)
        self._draft.wait(until - 1, AFTER, goes, sent)
        return self._received(target, sent)

    def _write_carried(self, turn: int, hop: int, half: int, came: Ints) -> Ints:
        """What is at hand is passed on; returns by which messages the next come."""
        block = self._block(turn, hop)
        goes = np.flatnonzero((hop < self._turns.reach[block, turn]) & self._some[block])
        if not len(goes):
            return self._none()
        step, until = self._steps.posted(turn, hop + 1, half), self._steps.at(turn, hop + 1, half)
        self._draft.wait(step, BEFORE, goes, came[goes])
        sent = self._draft.message(step, goes, self._after[goes], self._bytes[block[goes]], until)
        self._draft.wait(max(step, half), AFTER, goes, sent)
        return self._received(self._after[goes], sent)

    def _write_work(self, turn: int, hop: int, half: int, came: Ints, total: Ints, guest_sum: Ints) -> Ints:
        """It is computed, and its sum goes on or home; returns by which messages sums come that go on."""
        step, block = self._steps.at(turn, hop, half), self._block(turn, hop)
        visits = self._flops[self._rank, block] > 0
        at = np.flatnonzero(visits)
        self._draft.visit(step, at, self._flops[at, block[at]], came[at], total[at], 0)
        if not self._loads.sum_row_bytes:
            return self._none()
        reach, first = self._turns.reach[block, turn], self._turns.first[block, turn]
        along, back = (first <= hop) & (hop < reach), (hop == reach) & (reach > 0)
        gives = np.flatnonzero((along | back) & self._some[block])
        target = np.where(along, self._after, self._at(self._outer, self._inner - hop))[gives]
        awaited = np.where(visits, NONE, total)
        self._draft.wait(step + 1, BEFORE, gives, awaited[gives])
        sums = self._sum_bytes[block[gives]]
        sent = self._draft.message(step + 1, gives, target, sums, step + 2, gradient=1)
        self._draft.wait(step + 1, AFTER, gives, sent)
        home = back[gives]
        if turn == 0:
            self._draft.wait(step + 1, AFTER, target[home], sent[home], sums[home])
        else:
            guest_sum[target[home]] = sent[home]
        return self._received(target[~home], sent[~home])

    def _write_home(self, turn: int, half: int, guest_sum: Ints) -> None:
        """The sums of what this group added go home, each with a turn's time."""
        guest = self._block(turn, 0)
        reach = np.where(self._some[guest], self._turns.reach[guest, turn], -1)
        for far in np.unique(reach[reach >= 0]).tolist():
            gives = np.flatnonzero(reach == far)
            step, until = self._steps.home(turn, far, half), self._steps.there(turn, far, half)
            target = self._at(self._outer - turn, self._inner)[gives]
            self._draft.wait(step, BEFORE, gives, guest_sum[gives])
            sums = self._sum_bytes[guest[gives]]
            sent = self._draft.message(step, gives, target, sums, step + 1, axis=1, gradient=1)
            self._draft.wait(until, AFTER, gives, sent)
            self._draft.wait(until, AFTER, target, sent, sums)
