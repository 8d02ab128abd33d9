"""What a cache should hold, as plain lists: the model that random programs are held against."""

from __future__ import annotations

from collections import Counter

from ringattn.cache.page_tables import EMPTY_SLOT
from ringattn.cache.pages import PagePools


def check_invariants(pages: PagePools) -> None:
    """Every page is free or used, by just the tables that list it; no position is held twice by a sequence."""
    for rank in range(pages.world_size):
        listed = Counter(page for s in pages.sequences for page in pages.table(s, rank).pages)
        assert all(count == pages.num_users(rank, page) for page, count in listed.items())
        assert pages.num_free(rank) + len(listed) == pages.num_pages
        assert all(not pages.num_users(rank, page) for page in set(range(pages.num_pages)) - set(listed))
        for sequence in pages.sequences:
            table = pages.table(sequence, rank)
            assert len(table.pages) == len(set(table.pages))
            assert table.num_tokens == int((table.slots != EMPTY_SLOT).sum())
            assert all((row != EMPTY_SLOT).any() for row in table.slots)


def held(pages: PagePools, sequence: int) -> dict[int, tuple[int, int]]:
    """Returns where each position of a sequence is: (rank, place)."""
    found: dict[int, tuple[int, int]] = {}
    for rank in range(pages.world_size):
        positions, places = pages.table(sequence, rank).held()
        for position, place in zip(positions.tolist(), places.tolist(), strict=True):
            assert position not in found
            found[position] = rank, place
    return found
