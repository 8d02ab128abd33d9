"""The schedule of a ring: how far each block moves, and in which step; the same on every rank.

A ring of two levels makes *outer steps*, each with several *inner steps*; a plain ring has one outer step.
"""

from __future__ import annotations

import numpy as np

from ringattn.plan.comm_pattern import CommPattern
from ringattn.types import Bools, Ints


class RingSchedule:
    """How far each block moves in each outer step, and how many inner steps that takes.

    Args:
        pattern: which rank needs which block, and the mesh.
    """

    def __init__(self, pattern: CommPattern) -> None:
        self.num_outer = pattern.num_outer
        self.num_inner = pattern.world_size // self.num_outer
        # [block, outer step]: the last inner step in which a rank needs it, -1 if none does; the first one but its own.
        self.reach, self.first = _inner_steps(pattern.needed, self.num_outer)
        outer_step = np.arange(self.num_outer)
        self.outer_reach: Ints = np.where(self.reach >= 0, outer_step, 0).max(axis=1)
        self.num_outer_steps = int(self.outer_reach.max()) + 1
        lengths: Ints = np.maximum(self.reach[:, : self.num_outer_steps].max(axis=0), 0) + 1
        self.lengths: list[int] = lengths.tolist()


class ForwardSteps:
    """The steps of a forward: one for each inner step, one outer step after the other."""

    def __init__(self, schedule: RingSchedule) -> None:
        self.starts: list[int] = [0, *np.cumsum(schedule.lengths).tolist()]
        self.num_steps = self.starts[-1]


class BackwardSteps:
    """The steps of a backward: two for each inner step, as blocks move in halves; the own block is first and last.

    So the gradients of one half move while the other half is computed, and the last gradients return under the second
    half of the own block. On two levels some inner steps of the own group come last, too: gradients return over the
    slow axis under them.
    """

    def __init__(self, schedule: RingSchedule) -> None:
        self._schedule = schedule
        own_group = range(1, schedule.lengths[0])
        early = len(own_group) // 2 if schedule.num_outer_steps > 1 else len(own_group)
        others = [
            (outer, inner) for outer in range(1, schedule.num_outer_steps) for inner in range(schedule.lengths[outer])
        ]
        order = [(0, inner) for inner in own_group[:early]] + others + [(0, inner) for inner in own_group[early:]]
        self._step = {steps: 2 * index + 1 for index, steps in enumerate(order)}
        self.own = (0, 2 * len(order) + 1) if order else (0, 0)  # in which this rank's own halves are computed
        self.num_steps = self._count()

    def compute(self, outer: int, inner: int, half: int) -> int:
        """Returns the step in which half a block is computed; not for a rank's own block."""
        return self._step[outer, inner] + half

    def send(self, outer: int, inner: int, half: int) -> int:
        """Returns the step in which it is sent there, on the fast axis."""
        return max(self.compute(outer, inner, half) - 2, 0)

    def send_return(self, outer: int, reach: int, half: int) -> int:
        """Returns the step in which its gradients leave for its own rank, the last rank being at inner step `reach`."""
        return self.compute(outer, reach, half) + (2 if outer and reach else 1)

    def wait_return(self, outer: int, reach: int, half: int) -> int:
        """Returns the step by whose end they have arrived: on the slow axis they may take a whole outer step."""
        time = 2 * self._schedule.lengths[outer] - 1 if outer else 0
        return min(self.send_return(outer, reach, half) + time, self.num_steps - 1)

    def _count(self) -> int:
        last = self.own[1]
        for outer in range(self._schedule.num_outer_steps):
            furthest = int(self._schedule.reach[:, outer].max())
            # The second half is last; a shorter path may take one step more than the furthest, but never ends later.
            if furthest > 0 or (outer and furthest == 0):
                last = max(last, self.send_return(outer, furthest, 1))
        return last + 1


def _inner_steps(needed: Bools, num_outer: int) -> tuple[Ints, Ints]:
    world = len(needed)
    num_inner = world // num_outer
    rank = np.arange(world)
    inner = (rank[None, :] % num_inner - rank[:, None] % num_inner) % num_inner
    outer = (rank[None, :] // num_inner - rank[:, None] // num_inner) % num_outer
    reach = np.full((world, num_outer), -1, dtype=np.int64)
    first = np.full((world, num_outer), num_inner, dtype=np.int64)
    for step in range(num_outer):
        here = needed & (outer == step)
        reach[:, step] = np.where(here, inner, -1).max(axis=1)
        others = here & (rank[None, :] != rank[:, None])
        first[:, step] = np.where(others, inner, num_inner).min(axis=1)
    return reach, first
