"""The timetable of spread heads: an all-to-all there, the exchange for fewer heads of more rows, an all-to-all back."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ringattn.geometry.exchanges import Exchange
from ringattn.geometry.heads import Share, shares_of
from ringattn.geometry.layout import Ints
from ringattn.geometry.spread import replicates, united
from ringattn.geometry.timetable import BEFORE, Draft, Timetable
from ringattn.geometry.timetables import Scene, write_exchange


def spread_timetable_for(exchange: Exchange, scene: Scene, num_groups: int, stages: int) -> Timetable:
    """Returns the timetable of heads spread over the ranks of each group, and an exchange between the groups.

    Args:
        exchange: between the groups, each holding the rows of its ranks.
        scene: the direction, of all ranks.
        num_groups: 1 if all ranks make one group; groups are of consecutive ranks.
        stages: parts of each rank's heads.
    """
    draft = Draft(scene.layout.world_size)
    all_shares = shares_of(scene.sizes.heads, scene.sizes.kv_heads, scene.layout.world_size // num_groups, stages)
    trades = _Trades(draft, scene, num_groups, replicates(all_shares))
    layout, _ = united(scene.layout, num_groups)
    kv_layout, _ = united(scene.kv_layout, num_groups)
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
        self._replicated = replicated
        self._draft, self._sizes, self._wanted = draft, scene.sizes, scene.wanted
        self._backward = scene.phase.is_backward
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

    def there(self, step: int, shares: tuple[Share, ...]) -> _Trade:
        """Everyone's rows go to those who compute the heads."""
        s = self._sizes
        both = s.head_dim + s.v_head_dim
        q_bytes = both * s.itemsize + 2 * s.sum_itemsize if self._backward else s.head_dim * s.itemsize
        heads, kv_heads = self._heads(shares, self._target)
        sent = self._rows[self._source] * heads * q_bytes + self._kv_rows[self._source] * kv_heads * both * s.itemsize
        return self._post(step, self._source, self._target, s.batch * sent)

    def back(self, step: int, shares: tuple[Share, ...]) -> _Trade:
        """What was computed goes to those whose rows it is."""
        s = self._sizes
        heads, kv_heads = self._heads(shares, self._target)
        if self._backward:
            q_bytes = s.head_dim * s.itemsize if self._wanted[0] else 0
            kv_item = s.sum_itemsize if self._replicated else s.itemsize
            kv_bytes = (s.head_dim + s.v_head_dim) * kv_item if self._wanted[1] else 0
        else:
            q_bytes, kv_bytes = s.v_head_dim * s.itemsize + s.sum_itemsize, 0
        sent = self._rows[self._source] * heads * q_bytes + self._kv_rows[self._source] * kv_heads * kv_bytes
        return self._post(step, self._target, self._source, s.batch * sent)

    def arrive(self, step: int, trade: _Trade) -> None:
        """Everyone waits for what comes to them, and for what they sent, and copies it into place."""
        self._draft.wait(step, BEFORE, trade.target, trade.number, trade.num_bytes)
        self._draft.wait(step, BEFORE, trade.source, trade.number)

    def _post(self, step: int, source: Ints, target: Ints, num_bytes: Ints) -> _Trade:
        packed = np.bincount(source, weights=num_bytes, minlength=len(self._rank)).astype(np.int64)
        self._draft.pack(step, self._rank, packed, step + 1)
        return _Trade(source, target, num_bytes, self._draft.message(step, source, target, num_bytes, step + 1))

    def _heads(self, shares: tuple[Share, ...], rank: Ints) -> tuple[Ints, Ints]:
        """How many heads, and kv heads, these ranks compute."""
        place = rank % self.width
        heads, kv_heads = (np.array([len(s.heads) for s in shares]), np.array([len(s.kv_heads) for s in shares]))
        return heads[place], kv_heads[place]
