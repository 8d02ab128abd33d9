"""The ring, of one level or two: blocks move from rank to rank, and each stops at the last rank that needs it.

One level: in step t a rank computes with the block of rank - t and passes it on to rank + 1.

Two levels, for a slow axis of O groups and a fast axis of I ranks in each: in outer step u the blocks of group o - u
pass through the I ranks of group o. Meanwhile, for the whole outer step, the block that a rank began with travels to
the same place in group o + 1. Every message stays on one axis.

    outer step 0    block (o, i), (o, i - 1), ...   fast axis; (o, i) itself goes to (o + 1, i) on the slow axis
    outer step 1    block (o - 1, i), ...           the same, with the blocks that have arrived

In the backward blocks move in two halves, one after the other. The sum of a half's gradients begins with the first rank
that computes with it, and follows it while the other half is computed. What a rank adds for its own block stays there.
At the end of an outer step a sum returns to the block's place in the fast axis, and from there over the slow axis
straight to its rank, where it is added. The second half of a rank's own block is computed last, so that this return
travels under it.

    step 0      own block, 1st half      1st half of the neighbour's block arrives
    step 1      neighbour's, 1st half    2nd half arrives
    step 2      neighbour's, 2nd half    gradients of the 1st half move on; the next block's 1st half arrives
    ...
    last step   own block, 2nd half      the last gradients return

Source: Liu et al. 2023, arXiv:2310.01889; Li et al. 2021, arXiv:2105.13120; for two levels Gu et al. 2024,
arXiv:2406.18485.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ringattn.cost.cost_model import CostModel, Link
from ringattn.cost.lower_bound import LowerBound
from ringattn.geometry.rows import count_rows, halves
from ringattn.plan.comm_pattern import CommPattern
from ringattn.plan.exchanges.exchange import Exchange, register_exchange_class
from ringattn.plan.exchanges.program_builder import ProgramBuilder
from ringattn.plan.exchanges.ring_schedule import BackwardSteps, ForwardSteps, RingSchedule
from ringattn.plan.plan import BlockSlice, Program
from ringattn.plan.workload import Workload
from ringattn.types import Floats, Ints


@register_exchange_class
@dataclass(frozen=True, repr=False)
class Ring(Exchange):
    """Blocks move from rank to rank: on one axis, or on a mesh with a slow and a fast axis as a ring of rings."""

    mesh_axes = ("outer", "inner")

    @property
    def name(self) -> str:
        """What people call it."""
        return "ring"

    def program(self, pattern: CommPattern, rank: int, *, returns: bool) -> Program:
        """Returns rank's steps; with `returns`, the sums for each block follow it."""
        writer = _BackwardWriter if returns else _ForwardWriter
        return writer(pattern, rank, RingSchedule(pattern)).program()

    def rows_moved(self, pattern: CommPattern) -> tuple[int, int]:
        """Returns how many rows all ranks together send: of what moves, and of what returns."""
        schedule = RingSchedule(pattern)
        rows = np.array(pattern.block_rows, dtype=np.int64)
        moved = np.maximum(schedule.reach, 0).sum(axis=1) + schedule.outer_reach
        # From the first rank that adds to the last; to the block's own place; then over the slow axis.
        along, back = _return_hops(schedule)
        return int((rows * moved).sum()), int((rows * (along + back).sum(axis=1)).sum())

    def lower_bound(self, workload: Workload, model: CostModel) -> LowerBound:
        """Returns the least time: busy ranks, busy links, and the block that moves furthest."""
        schedule, rows, links = RingSchedule(workload.pattern), workload.block_rows, model.links
        block, total = rows * workload.row_bytes, rows * workload.returning_row_bytes
        inner_hops = np.maximum(schedule.reach, 0)
        along, back = _return_hops(schedule)
        crosses = schedule.outer_reach > 0
        moves = (inner_hops[:, 0] > 0) | crosses
        copied = block * moves + total * ((inner_hops[:, 0] > 0) + back.sum(axis=1))
        busy_s = workload.compute_s(model, workload.pattern.needed.sum(axis=0))
        busy_s = busy_s + copied / model.compute.copy_bytes_per_s
        loads = _link_loads(schedule, block, total)
        link_s = max(float(load.max()) / link.bytes_per_s for load, link in zip(loads, links, strict=True))
        first_half = _larger_halves(rows) * workload.row_bytes if workload.phase.returning else block
        path_s = _longest_path(schedule, first_half, links)
        num_messages = inner_hops.sum() + schedule.outer_reach.sum()
        num_messages += along.sum() + back.sum() if workload.returning_row_bytes else 0
        # In the middle of a ring a rank holds two blocks; in a backward three halves, and two of sums.
        halved = workload.phase.returning is not None
        held = (1.5 * block + total if halved else 2.0 * block) * moves + 2.0 * block * crosses
        return LowerBound(
            max(float(busy_s.max()), link_s, path_s),
            workload.flops_of_ranks,
            busy_s,
            link_s,
            path_s,
            loads[0] + loads[1],
            np.full(len(rows), num_messages * (2 if halved else 1) / len(rows)),
            float(held.max()),
        )


def _return_hops(schedule: RingSchedule) -> tuple[Ints, Ints]:
    """Returns how many hops sums make on the fast axis, and on the slow one: two of (block, outer step)."""
    reach = schedule.reach
    along: Ints = np.where(schedule.first <= reach, reach - schedule.first + (reach > 0), 0)
    back: Ints = (reach >= 0).astype(np.int64)
    back[:, 0] = 0
    return along, back


def _link_loads(schedule: RingSchedule, block: Ints, total: Ints) -> tuple[Floats, Floats]:
    """Returns the bytes that each rank sends on the fast axis, and on the slow one: two of (world,).

    Args:
        schedule: of the ring.
        block: bytes of each block, (world,).
        total: bytes of what returns for each block, (world,).
    """
    fast, slow = np.zeros((2, len(block)))
    outer, inner = np.divmod(np.arange(len(block)), schedule.num_inner)
    for step in range(schedule.num_outer_steps):
        reach, first = schedule.reach[:, step], schedule.first[:, step]
        for hop in range(schedule.num_inner):
            rank = (outer + step) % schedule.num_outer * schedule.num_inner + (inner + hop) % schedule.num_inner
            np.add.at(fast, rank, np.where(hop < reach, block, 0))
            np.add.at(fast, rank, np.where((first <= hop) & (hop <= reach) & (reach > 0), total, 0))
        rank = (outer + step) % schedule.num_outer * schedule.num_inner + inner
        np.add.at(slow, rank, np.where(schedule.outer_reach > step, block, 0))
        if step:
            np.add.at(slow, rank, np.where(reach >= 0, total, 0))
    return fast, slow


def _longest_path(schedule: RingSchedule, num_bytes: Ints, links: tuple[Link, Link]) -> float:
    """Seconds until the last block is where it is needed: one hop after the other, on both axes."""
    inner_s, outer_s = (link.latency_s + num_bytes / link.bytes_per_s for link in links)
    path: Floats = np.maximum(schedule.reach, 0) * inner_s[:, None]
    path += np.arange(schedule.num_outer) * outer_s[:, None]
    return float(np.where((schedule.reach >= 0) & (num_bytes > 0)[:, None], path, 0.0).max())


def _larger_halves(rows: Ints) -> Ints:
    different, index = np.unique(rows, return_inverse=True)
    found: Ints = np.array([max(map(count_rows, halves(n))) for n in different.tolist()], dtype=np.int64)[index]
    return found


class _Writer:
    """Writes the steps of the rank at place `inner` of group `outer`."""

    def __init__(self, pattern: CommPattern, rank: int, schedule: RingSchedule, num_steps: int) -> None:
        self._pattern, self._rank, self._schedule = pattern, rank, schedule
        self._outer, self._inner = divmod(rank, schedule.num_inner)
        self._tiles = pattern.tiles(rank)
        self._builder = ProgramBuilder(pattern, rank, num_steps)
        self._next, self._previous = self._at(self._outer, self._inner + 1), self._at(self._outer, self._inner - 1)

    def _at(self, outer: int, inner: int) -> int:
        return outer % self._schedule.num_outer * self._schedule.num_inner + inner % self._schedule.num_inner

    def _block(self, outer_step: int, inner_step: int) -> int:
        return self._at(self._outer - outer_step, self._inner - inner_step)


class _ForwardWriter(_Writer):
    def __init__(self, pattern: CommPattern, rank: int, schedule: RingSchedule) -> None:
        self._steps = ForwardSteps(schedule)
        super().__init__(pattern, rank, schedule, self._steps.num_steps)

    def program(self) -> Program:
        for outer_step, length in enumerate(self._schedule.lengths):
            for inner_step in range(length):
                self._write_inner(outer_step, inner_step)
            self._write_outer(outer_step)
        return self._builder.program()

    def _write_inner(self, outer_step: int, inner_step: int) -> None:
        """Computes with the block that is here, and passes it on."""
        step, block = self._steps.starts[outer_step] + inner_step, self._block(outer_step, inner_step)
        reach = int(self._schedule.reach[block, outer_step])
        if 0 < inner_step <= reach:
            self._builder.receive(step - 1, BlockSlice(block), source=self._previous)
        if block in self._tiles:
            self._builder.compute(step, BlockSlice(block), self._tiles[block])
        if inner_step < reach:
            self._builder.send(step, BlockSlice(block), to=self._next)

    def _write_outer(self, outer_step: int) -> None:
        """Sends the first block of this outer step to the next group, and receives one for the next outer step."""
        start, stop = self._steps.starts[outer_step], self._steps.starts[outer_step + 1]
        here, coming = self._block(outer_step, 0), self._block(outer_step + 1, 0)
        if self._schedule.outer_reach[here] > outer_step:
            self._builder.send(start, BlockSlice(here), to=self._at(self._outer + 1, self._inner), until=stop - 1)
        if self._schedule.outer_reach[coming] > outer_step:
            self._builder.receive(start, BlockSlice(coming), source=self._at(self._outer - 1, self._inner))


class _BackwardWriter(_Writer):
    def __init__(self, pattern: CommPattern, rank: int, schedule: RingSchedule) -> None:
        self._steps = BackwardSteps(schedule)
        super().__init__(pattern, rank, schedule, self._steps.num_steps)
        self._block_rows = pattern.block_rows

    def program(self) -> Program:
        self._builder.compute_own(self._steps.own, self._tiles.get(self._rank))
        for half in range(2):
            for outer_step, length in enumerate(self._schedule.lengths):
                for inner_step in range(length):
                    self._write_moving(outer_step, inner_step, half)
                    if outer_step or inner_step:
                        self._write_compute(outer_step, inner_step, half)
                self._write_outer(outer_step, half)
                self._write_return(outer_step, half)
        return self._builder.program()

    def _slice(self, block: int, half: int) -> BlockSlice | None:
        """Half a block; None if it is empty."""
        rows = halves(self._block_rows[block])[half]
        return BlockSlice(block, rows) if rows else None

    def _write_moving(self, outer_step: int, inner_step: int, half: int) -> None:
        """Receives a half from the previous rank, and passes it on."""
        block = self._block(outer_step, inner_step)
        block_slice, reach = self._slice(block, half), int(self._schedule.reach[block, outer_step])
        if block_slice is None:
            return
        if 0 < inner_step <= reach:
            self._builder.receive(self._steps.send(outer_step, inner_step, half), block_slice, source=self._previous)
        if inner_step < reach:
            step = self._steps.send(outer_step, inner_step + 1, half)
            self._builder.send(step, block_slice, to=self._next, until=max(step, half))

    def _write_compute(self, outer_step: int, inner_step: int, half: int) -> None:
        """Adds gradients to the sum, which arrives one step before the work and leaves one step after it."""
        step, block = self._steps.compute(outer_step, inner_step, half), self._block(outer_step, inner_step)
        block_slice, tiles = self._slice(block, half), self._tiles.get(block)
        if block_slice is None:
            return
        assert block_slice.rows is not None
        here = tiles.select(block_slice.rows, self._pattern.column, renumber=True) if tiles else None
        if here:
            self._builder.compute(step, block_slice, here)
        reach, first = int(self._schedule.reach[block, outer_step]), int(self._schedule.first[block, outer_step])
        if first < inner_step <= reach:
            before = self._steps.compute(outer_step, inner_step - 1, half) + 1
            self._builder.receive_return(before, block_slice, source=self._previous)
        if first <= inner_step < reach:
            self._builder.send_return(step + 1, block_slice, to=self._next)
        elif inner_step == reach > 0:
            self._builder.send_return(step + 1, block_slice, to=self._at(self._outer, self._inner - inner_step))

    def _write_outer(self, outer_step: int, half: int) -> None:
        """Sends the first block of this outer step to the next group, and receives one for the next outer step."""
        start = self._steps.compute(outer_step, 0, half) if outer_step else 0
        here, coming = self._block(outer_step, 0), self._block(outer_step + 1, 0)
        block_slice = self._slice(here, half)
        if block_slice and self._schedule.outer_reach[here] > outer_step:
            until = self._steps.compute(outer_step + 1, 0, half) - 1
            self._builder.send(start, block_slice, to=self._at(self._outer + 1, self._inner), until=until)
        block_slice = self._slice(coming, half)
        if block_slice and self._schedule.outer_reach[coming] > outer_step:
            self._builder.receive(start, block_slice, source=self._at(self._outer - 1, self._inner))

    def _write_return(self, outer_step: int, half: int) -> None:
        """Collects the sum of what this group added at the block's place, and sends it to the block's rank."""
        visitor = self._block(outer_step, 0)
        block_slice, reach = self._slice(visitor, half), int(self._schedule.reach[visitor, outer_step])
        if outer_step and block_slice and reach >= 0:
            if reach > 0:
                last = self._at(self._outer, self._inner + reach)
                step = self._steps.compute(outer_step, reach, half) + 1
                self._builder.receive_return(step, block_slice, source=last)
            leaves, arrives = self._return_steps(outer_step, reach, half)
            target = self._at(self._outer - outer_step, self._inner)
            self._builder.send_return(leaves, block_slice, to=target, until=arrives)
        # The same for this rank's own block, at its end.
        block_slice, reach = self._slice(self._rank, half), int(self._schedule.reach[self._rank, outer_step])
        if block_slice and (reach > 0 or (outer_step and reach == 0)):
            source = self._at(self._outer + outer_step, self._inner if outer_step else self._inner + reach)
            leaves, arrives = self._return_steps(outer_step, reach, half)
            self._builder.receive_return(leaves, block_slice, source=source, until=arrives)

    def _return_steps(self, outer_step: int, reach: int, half: int) -> tuple[int, int]:
        return (
            self._steps.send_return(outer_step, reach, half),
            self._steps.wait_return(outer_step, reach, half),
        )
