"""Page pools and page tables of all ranks: which rank stores which token, and in which slot. Integers only.

Each rank has a pool of pages, and each page has `page_size` slots for tokens. A sequence has a page table on every
rank: its pages there, and the global position of the token in each slot. So tokens may lie on any rank in any order:
what a query sees, and what truncation and eviction remove, follow from the positions alone. A slot that was never
filled, or whose token was removed, has position EMPTY_SLOT.

Every rank keeps the tables of all ranks and applies the same operations to them. So all ranks agree where tokens go,
and whether there is room, without communication. Sequences may share pages, which are counted; a shared page is copied
before a token is written to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ringattn.cache.page_tables import EMPTY_SLOT, PageTable, Positions, SequenceState, table_from_pages
from ringattn.cache.placement import PlacementPlanner, concatenate
from ringattn.errors import ArgumentError, OutOfPagesError, SequenceError, check_integer
from ringattn.geometry.layout import Layout, check_layout
from ringattn.types import Ints


@dataclass(frozen=True, eq=False)
class SlotAllocation:
    """Slots for new tokens of one or more sequences, whose keys and values are still to be written.

    Args:
        sequences: the sequences.
        starts: for each sequence, the position of its first new token.
        num_tokens: the number of new tokens of each sequence.
        layout: which rank computes which new tokens; None if every rank computes all of them.
        rows: for each rank, the rows that it stores, among the tokens that it computes, sequence by sequence.
        slot_indices: for each rank, the slot of each of these rows in its pool: page * page_size + slot.
        page_copies: (rank, source page, target page): shared pages to copy before anything is written.
        versions: for each sequence, its version after the allocation; a later change makes the allocation stale.
    """

    sequences: tuple[int, ...]
    starts: tuple[int, ...]
    num_tokens: int
    layout: Layout | None
    rows: tuple[Ints, ...]
    slot_indices: tuple[Ints, ...]
    page_copies: tuple[tuple[int, int, int], ...]
    versions: tuple[int, ...]


@dataclass(frozen=True)
class PageMove:
    """A page that moves from one pool to another."""

    from_rank: int
    from_page: int
    to_rank: int
    to_page: int


class PagePools:
    """The page pools of all ranks, and the page tables of all sequences.

    Args:
        world_size: the number of ranks.
        num_pages: pages in the pool of each rank.
        page_size: slots per page.
    Raises:
        ArgumentError: if one of them is not a positive integer.
    """

    def __init__(self, world_size: int, num_pages: int, page_size: int) -> None:
        for name, value in (("world_size", world_size), ("num_pages", num_pages), ("page_size", page_size)):
            check_integer(name, value, 1)
        self.world_size, self.num_pages, self.page_size = world_size, num_pages, page_size
        # Low pages are taken first, so the end of a pool that is never full is never touched.
        self._free_pages = [list(range(num_pages - 1, -1, -1)) for _ in range(world_size)]
        self._num_users = [[0] * num_pages for _ in range(world_size)]
        self._states: dict[int, SequenceState] = {}
        self._next_sequence = 0
        self._history = b""

    @property
    def sequences(self) -> tuple[int, ...]:
        """All sequences in the pools."""
        return tuple(self._states)

    @property
    def next_sequence(self) -> int:
        """The number that the next new sequence gets."""
        return self._next_sequence

    @property
    def history_digest(self) -> int:
        """A digest of 63 bits of all operations so far, in order; equal on all ranks that made the same calls."""
        return int.from_bytes(self._history, "little") >> 1

    @property
    def history_digest32(self) -> int:
        """The first 32 bits of the same digest, as a signed integer."""
        return int.from_bytes(self._history[:4], "little", signed=True)

    def num_free(self, rank: int) -> int:
        """Returns the number of free pages of a rank."""
        return len(self._free_pages[rank])

    def num_users(self, rank: int, page: int) -> int:
        """Returns the number of page tables that list a page."""
        return self._num_users[rank][page]

    def length(self, sequence: int) -> int:
        """Returns the position of the next token: the number of tokens so far, evicted tokens included."""
        return self._state(sequence).length

    def table(self, sequence: int, rank: int) -> PageTable:
        """Returns the page table of a sequence on a rank; the caller must not change it."""
        return self._state(sequence).tables[rank]

    def layout(self, sequence: int) -> Layout:
        """Returns which rank stores which positions of a sequence, in ascending order on each rank."""
        ranges = tuple(_ranges_of(table.stored_tokens()[0]) for table in self._state(sequence).tables)
        length = self.length(sequence)
        return Layout(length, ranges, f"sequence {sequence} of {length}", whole=False)

    def new(self) -> int:
        """Returns a new sequence without tokens."""
        self._record("new")
        sequence, self._next_sequence = self._next_sequence, self._next_sequence + 1
        self._states[sequence] = SequenceState([PageTable(self.page_size) for _ in range(self.world_size)])
        return sequence

    def extend(self, sequences: Sequence[int], tokens: int | Layout) -> SlotAllocation:
        """Allocates slots for new tokens of every sequence: for all tokens, or for none.

        Args:
            sequences: the sequences, each once.
            tokens: the number of new tokens of each, if every rank computes all of them; each page of tokens goes to
                the rank with the fewest tokens of the sequence. Or a layout of the new tokens, each of which stays on
                the rank that computes it.
        Raises:
            OutOfPagesError: if there are too few free pages; nothing has changed then.
            SequenceError, LayoutError, ArgumentError: if an argument is not valid.
        """
        states = [self._state(sequence) for sequence in sequences]
        if len(set(sequences)) < len(states) or not states:
            raise SequenceError(f"sequences={list(sequences)}: must be one or more, each of them once")
        layout = None
        if isinstance(tokens, Layout):
            layout = check_layout(tokens, "tokens", self.world_size)
            num_tokens = layout.seq_len
        else:
            num_tokens = check_integer("tokens", tokens, 0)
        if max(state.length for state in states) + num_tokens >= 1 << 31:
            raise ArgumentError(f"tokens={tokens}: positions must stay below {1 << 31:,}")
        planner = PlacementPlanner(self)
        parts = [
            planner.place_evenly(state, num_tokens) if layout is None else planner.place_by_layout(state, layout)
            for state in states
        ]
        self._record("extend", tuple(sequences), num_tokens if layout is None else layout.digest)
        return self._allocate(tuple(sequences), num_tokens, layout, parts, planner.fill_ranks)

    def fork(self, sequence: int) -> int:
        """Returns a new sequence with the same tokens, which shares all pages."""
        state = self._state(sequence)
        self._record("fork", sequence)
        state.version += 1  # an allocation still to be written to would write to the pages of both sequences
        for rank, table in enumerate(state.tables):
            for page in table.pages:
                self._num_users[rank][page] += 1
        forked, self._next_sequence = self._next_sequence, self._next_sequence + 1
        self._states[forked] = SequenceState([table.copy() for table in state.tables], state.length, state.fill_rank)
        return forked

    def truncate(self, sequence: int, length: int) -> None:
        """Removes the tokens from position `length` on.

        Raises:
            SequenceError: if the sequence is shorter.
        """
        state = self._state(sequence)
        if check_integer("length", length, 0) > state.length:
            raise SequenceError(f"length={length}: sequence {sequence} has only {state.length} tokens")
        self._record("truncate", sequence, length)
        self._remove_tokens(state, length, state.length)
        state.length = length

    def evict(self, sequence: int, sinks: int, window: int) -> None:
        """Removes all tokens but the first `sinks` and the last `window`; the others keep their positions."""
        state = self._state(sequence)
        check_integer("sinks", sinks, 0)
        check_integer("window", window, 0)
        self._record("evict", sequence, sinks, window)
        self._remove_tokens(state, sinks, state.length - window)

    def free(self, sequence: int) -> None:
        """Removes a sequence; pages that no other sequence shares become free."""
        state = self._state(sequence)
        self._record("free", sequence)
        for rank, table in enumerate(state.tables):
            self._release_pages(rank, table.pages)
        del self._states[sequence]

    def add_to_history(self, text: str) -> None:
        """Includes a text in the history digest, so that ranks with another text are found to disagree."""
        self._record("add_to_history", text)

    def is_current(self, extension: SlotAllocation) -> bool:
        """Returns whether none of the sequences of an allocation has changed since."""
        return all(
            sequence in self._states and self._states[sequence].version == version
            for sequence, version in zip(extension.sequences, extension.versions, strict=True)
        )

    def resharded(self, world_size: int, num_pages: int) -> tuple[PagePools, tuple[PageMove, ...]]:
        """Returns pools with the same sequences over other ranks, and the move of each page in use.

        The pages of a sequence are distributed round-robin, in order of their first positions. Sequences keep sharing
        the pages that they share.

        Raises:
            OutOfPagesError: if the pages do not fit.
        """
        target = PagePools(world_size, num_pages, self.page_size)
        used = sum(self.num_pages - len(free) for free in self._free_pages)
        if used > world_size * num_pages:
            raise OutOfPagesError(f"num_pages={num_pages}: {used} pages are in use, for {world_size} ranks")
        moves: dict[tuple[int, int], PageMove] = {}
        next_rank = 0
        for sequence, state in self._states.items():
            pages = [
                (_first_position(positions), rank, page, positions)
                for rank, table in enumerate(state.tables)
                for page, positions in zip(table.pages, table.positions, strict=True)
            ]
            parts: list[list[tuple[int, Positions]]] = [[] for _ in range(world_size)]
            for _, rank, page, positions in sorted(pages, key=lambda entry: entry[:3]):
                if (rank, page) not in moves:
                    while not target._free_pages[next_rank % world_size]:
                        next_rank += 1
                    to = next_rank % world_size
                    moves[rank, page] = PageMove(rank, page, to, target._free_pages[to].pop())
                    next_rank += 1
                move = moves[rank, page]
                target._num_users[move.to_rank][move.to_page] += 1
                parts[move.to_rank].append((move.to_page, positions))
            tables = [table_from_pages(self.page_size, part) for part in parts]
            target._states[sequence] = SequenceState(tables, state.length)
        target._next_sequence, target._history = self._next_sequence, self._history
        target._record("reshard", world_size, num_pages)
        return target, tuple(moves.values())

    def restore(self, next_sequence: int, sequences: dict[int, tuple[int, list[PageTable]]]) -> None:
        """Fills empty pools with saved sequences: (length, page table on each rank) by sequence."""
        for sequence, (length, tables) in sequences.items():
            self._states[sequence] = SequenceState(tables, length)
            for rank, table in enumerate(tables):
                for page in table.pages:
                    self._num_users[rank][page] += 1
        self._free_pages = [
            [page for page in range(self.num_pages - 1, -1, -1) if not users[page]] for users in self._num_users
        ]
        self._next_sequence = next_sequence
        self._record("restore", next_sequence, *((s, length) for s, (length, _) in sequences.items()))

    def _state(self, sequence: int) -> SequenceState:
        if not isinstance(sequence, int) or sequence not in self._states:
            raise SequenceError(f"sequence={sequence!r}: the cache has no sequence of this number")
        return self._states[sequence]

    def _allocate(
        self,
        sequences: tuple[int, ...],
        num_tokens: int,
        layout: Layout | None,
        parts: list[list[Ints]],
        fill_ranks: list[int | None],
    ) -> SlotAllocation:
        """Takes slots for new tokens: for each sequence and rank, `parts` lists the tokens; there is room for all."""
        states = [self._states[sequence] for sequence in sequences]
        rows: list[list[Ints]] = [[] for _ in range(self.world_size)]
        slot_indices: list[list[Ints]] = [[] for _ in range(self.world_size)]
        page_copies: list[tuple[int, int, int]] = []
        for index, (state, by_rank) in enumerate(zip(states, parts, strict=True)):
            for rank, tokens in enumerate(by_rank):
                if not len(tokens):
                    continue
                page_copies += self._reserve_slots(rank, state.tables[rank], len(tokens))
                # A rank computes all new tokens of a sequence, or the ones that the layout gives it.
                rows_per_sequence = num_tokens if layout is None else len(tokens)
                own = tokens if layout is None else np.arange(len(tokens), dtype=np.int64)
                rows[rank].append(index * rows_per_sequence + own)
                slot_indices[rank].append(state.tables[rank].append(state.length + tokens))
        starts = tuple(state.length for state in states)
        for state, fill_rank in zip(states, fill_ranks, strict=True):
            state.length += num_tokens
            state.fill_rank = fill_rank
            state.version += 1
        return SlotAllocation(
            sequences=sequences,
            starts=starts,
            num_tokens=num_tokens,
            layout=layout,
            rows=tuple(map(concatenate, rows)),
            slot_indices=tuple(map(concatenate, slot_indices)),
            page_copies=tuple(page_copies),
            versions=tuple(state.version for state in states),
        )

    def _reserve_slots(self, rank: int, table: PageTable, count: int) -> list[tuple[int, int, int]]:
        """Gives a table pages until it has `count` free slots; returns the copy of its last page, if that is shared."""
        page_copies = []
        if table.num_free_slots and self._num_users[rank][table.pages[-1]] > 1:
            source, target = table.pages[-1], self._take_page(rank)
            table.pages[-1] = target
            self._release_pages(rank, [source])
            page_copies.append((rank, source, target))
        while table.num_free_slots < count:
            table.pages.append(self._take_page(rank))
        return page_copies

    def _take_page(self, rank: int) -> int:
        page = self._free_pages[rank].pop()
        self._num_users[rank][page] = 1
        return page

    def _release_pages(self, rank: int, pages: Sequence[int]) -> None:
        for page in reversed(pages):
            self._num_users[rank][page] -= 1
            if not self._num_users[rank][page]:
                self._free_pages[rank].append(page)

    def _remove_tokens(self, state: SequenceState, start: int, stop: int) -> None:
        state.version += 1
        if start < stop:
            for rank, table in enumerate(state.tables):
                self._release_pages(rank, table.remove(start, stop))

    def _record(self, *operation: object) -> None:
        """Includes an operation and its arguments in the history digest."""
        self._history = hashlib.blake2b(self._history + repr(operation).encode(), digest_size=8).digest()


def _first_position(positions: Positions) -> int:
    return int(positions[positions != EMPTY_SLOT].min())


def _ranges_of(positions: Ints) -> tuple[range, ...]:
    """Returns ascending positions as ranges."""
    if not len(positions):
        return ()
    cuts = np.flatnonzero(np.diff(positions) != 1) + 1
    starts, stops = np.append(0, cuts), np.append(cuts, len(positions))
    return tuple(map(range, positions[starts].tolist(), (positions[stops - 1] + 1).tolist()))
