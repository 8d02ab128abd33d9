"""The timetable of spread heads: an all-to-all there, the exchange for fewer heads of more rows, an all-to-all back.

Rows are put together where they come to, which on CPUs they are not: that is a few hundredths of the time at most.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ringattn.cost.timetable import BEFORE, Draft, Timetable
from ringattn.cost.timetables import Scene, write_exchange
from ringattn.plan.exchanges import Exchange
from ringattn.plan.head_parallel import gathered_layout, replicates_kv_heads
from ringattn.plan.head_shards import HeadShard, shard_heads
from ringattn.types import Ints


def spread_timetable_for(exchange: Exchange, scene: Scene, num_groups: int, stages: int) -> Timetable:
    """Returns the timetable of heads spread over the ranks of each group, and an exchange between the groups.

    Args:
        exchange: between the groups, each holding the rows of its ranks.
        scene: the direction, of all ranks.
        num_groups: 1 if all ranks make one group; groups are of consecutive ranks.
        stages: parts of each rank's heads.
    """
    draft = Draft(scene.layout.world_size)
    all_shares = shard_heads(scene.sizes.heads, scene.sizes.kv_heads, scene.layout.world_size // num_groups, stages)
    trades = _Trades(draft, scene, num_groups, replicates_kv_heads(all_shares))
    layout, _ = gathered_layout(scene.layout, num_groups)
    kv_layout, _ = gathered_layout(scene.kv_layout, num_groups)
    inner = replace(scene, layout=layout, kv_layout=kv_layout)
    coming, returning, step = trades.there(0, all_shares[0]), None, 1
    for stage, shares in enumerate(all_shares):
        trades.arrive(step, coming)
        if stage + 1 < stages:
            coming = trades.there(step, all_shares[stage + 1])
        taken = 1
        for place, share in enumerate(shares):
            ranks = np.arange(num_groups) * trades.width + place
            part = replace(inner, sizes=scene.sizes.of_heads(len(share.heads), len(share.kv_heads)))
            if share.heads:
                taken = write_exchange(draft.within(ranks, 1, step), exchange, part)
        step += taken
        if returning is not None:
            trades.arrive(step, returning)
        returning = trades.back(step, shares)
        step += 1
    if returning is not None:
        trades.arrive(step, returning)
    draft.steps(step + 1)
    return draft.timetable()


class _Trade(NamedTuple):
    """An all-to-all under way: its messages, by their numbers."""

    source: Ints
    target: Ints
    num_bytes: Ints
    number: Ints


class _Trades:
    """The all-to-alls within the groups."""

    def __init__(self, draft: Draft, scene: Scene, num_groups: int, replicated: bool) -> None:
        self._draft, self._scene, self._replicated = draft, scene, replicated
        world = scene.layout.world_size
        self.width = world // num_groups
        source, target = np.divmod(np.arange(world * self.width), self.width)
        target = source // self.width * self.width + target
        self._source, self._target = source[source != target], target[source != target]
        self._rank = np.arange(world)
        self._rows, self._kv_rows = (
            np.array([held.num_tokens(rank) for rank in range(world)], dtype=np.int64)
            for held in (scene.layout, scene.kv_layout)
        )

    def there(self, step: int, shares: tuple[HeadShard, ...]) -> _Trade:
        """Everyone's rows go to those who compute the heads."""
        return self._post(step, self._source, self._target, self._num_bytes(shares, bytes_there(self._scene)))

    def back(self, step: int, shares: tuple[HeadShard, ...]) -> _Trade:
        """What was computed goes to those whose rows it is."""
        num_bytes = self._num_bytes(shares, bytes_back(self._scene, self._replicated))
        return self._post(step, self._target, self._source, num_bytes)

    def arrive(self, step: int, trade: _Trade) -> None:
        """Everyone waits for what comes to them, and for what they sent, and copies it into place."""
        self._draft.wait(step, BEFORE, trade.target, trade.number, trade.num_bytes)
        self._draft.wait(step, BEFORE, trade.source, trade.number)

    def _post(self, step: int, source: Ints, target: Ints, num_bytes: Ints) -> _Trade:
        packed = np.bincount(source, weights=num_bytes, minlength=len(self._rank)).astype(np.int64)
        self._draft.pack(step, self._rank, packed, step + 1)
        return _Trade(source, target, num_bytes, self._draft.message(step, source, target, num_bytes, step + 1))

    def _num_bytes(self, shares: tuple[HeadShard, ...], row_bytes: tuple[int, int]) -> Ints:
        """Bytes between each source, whose rows they are, and target, which has the heads."""
        place = self._target % self.width
        heads, kv_heads = (np.array([len(s.heads) for s in shares]), np.array([len(s.kv_heads) for s in shares]))
        num_bytes = self._rows[self._source] * heads[place] * row_bytes[0]
        num_bytes += self._kv_rows[self._source] * kv_heads[place] * row_bytes[1]
        found: Ints = self._scene.sizes.batch * num_bytes
        return found


def bytes_there(scene: Scene) -> tuple[int, int]:
    """Returns what goes to whoever computes a head, in bytes of a row of (a query head, a kv head)."""
    s = scene.sizes
    both = s.head_dim + s.v_head_dim
    query = both * s.itemsize + 2 * s.sum_itemsize if scene.phase.is_backward else s.head_dim * s.itemsize
    return query, both * s.itemsize


def bytes_back(scene: Scene, replicated: bool) -> tuple[int, int]:
    """Returns what comes back of it, in the same bytes.

    Args:
        scene: the direction.
        replicated: whether some kv head is computed in several places.
    """
    s, (of_query, of_kv) = scene.sizes, scene.wanted
    if not scene.phase.is_backward:
        return s.v_head_dim * s.itemsize + s.sum_itemsize, 0
    item = s.sum_itemsize if replicated else s.itemsize
    return s.head_dim * s.itemsize if of_query else 0, (s.head_dim + s.v_head_dim) * item if of_kv else 0
