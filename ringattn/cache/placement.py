"""Placement: decides which rank stores which new tokens, before any page is taken."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ringattn.cache.page_tables import PageTable, SequenceState
from ringattn.errors import OutOfPagesError
from ringattn.geometry.layout import Layout
from ringattn.types import Ints


class PoolView(Protocol):
    """The part of `PagePools` that placement reads."""

    world_size: int
    page_size: int

    def num_free(self, rank: int) -> int: ...

    def num_users(self, rank: int, page: int) -> int: ...


class PlacementPlanner:
    """Assigns the new tokens of several sequences to ranks, and counts the free pages that this leaves.

    It changes neither pools nor tables, so a failed plan leaves the cache as it was.

    Args:
        pools: the pools as they are.
    """

    def __init__(self, pools: PoolView) -> None:
        self._pools = pools
        self._page_size = pools.page_size
        self._num_free = [pools.num_free(rank) for rank in range(pools.world_size)]
        # How many tables will have copied a shared page instead of using it, by (rank, page).
        self._num_copies: dict[tuple[int, int], int] = {}
        self.fill_ranks: list[int | None] = []  # for each sequence: see SequenceState

    def place_by_layout(self, state: SequenceState, layout: Layout) -> list[Ints]:
        """Returns for each rank the new tokens that the layout gives it, counted from the first new token.

        Raises:
            OutOfPagesError: if a rank has too few free pages.
        """
        self.fill_ranks.append(None)
        for rank, table in enumerate(state.tables):
            count = layout.num_tokens(rank)
            needed = self._needs_copy(rank, table) if count else 0
            needed += -(-max(0, count - table.num_free_slots) // self._page_size)
            if needed > self._num_free[rank]:
                raise OutOfPagesError(
                    f"rank {rank} has {self._num_free[rank]} free pages of {self._page_size} tokens, but {count} new "
                    f"tokens by {layout} need {needed}; free, truncate or evict sequences, or make num_pages larger"
                )
            self._take_pages(rank, table, needed, count)
        return [layout.positions(rank) for rank in range(layout.world_size)]

    def place_evenly(self, state: SequenceState, num_tokens: int) -> list[Ints]:
        """Returns for each rank the new tokens that it stores, counted from the first new token.

        The rank with the fewest tokens of the sequence is filled first, until its last page is full.

        Raises:
            OutOfPagesError: if the ranks together have too few free pages.
        """
        parts: list[list[Ints]] = [[] for _ in state.tables]
        free_slots = [table.num_free_slots for table in state.tables]
        untouched = [True] * len(free_slots)  # no new token on this rank yet: its last page may need a copy
        counts = [table.num_tokens for table in state.tables]
        done, rank = 0, state.fill_rank
        while done < num_tokens:
            copies = [int(untouched[r]) * self._needs_copy(r, state.tables[r]) for r in range(len(free_slots))]
            candidates = [r for r in range(len(free_slots)) if self._num_free[r] >= (copies[r] if free_slots[r] else 1)]
            if not candidates:
                raise OutOfPagesError(
                    f"no rank has a free page of {self._page_size} tokens for {num_tokens - done} of {num_tokens} new "
                    "tokens; free, truncate or evict sequences, or make num_pages larger"
                )
            if rank not in candidates or not free_slots[rank]:
                rank = min(candidates, key=lambda r: (counts[r], -self._num_free[r], r))
            needed = copies[rank] if free_slots[rank] else 1
            free_slots[rank] = free_slots[rank] or self._page_size
            count = min(free_slots[rank], num_tokens - done)
            self._take_pages(rank, state.tables[rank], needed, count if untouched[rank] else 0)
            parts[rank].append(np.arange(done, done + count, dtype=np.int64))
            done += count
            free_slots[rank], counts[rank], untouched[rank] = free_slots[rank] - count, counts[rank] + count, False
        self.fill_ranks.append(rank)
        return [concatenate(part) for part in parts]

    def _needs_copy(self, rank: int, table: PageTable) -> int:
        """Returns 1 if the next token goes to a page that other tables use too, else 0."""
        if not table.num_free_slots:
            return 0
        page = table.pages[-1]
        return int(self._pools.num_users(rank, page) - self._num_copies.get((rank, page), 0) > 1)

    def _take_pages(self, rank: int, table: PageTable, needed: int, count: int) -> None:
        """Counts `needed` pages of a rank as taken, for `count` tokens after the last token of a table."""
        if count and self._needs_copy(rank, table):
            page = rank, table.pages[-1]
            self._num_copies[page] = self._num_copies.get(page, 0) + 1
        self._num_free[rank] -= needed


def concatenate(parts: list[Ints]) -> Ints:
    """Returns the concatenation; empty if there are no parts."""
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
