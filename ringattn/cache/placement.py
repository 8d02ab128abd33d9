"""Placement: which rank takes which new tokens, decided before anything is taken."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ringattn.cache.page_tables import RankTable, SequenceState
from ringattn.errors import OutOfPagesError
from ringattn.geometry.layout import Layout
from ringattn.types import Ints


class PoolView(Protocol):
    """What placement asks of the pools."""

    world_size: int
    page_size: int

    def num_free(self, rank: int) -> int: ...

    def num_users(self, rank: int, page: int) -> int: ...


class PlacementPlanner:
    """What is left of the pools while it is decided where tokens go; nothing is taken yet."""

    def __init__(self, pools: PoolView) -> None:
        self._page_size = pools.page_size
        self._left = [pools.num_free(rank) for rank in range(pools.world_size)]
        self._pools = pools
        self.ends: list[int | None] = []  # of each sequence: the rank that its last token goes to
        self._copied: dict[tuple[int, int], int] = {}  # how many users of a page will have copied it

    def laid(self, chain: SequenceState, layout: Layout) -> list[Ints]:
        """Returns each rank's share of new tokens: what it computes."""
        self.ends.append(None)
        for rank, table in enumerate(chain.tables):
            count = layout.num_tokens(rank)
            needed = self._copy_needed(rank, table) if count else 0
            needed += -(-max(0, count - table.room) // self._page_size)
            if needed > self._left[rank]:
                raise OutOfPagesError(
                    f"rank {rank} has {self._left[rank]} free pages of {self._page_size} tokens, but {count} new ones "
                    f"by {layout} need {needed}; free, truncate or evict sequences, or make num_pages larger"
                )
            self._spend(rank, table, needed, count)
        return [layout.positions(rank) for rank in range(layout.world_size)]

    def dealt(self, chain: SequenceState, num_tokens: int) -> list[Ints]:
        """Returns each rank's share of new tokens: a page at a time to the rank that has the fewest."""
        shares: list[list[Ints]] = [[] for _ in chain.tables]
        room = [table.room for table in chain.tables]
        fresh = [True] * len(room)  # no token has gone there yet, so the last page may still need a copy
        held = [table.num_tokens for table in chain.tables]
        done, at = 0, chain.at
        while done < num_tokens:
            copies = [int(fresh[r]) * self._copy_needed(r, chain.tables[r]) for r in range(len(room))]
            open_ = [r for r in range(len(room)) if self._left[r] >= (copies[r] if room[r] else 1)]
            if not open_:
                raise OutOfPagesError(
                    f"no rank has a free page of {self._page_size} tokens for {num_tokens - done} of {num_tokens} new "
                    "tokens; free, truncate or evict sequences, or make num_pages larger"
                )
            if at not in open_ or not room[at]:
                at = min(open_, key=lambda r: (held[r], -self._left[r], r))
            needed = copies[at] if room[at] else 1
            room[at] = room[at] or self._page_size
            count = min(room[at], num_tokens - done)
            self._spend(at, chain.tables[at], needed, count if fresh[at] else 0)
            shares[at].append(np.arange(done, done + count, dtype=np.int64))
            done, room[at], held[at], fresh[at] = done + count, room[at] - count, held[at] + count, False
        self.ends.append(at)
        return [concatenate(share) for share in shares]

    def _copy_needed(self, rank: int, table: RankTable) -> int:
        if not table.room:
            return 0
        page = table.pages[-1]
        return int(self._pools.num_users(rank, page) - self._copied.get((rank, page), 0) > 1)

    def _spend(self, rank: int, table: RankTable, needed: int, count: int) -> None:
        if count and self._copy_needed(rank, table):
            page = rank, table.pages[-1]
            self._copied[page] = self._copied.get(page, 0) + 1
        self._left[rank] -= needed


def concatenate(parts: list[Ints]) -> Ints:
    """Returns them one after the other."""
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
