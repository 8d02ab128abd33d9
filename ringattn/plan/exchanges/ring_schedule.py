"""Turns: how far each block of a ring goes, and when; the same on every rank, for one of them or for all as arrays."""

from __future__ import annotations

import numpy as np

from ringattn.plan.comm_pattern import CommPattern
from ringattn.types import Bools, Ints


class RingSchedule:
    """How far each block goes in each turn, and how many hops a turn has.

    Args:
        travel: who needs whose block.
        num_outer: groups of ranks on the slow axis.
    """

    def __init__(self, travel: CommPattern, num_outer: int) -> None:
        self.num_outer, self.num_inner = num_outer, travel.world_size // num_outer
        # [block, turn]: the furthest hop at which it is needed, -1 if at none; the nearest one but its own rank's.
        self.reach, self.first = _hops(travel.needed, num_outer)
        turn = np.arange(num_outer)
        self.outer_reach: Ints = np.where(self.reach >= 0, turn, 0).max(axis=1)
        self.num_turns = int(self.outer_reach.max()) + 1
        lengths: Ints = np.maximum(self.reach[:, : self.num_turns].max(axis=0), 0) + 1
        self.lengths: list[int] = lengths.tolist()


class ForwardSteps:
    """The steps of a forward: one for each hop, turn after turn."""

    def __init__(self, turns: RingSchedule) -> None:
        self.starts: list[int] = [0, *np.cumsum(turns.lengths).tolist()]
        self.num_steps = self.starts[-1]


class BackwardSteps:
    """The steps of a backward: two for each hop, as blocks travel in halves; the own block's at both ends.

    So a half's gradients are on their way while the other half is computed, and the last ones go home under the own
    block's second half. On two levels some of the own group's hops are kept for the end, too, for what goes home over
    the slow axis to travel under.
    """

    def __init__(self, turns: RingSchedule) -> None:
        self._turns = turns
        own_turn = range(1, turns.lengths[0])
        early = len(own_turn) // 2 if turns.num_turns > 1 else len(own_turn)
        guests = [(turn, hop) for turn in range(1, turns.num_turns) for hop in range(turns.lengths[turn])]
        hops = [(0, hop) for hop in own_turn[:early]] + guests + [(0, hop) for hop in own_turn[early:]]
        self._step = {hop: 2 * index + 1 for index, hop in enumerate(hops)}
        self.own = (0, 2 * len(hops) + 1) if hops else (0, 0)  # in which this rank's own halves are computed
        self.num_steps = self._count()

    def at(self, turn: int, hop: int, half: int) -> int:
        """Returns the step in which half a block is computed; not that of a rank's own."""
        return self._step[turn, hop] + half

    def posted(self, turn: int, hop: int, half: int) -> int:
        """Returns the step in which it is sent there, on the fast axis."""
        return max(self.at(turn, hop, half) - 2, 0)

    def home(self, turn: int, reach: int, half: int) -> int:
        """Returns the step in which its gradients set out for home, having been furthest at hop `reach`."""
        return self.at(turn, reach, half) + (2 if turn and reach else 1)

    def there(self, turn: int, reach: int, half: int) -> int:
        """Returns the step by whose end they are there: on the slow axis they have a turn's time."""
        time = 2 * self._turns.lengths[turn] - 1 if turn else 0
        return min(self.home(turn, reach, half) + time, self.num_steps - 1)

    def _count(self) -> int:
        last = self.own[1]
        for turn in range(self._turns.num_turns):
            furthest = int(self._turns.reach[:, turn].max())
            # The second half last; a shorter way may have one step more than the furthest, but never ends later.
            if furthest > 0 or (turn and furthest == 0):
                last = max(last, self.home(turn, furthest, 1))
        return last + 1


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
        others = here & (rank[None, :] != rank[:, None])
        first[:, u] = np.where(others, hop, inner).min(axis=1)
    return reach, first


def rank_at(turns: RingSchedule, outer: Ints, inner: Ints) -> Ints:
    """Returns the ranks at these places, counted around both axes; for numbers, and for arrays of them."""
    found: Ints = outer % turns.num_outer * turns.num_inner + inner % turns.num_inner
    return found
