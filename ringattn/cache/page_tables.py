"""Tables: which pages of a rank hold a sequence, and the position of each of their slots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ringattn.types import Ints

Positions = npt.NDArray[np.int32]

EMPTY_SLOT = -1


class RankTable:
    """One sequence on one rank: its pages, and the position of each slot in them. `Pages` alone changes it.

    Args:
        page_size: slots of a page.
        pages: in the order of the slots.
        slots: the position of each slot used so far; those after them in the last page are room.
    """

    def __init__(self, page_size: int, pages: Sequence[int] = (), slots: Positions | None = None) -> None:
        self.pages = list(pages)
        self._page_size = page_size
        self._slots = np.empty(0, dtype=np.int32) if slots is None else slots.astype(np.int32)
        self._num_slots = len(self._slots)
        self.num_tokens = int((self._slots != EMPTY_SLOT).sum())

    @property
    def room(self) -> int:
        """How many more slots the last page has."""
        return len(self.pages) * self._page_size - self._num_slots

    @property
    def slots(self) -> Positions:
        """The position of every slot of every page, (pages, page_size) int32."""
        found = np.full((len(self.pages), self._page_size), EMPTY_SLOT, dtype=np.int32)
        found.reshape(-1)[: self._num_slots] = self._slots[: self._num_slots]
        return found

    def held(self) -> tuple[Ints, Ints]:
        """Returns the positions held here, ascending, and the place of each in the pool: page * page_size + slot."""
        slots = self._slots[: self._num_slots]
        used = np.flatnonzero(slots != EMPTY_SLOT)
        used = used[np.argsort(slots[used], kind="stable")]
        return slots[used].astype(np.int64), self.places(used)

    def places(self, slots: Ints) -> Ints:
        """Returns where in the pool these slots are."""
        pages = np.array(self.pages, dtype=np.int64)
        found: Ints = pages[slots // self._page_size] * self._page_size + slots % self._page_size
        return found

    def append(self, positions: Ints) -> Ints:
        """Takes the next slots for these positions, for which there are pages; returns where in the pool they are."""
        first, self._num_slots = self._num_slots, self._num_slots + len(positions)
        if self._num_slots > len(self._slots):
            grown = np.empty(max(self._num_slots, 2 * len(self._slots)), dtype=np.int32)
            grown[:first] = self._slots[:first]
            self._slots = grown
        self._slots[first : self._num_slots] = positions
        self.num_tokens += len(positions)
        return self.places(np.arange(first, self._num_slots, dtype=np.int64))

    def drop(self, first: int, stop: int) -> list[int]:
        """Forgets the positions first <= p < stop; returns the pages that hold nothing any more."""
        slots = self._slots[: self._num_slots]
        slots[(slots >= first) & (slots < stop)] = EMPTY_SLOT
        used = np.flatnonzero(slots != EMPTY_SLOT)
        self._num_slots, self.num_tokens = int(used[-1]) + 1 if len(used) else 0, len(used)
        keep = np.zeros(len(self.pages), dtype=bool)
        keep[used // self._page_size] = True
        if keep.all():
            return []
        rest = np.repeat(keep, self._page_size)[: self._num_slots]
        self._slots = slots[: self._num_slots][rest]
        self._num_slots = len(self._slots)
        gone = [page for page, kept in zip(self.pages, keep.tolist(), strict=True) if not kept]
        self.pages = [page for page, kept in zip(self.pages, keep.tolist(), strict=True) if kept]
        return gone

    def copy(self) -> RankTable:
        """Returns a table of the same pages."""
        return RankTable(self._page_size, self.pages, self._slots[: self._num_slots].copy())


class SequenceState:
    """One sequence: its table on every rank."""

    def __init__(self, tables: list[RankTable], length: int = 0, at: int | None = None) -> None:
        self.tables = tables
        self.length = length  # the position of the next token
        self.at = at  # the rank that decoded tokens go to until its page is full
        self.version = 0


def make_table(page_size: int, held: list[tuple[int, Positions]]) -> RankTable:
    """Returns a table of these pages; what is not used at its end is room."""
    slots = np.concatenate([slots for _, slots in held]) if held else np.empty(0, dtype=np.int32)
    used = np.flatnonzero(slots != EMPTY_SLOT)
    return RankTable(page_size, [page for page, _ in held], slots[: used[-1] + 1 if len(used) else 0])
