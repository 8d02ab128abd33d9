"""The model of a cache, as plain dictionaries, against which random programs are checked."""

from __future__ import annotations

from collections import Counter

from ringattn.cache.page_tables import EMPTY_SLOT
from ringattn.cache.pages import PagePools


def check_invariants(pages: PagePools) -> None:
    """Every page is free or in the tables that list it; no sequence stores a position twice."""
    for rank in range(pages.world_size):
        listed = Counter(page for s in pages.sequences for page in pages.table(s, rank).pages)
        assert all(count == pages.num_users(rank, page) for page, count in listed.items())
        assert pages.num_free(rank) + len(listed) == pages.num_pages
        assert all(not pages.num_users(rank, page) for page in set(range(pages.num_pages)) - set(listed))
        for sequence in pages.sequences:
            table = pages.table(sequence, rank)
            assert len(table.pages) == len(set(table.pages))
            assert table.num_tokens == int((table.positions != EMPTY_SLOT).sum())
            assert all((row != EMPTY_SLOT).any() for row in table.positions)


def slot_of_position(pages: PagePools, sequence: int) -> dict[int, tuple[int, int]]:
    """Returns for each stored position of a sequence (rank, slot index)."""
    found: dict[int, tuple[int, int]] = {}
    for rank in range(pages.world_size):
        positions, slots = pages.table(sequence, rank).stored_tokens()
        for position, slot in zip(positions.tolist(), slots.tolist(), strict=True):
            assert position not in found
            found[position] = rank, slot
    return found
