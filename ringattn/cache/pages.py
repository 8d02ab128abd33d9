"""Pages: which rank keeps which tokens, and where. Integers only, and the same on every rank.

Each rank has a pool of pages, and each page has slots for `page_size` tokens. A sequence has a table on every rank:
its pages there, and the global position of each of their slots. So tokens may lie anywhere, in any order, and
what a query sees, what is rolled back and what is evicted all follow from positions alone. A slot that holds nothing
of the sequence, because it was never filled, rolled back or evicted, has position NOTHING.

Every rank runs the same program on the tables of all ranks. It decides where tokens go, and whether there is room,
without any communication. Tables of several sequences may share pages, which are counted; a shared page that is to be
written to is copied first.

Whoever asks where a token is, how many tokens a rank holds, or which positions they have, asks here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ringattn.cache.page_tables import EMPTY_SLOT, Positions, RankTable, SequenceState, make_table
from ringattn.cache.placement import PlacementPlanner, concatenate
from ringattn.errors import ArgumentError, OutOfPagesError, SequenceError, check_integer
from ringattn.geometry.layout import Layout, check_layout
from ringattn.types import Ints


@dataclass(frozen=True, eq=False)
class SlotAllocation:
    """New tokens of one or more sequences, which have their places but no keys and values yet.

    Args:
        sequences: which.
        starts: the position of each one's first new token.
        num_tokens: new tokens of each.
        layout: which of them each rank computes; None if every rank computes all of them.
        rows: for each rank, which rows of the tokens that it computes it keeps, sequence by sequence.
        places: for each rank, where in its pool they go: page * page_size + slot.
        copies: (rank, from, to): pages to be copied before.
        versions: of the sequences, by which an extension is known to be the last one.
    """

    sequences: tuple[int, ...]
    starts: tuple[int, ...]
    num_tokens: int
    layout: Layout | None
    rows: tuple[Ints, ...]
    places: tuple[Ints, ...]
    copies: tuple[tuple[int, int, int], ...]
    versions: tuple[int, ...]


@dataclass(frozen=True)
class PageMove:
    """A page that goes from one pool to another."""

    from_rank: int
    from_page: int
    to_rank: int
    to_page: int


class PagePools:
    """The pools of all ranks, and the tables of all sequences.

    Args:
        world_size: ranks.
        num_pages: pages of each rank.
        page_size: tokens of a page.
    """

    def __init__(self, world_size: int, num_pages: int, page_size: int) -> None:
        for name, value in (("world_size", world_size), ("num_pages", num_pages), ("page_size", page_size)):
            check_integer(name, value, 1)
        self.world_size, self.num_pages, self.page_size = world_size, num_pages, page_size
        # Low pages are taken first, so that a pool that is never full is never touched at its end.
        self._free = [list(range(num_pages - 1, -1, -1)) for _ in range(world_size)]
        self._users = [[0] * num_pages for _ in range(world_size)]
        self._chains: dict[int, SequenceState] = {}
        self._next = 0
        self._digest = b""

    @property
    def sequences(self) -> tuple[int, ...]:
        """The sequences that there are."""
        return tuple(self._chains)

    @property
    def digest(self) -> int:
        """63 bits that tell apart programs: equal where the same was asked for in the same order."""
        return int.from_bytes(self._digest, "little") >> 1

    @property
    def short_digest(self) -> int:
        """The first 32 bits of it, signed."""
        return int.from_bytes(self._digest[:4], "little", signed=True)

    def num_free(self, rank: int) -> int:
        """Returns how many pages of a rank nobody uses."""
        return len(self._free[rank])

    def num_users(self, rank: int, page: int) -> int:
        """Returns how many tables a page is in."""
        return self._users[rank][page]

    def length(self, sequence: int) -> int:
        """Returns the position of the next token: how many there have been, those evicted included."""
        return self._chain(sequence).length

    def table(self, sequence: int, rank: int) -> RankTable:
        """Returns what a rank holds of a sequence; to look at."""
        return self._chain(sequence).tables[rank]

    def version(self, sequence: int) -> int:
        """Returns a number that changes when the sequence does."""
        return self._chain(sequence).version

    def layout(self, sequence: int) -> Layout:
        """Returns who holds which positions, the local rows of each rank in ascending order."""
        ranges = tuple(_ranges_of(table.held()[0]) for table in self._chain(sequence).tables)
        length = self.length(sequence)
        return Layout(length, ranges, f"sequence {sequence} of {length}", whole=False)

    def new(self) -> int:
        """Returns a new sequence, which has no tokens."""
        self._note("new")
        sequence, self._next = self._next, self._next + 1
        self._chains[sequence] = SequenceState([RankTable(self.page_size) for _ in range(self.world_size)])
        return sequence

    def extend(self, sequences: Sequence[int], tokens: int | Layout) -> SlotAllocation:
        """Finds places for new tokens of every sequence; all of them, or none.

        Args:
            sequences: which, each once.
            tokens: how many, if every rank computes all of them: those go, a page at a time, to the rank that holds
                the fewest of the sequence; or who computes which, and keeps them.
        Raises:
            OutOfPagesError: when there is no room; nothing has changed.
        """
        chains = [self._chain(sequence) for sequence in sequences]
        if len(set(sequences)) < len(chains) or not chains:
            raise SequenceError(f"sequences={list(sequences)}: must be one or more, each of them once")
        layout = None
        if isinstance(tokens, Layout):
            layout = check_layout(tokens, "tokens", self.world_size)
            num_tokens = layout.seq_len
        else:
            num_tokens = check_integer("tokens", tokens, 0)
        if max(chain.length for chain in chains) + num_tokens >= 1 << 31:
            raise ArgumentError(f"tokens={tokens}: positions must stay below {1 << 31:,}")
        budget = PlacementPlanner(self)
        shares = [budget.dealt(chain, num_tokens) if layout is None else budget.laid(chain, layout) for chain in chains]
        self._note("extend", tuple(sequences), num_tokens if layout is None else layout.digest)
        return self._place(tuple(sequences), chains, num_tokens, layout, shares, budget.ends)

    def fork(self, sequence: int) -> int:
        """Returns a new sequence of the same tokens, which shares the other's pages."""
        chain = self._chain(sequence)
        self._note("fork", sequence)
        chain.version += 1  # what is still to be written would be written for both
        for rank, table in enumerate(chain.tables):
            for page in table.pages:
                self._users[rank][page] += 1
        forked, self._next = self._next, self._next + 1
        self._chains[forked] = SequenceState([table.copy() for table in chain.tables], chain.length, chain.at)
        return forked

    def truncate(self, sequence: int, length: int) -> None:
        """Forgets the tokens from position `length` on.

        Raises:
            SequenceError: when there are not as many.
        """
        chain = self._chain(sequence)
        if check_integer("length", length, 0) > chain.length:
            raise SequenceError(f"length={length}: sequence {sequence} has only {chain.length} tokens")
        self._note("truncate", sequence, length)
        self._drop(chain, length, chain.length)
        chain.length = length

    def evict(self, sequence: int, sinks: int, window: int) -> None:
        """Forgets all tokens but the first `sinks` and the last `window`."""
        chain = self._chain(sequence)
        check_integer("sinks", sinks, 0)
        check_integer("window", window, 0)
        self._note("evict", sequence, sinks, window)
        self._drop(chain, sinks, chain.length - window)

    def free(self, sequence: int) -> None:
        """Forgets a sequence."""
        chain = self._chain(sequence)
        self._note("free", sequence)
        for rank, table in enumerate(chain.tables):
            self._release(rank, table.pages)
        del self._chains[sequence]

    def note(self, what: str) -> None:
        """Takes down something else that all ranks must have in common; it goes into the digest."""
        self._note("note", what)

    def is_last(self, extension: SlotAllocation) -> bool:
        """Returns whether nothing has happened to the sequences of an extension since."""
        return all(
            sequence in self._chains and self._chains[sequence].version == version
            for sequence, version in zip(extension.sequences, extension.versions, strict=True)
        )

    def resharded(self, world_size: int, num_pages: int) -> tuple[PagePools, tuple[PageMove, ...]]:
        """Returns the same sequences over other ranks, and where each page in use goes.

        The pages of a sequence are dealt in turn, in the order of their first positions. What shares a page goes on
        sharing it.

        Raises:
            OutOfPagesError: when they do not fit.
        """
        made = PagePools(world_size, num_pages, self.page_size)
        used = sum(self.num_pages - len(free) for free in self._free)
        if used > world_size * num_pages:
            raise OutOfPagesError(f"num_pages={num_pages}: {used} pages are in use, for {world_size} ranks")
        moves: dict[tuple[int, int], PageMove] = {}
        turn = 0
        for sequence, chain in self._chains.items():
            held = [
                (_first_position(slots), rank, page, slots)
                for rank, table in enumerate(chain.tables)
                for page, slots in zip(table.pages, table.slots, strict=True)
            ]
            parts: list[list[tuple[int, Positions]]] = [[] for _ in range(world_size)]
            for _, rank, page, slots in sorted(held, key=lambda entry: entry[:3]):
                if (rank, page) not in moves:
                    while not made._free[turn % world_size]:
                        turn += 1
                    to = turn % world_size
                    moves[rank, page] = PageMove(rank, page, to, made._free[to].pop())
                    turn += 1
                move = moves[rank, page]
                made._users[move.to_rank][move.to_page] += 1
                parts[move.to_rank].append((move.to_page, slots))
            made._chains[sequence] = SequenceState([make_table(self.page_size, part) for part in parts], chain.length)
        made._next, made._digest = self._next, self._digest
        made._note("reshard", world_size, num_pages)
        return made, tuple(moves.values())

    def adopt(self, next_sequence: int, sequences: dict[int, tuple[int, list[RankTable]]]) -> None:
        """Takes in sequences as they once were, (length, table of each rank), into pools that are empty."""
        for sequence, (length, tables) in sequences.items():
            self._chains[sequence] = SequenceState(tables, length)
            for rank, table in enumerate(tables):
                for page in table.pages:
                    self._users[rank][page] += 1
        self._free = [[p for p in range(self.num_pages - 1, -1, -1) if not users[p]] for users in self._users]
        self._next = next_sequence
        self._note("adopt", next_sequence, *((s, length) for s, (length, _) in sequences.items()))

    @property
    def next_sequence(self) -> int:
        """What the next new sequence will be called."""
        return self._next

    def _chain(self, sequence: int) -> SequenceState:
        if not isinstance(sequence, int) or sequence not in self._chains:
            raise SequenceError(f"sequence={sequence!r}: there is none of this name in the cache")
        return self._chains[sequence]

    def _place(
        self,
        sequences: tuple[int, ...],
        chains: list[SequenceState],
        num_tokens: int,
        layout: Layout | None,
        shares: list[list[Ints]],
        ends: list[int | None],
    ) -> SlotAllocation:
        """Takes slots for each rank's share of the new tokens, for which there is room."""
        rows: list[list[Ints]] = [[] for _ in range(self.world_size)]
        places: list[list[Ints]] = [[] for _ in range(self.world_size)]
        copies: list[tuple[int, int, int]] = []
        for index, (chain, share) in enumerate(zip(chains, shares, strict=True)):
            for rank, taken in enumerate(share):
                if not len(taken):
                    continue
                copies += self._make_room(rank, chain.tables[rank], len(taken))
                per_sequence = num_tokens if layout is None else len(taken)
                mine = taken if layout is None else np.arange(len(taken), dtype=np.int64)
                rows[rank].append(index * per_sequence + mine)
                places[rank].append(chain.tables[rank].append(chain.length + taken))
        starts = tuple(chain.length for chain in chains)
        for chain, end in zip(chains, ends, strict=True):
            chain.length += num_tokens
            chain.at = end
            chain.version += 1
        versions = tuple(chain.version for chain in chains)
        kept, where = tuple(map(concatenate, rows)), tuple(map(concatenate, places))
        return SlotAllocation(sequences, starts, num_tokens, layout, kept, where, tuple(copies), versions)

    def _make_room(self, rank: int, table: RankTable, count: int) -> list[tuple[int, int, int]]:
        """Sees to it that a table can take `count` tokens; returns the page that has to be copied, if one has."""
        copies = []
        if table.room and self._users[rank][table.pages[-1]] > 1:
            old, new = table.pages[-1], self._take(rank)
            table.pages[-1] = new
            self._release(rank, [old])
            copies.append((rank, old, new))
        while table.room < count:
            table.pages.append(self._take(rank))
        return copies

    def _take(self, rank: int) -> int:
        page = self._free[rank].pop()
        self._users[rank][page] = 1
        return page

    def _release(self, rank: int, pages: Sequence[int]) -> None:
        for page in reversed(pages):
            self._users[rank][page] -= 1
            if not self._users[rank][page]:
                self._free[rank].append(page)

    def _drop(self, chain: SequenceState, first: int, stop: int) -> None:
        chain.version += 1
        if first < stop:
            for rank, table in enumerate(chain.tables):
                self._release(rank, table.drop(first, stop))

    def _note(self, *what: object) -> None:
        self._digest = hashlib.blake2b(self._digest + repr(what).encode(), digest_size=8).digest()


def _first_position(slots: Positions) -> int:
    return int(slots[slots != EMPTY_SLOT].min())


def _ranges_of(positions: Ints) -> tuple[range, ...]:
    """Returns ascending positions as ranges."""
    if not len(positions):
        return ()
    cuts = np.flatnonzero(np.diff(positions) != 1) + 1
    starts, stops = np.append(0, cuts), np.append(cuts, len(positions))
    return tuple(map(range, positions[starts].tolist(), (positions[stops - 1] + 1).tolist()))
