"""Page tables: the pages of one sequence on one rank, and the global position of the token in each slot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ringattn.types import Ints

Positions = npt.NDArray[np.int32]

EMPTY_SLOT = -1


class PageTable:
    """The pages of one sequence on one rank. Only `PagePools` changes it.

    Slots are filled in order; a slot whose token was truncated or evicted has position EMPTY_SLOT. The slots after the
    last token are free.

    Args:
        page_size: slots per page.
        pages: indices into the rank's pool, in order of the slots.
        positions: the global position of the token in each filled slot, or EMPTY_SLOT; (filled slots,) int32.
    """

    def __init__(self, page_size: int, pages: Sequence[int] = (), positions: Positions | None = None) -> None:
        self.pages = list(pages)
        self._page_size = page_size
        self._positions = np.empty(0, dtype=np.int32) if positions is None else positions.astype(np.int32)
        self._num_filled = len(self._positions)
        self.num_tokens = int((self._positions != EMPTY_SLOT).sum())

    @property
    def num_free_slots(self) -> int:
        """The number of slots after the last token, in the pages that the table has."""
        return len(self.pages) * self._page_size - self._num_filled

    @property
    def positions(self) -> Positions:
        """The global position of the token in each slot of each page, or EMPTY_SLOT; (pages, page_size) int32."""
        found = np.full((len(self.pages), self._page_size), EMPTY_SLOT, dtype=np.int32)
        found.reshape(-1)[: self._num_filled] = self._positions[: self._num_filled]
        return found

    def stored_tokens(self) -> tuple[Ints, Ints]:
        """Returns (positions, slot indices) of the stored tokens, in ascending order of position.

        A slot index counts the slots of the rank's whole pool: page * page_size + slot.
        """
        positions = self._positions[: self._num_filled]
        used = np.flatnonzero(positions != EMPTY_SLOT)
        used = used[np.argsort(positions[used], kind="stable")]
        return positions[used].astype(np.int64), self._slot_indices(used)

    def append(self, positions: Ints) -> Ints:
        """Stores tokens at these positions in the next free slots; returns their slot indices.

        The table must have enough free slots.
        """
        first, self._num_filled = self._num_filled, self._num_filled + len(positions)
        if self._num_filled > len(self._positions):
            grown = np.empty(max(self._num_filled, 2 * len(self._positions)), dtype=np.int32)
            grown[:first] = self._positions[:first]
            self._positions = grown
        self._positions[first : self._num_filled] = positions
        self.num_tokens += len(positions)
        return self._slot_indices(np.arange(first, self._num_filled, dtype=np.int64))

    def remove(self, start: int, stop: int) -> list[int]:
        """Removes the tokens at positions start <= p < stop; returns the emptied pages, which leave the table."""
        positions = self._positions[: self._num_filled]
        positions[(positions >= start) & (positions < stop)] = EMPTY_SLOT
        used = np.flatnonzero(positions != EMPTY_SLOT)
        self._num_filled, self.num_tokens = int(used[-1]) + 1 if len(used) else 0, len(used)
        keep = np.zeros(len(self.pages), dtype=bool)
        keep[used // self._page_size] = True
        if keep.all():
            return []
        in_kept_pages = np.repeat(keep, self._page_size)[: self._num_filled]
        self._positions = positions[: self._num_filled][in_kept_pages]
        self._num_filled = len(self._positions)
        emptied = [page for page, kept in zip(self.pages, keep.tolist(), strict=True) if not kept]
        self.pages = [page for page, kept in zip(self.pages, keep.tolist(), strict=True) if kept]
        return emptied

    def copy(self) -> PageTable:
        """Returns a table of the same pages and positions, which changes independently."""
        return PageTable(self._page_size, self.pages, self._positions[: self._num_filled].copy())

    def _slot_indices(self, slots: Ints) -> Ints:
        """Returns the slot indices in the pool of slots that are numbered within this table."""
        pages = np.array(self.pages, dtype=np.int64)
        found: Ints = pages[slots // self._page_size] * self._page_size + slots % self._page_size
        return found


class SequenceState:
    """One sequence of the cache.

    Args:
        tables: its page table on each rank.
        length: the position of its next token.
        fill_rank: the rank that receives decoded tokens until its last page is full; None if no token was decoded.
    """

    def __init__(self, tables: list[PageTable], length: int = 0, fill_rank: int | None = None) -> None:
        self.tables = tables
        self.length = length
        self.fill_rank = fill_rank
        self.version = 0  # counts the changes


def table_from_pages(page_size: int, pages: list[tuple[int, Positions]]) -> PageTable:
    """Returns a table of pages, each given as (index, position of each slot); slots after the last token are free."""
    positions = np.concatenate([each for _, each in pages]) if pages else np.empty(0, dtype=np.int32)
    used = np.flatnonzero(positions != EMPTY_SLOT)
    num_filled = used[-1] + 1 if len(used) else 0
    return PageTable(page_size, [page for page, _ in pages], positions[:num_filled])
