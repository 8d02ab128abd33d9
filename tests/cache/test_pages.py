"""Which rank keeps which tokens: random programs against a model of plain dictionaries; no processes, no tensors."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ringattn import LayoutError, OutOfPagesError, SequenceError, contiguous, striped, zigzag
from ringattn.cache.pages import PagePools, SlotAllocation
from ringattn.cache.prefix_cache import PrefixIndex, PrefixMatch
from ringattn.errors import ArgumentError
from tests.cache.model import check_invariants, slot_of_position

LAYOUTS = (contiguous, zigzag, striped)


class Programs(RuleBasedStateMachine):
    """Every slot of every pool carries the name of the token written to it last, as tensors carry its key."""

    @initialize(world=st.integers(1, 4), page_size=st.sampled_from([1, 3, 16, 64]), num_pages=st.integers(1, 9))
    def begin(self, world: int, page_size: int, num_pages: int) -> None:
        self.pages = PagePools(world, num_pages, page_size)
        self.pools: list[dict[int, int]] = [{} for _ in range(world)]
        self.expected: dict[int, dict[int, int]] = {}
        self.lengths: dict[int, int] = {}
        self.written = 0

    @rule()
    def new(self) -> None:
        sequence = self.pages.new()
        self.expected[sequence], self.lengths[sequence] = {}, 0

    def some(self, data: Any) -> int:
        return int(data.draw(st.sampled_from(sorted(self.expected))))

    def write(self, extension: SlotAllocation) -> None:
        size = self.pages.page_size
        for rank, old, new in extension.page_copies:
            for slot in range(size):
                if old * size + slot in self.pools[rank]:
                    self.pools[rank][new * size + slot] = self.pools[rank][old * size + slot]
        for rank in range(self.pages.world_size):
            positions = range(extension.num_tokens)
            if extension.layout is not None:
                positions = extension.layout.positions(rank).tolist()
            names = [
                (s, start + p)
                for s, start in zip(extension.sequences, extension.starts, strict=True)
                for p in positions
            ]
            for row, slot in zip(extension.rows[rank].tolist(), extension.slot_indices[rank].tolist(), strict=True):
                sequence, position = names[row]
                self.written += 1
                self.pools[rank][slot] = self.written
                self.expected[sequence][position] = self.written
        for sequence in extension.sequences:
            self.lengths[sequence] += extension.num_tokens

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), count=st.integers(0, 70), layout=st.sampled_from([None, *LAYOUTS]))
    def extend(self, data: Any, count: int, layout: Any) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.expected)), min_size=1, max_size=3, unique=True))
        tokens = count if layout is None else layout(count, self.pages.world_size)
        before = [self.pages.num_free(rank) for rank in range(self.pages.world_size)]
        digest = self.pages.history_digest
        try:
            extension = self.pages.extend(chosen, tokens)
        except OutOfPagesError:
            assert before == [self.pages.num_free(rank) for rank in range(self.pages.world_size)]
            assert digest == self.pages.history_digest
            return
        assert self.pages.is_current(extension)
        self.write(extension)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def fork(self, data: Any) -> None:
        parent = self.some(data)
        child = self.pages.fork(parent)
        self.expected[child], self.lengths[child] = dict(self.expected[parent]), self.lengths[parent]

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def truncate(self, data: Any) -> None:
        sequence = self.some(data)
        length = data.draw(st.integers(0, self.lengths[sequence]))
        self.pages.truncate(sequence, length)
        self.lengths[sequence] = length
        self.expected[sequence] = {p: name for p, name in self.expected[sequence].items() if p < length}

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), sinks=st.integers(0, 5), window=st.integers(0, 40))
    def evict(self, data: Any, sinks: int, window: int) -> None:
        sequence = self.some(data)
        self.pages.evict(sequence, sinks, window)
        first = self.lengths[sequence] - window
        kept = {p: name for p, name in self.expected[sequence].items() if p < sinks or p >= first}
        self.expected[sequence] = kept

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def free(self, data: Any) -> None:
        sequence = self.some(data)
        self.pages.free(sequence)
        del self.expected[sequence], self.lengths[sequence]

    @rule(world=st.integers(1, 4), more=st.integers(0, 3))
    def reshard(self, world: int, more: int) -> None:
        num_pages = -(-self.pages.num_pages * self.pages.world_size // world) + more
        made, moves = self.pages.resharded(world, num_pages)
        size, pools = self.pages.page_size, self.pools
        self.pools = [{} for _ in range(world)]
        for move in moves:
            for slot in range(size):
                name = pools[move.from_rank].get(move.from_page * size + slot)
                if name is not None:
                    self.pools[move.to_rank][move.to_page * size + slot] = name
        self.pages = made

    @invariant()
    def holds_what_was_written(self) -> None:
        if not hasattr(self, "pages"):
            return
        check_invariants(self.pages)
        assert set(self.pages.sequences) == set(self.expected)
        for sequence, expected in self.expected.items():
            slots = slot_of_position(self.pages, sequence)
            found = {p: self.pools[rank][slot] for p, (rank, slot) in slots.items()}
            assert found == expected
            assert self.pages.length(sequence) == self.lengths[sequence]

    def teardown(self) -> None:
        if hasattr(self, "pages"):
            for sequence in list(self.expected):
                self.pages.free(sequence)
            assert all(self.pages.num_free(rank) == self.pages.num_pages for rank in range(self.pages.world_size))


QUICK = settings(max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
TestPrograms = Programs.TestCase
TestPrograms.settings = QUICK


class LongPrograms(Programs):
    """The same, for longer."""


TestLongPrograms = pytest.mark.long(LongPrograms.TestCase)
TestLongPrograms.settings = settings(QUICK, max_examples=1000, stateful_step_count=100)


def test_decoded_tokens_go_to_the_rank_with_the_fewest() -> None:
    pages = PagePools(3, 100, 4)
    sequence = pages.new()
    pages.extend([sequence], zigzag(13, 3))
    for _ in range(200):
        pages.extend([sequence], 1)
    counts = [pages.table(sequence, rank).num_tokens for rank in range(3)]
    assert sum(counts) == 213
    assert max(counts) - min(counts) <= 4


@pytest.mark.parametrize(("world", "size", "length"), [(1, 4, 9), (3, 4, 30), (4, 1, 7), (4, 16, 200), (2, 3, 6)])
def test_decoded_tokens_go_round_robin_by_pages(world: int, size: int, length: int) -> None:
    """An empty sequence is filled round-robin by pages, as docs/maths.md says."""
    pages = PagePools(world, 100, size)
    sequence = pages.new()
    for _ in range(length):
        pages.extend([sequence], 1)
    rounds, rest = divmod(length, world * size)
    wanted = [rounds * size + min(max(rest - rank * size, 0), size) for rank in range(world)]
    assert [pages.table(sequence, rank).num_tokens for rank in range(world)] == wanted


def test_no_rank_runs_out_early() -> None:
    pages = PagePools(4, 5, 8)
    sequences = [pages.new() for _ in range(5)]
    for _ in range(32):
        pages.extend(sequences, 1)
    assert [pages.num_free(rank) for rank in range(4)] == [0] * 4
    with pytest.raises(OutOfPagesError, match="no rank has a free page of 8 tokens"):
        pages.extend(sequences, 1)


def test_a_prefill_stays_where_it_is_computed() -> None:
    pages = PagePools(2, 10, 4)
    sequence = pages.new()
    pages.extend([sequence], striped(11, 2))
    assert pages.table(sequence, 0).stored_tokens()[0].tolist() == [0, 2, 4, 6, 8, 10]
    assert slot_of_position(pages, sequence)[5] == (1, 2)
    pages.evict(sequence, 1, 3)
    assert 5 not in slot_of_position(pages, sequence)
    assert pages.layout(sequence).ranges(1) == (range(9, 10),)
    assert pages.layout(sequence).ranges(0) == (range(0, 1), range(8, 9), range(10, 11))


def test_errors_tell_what_is_wrong_and_change_nothing() -> None:
    pages = PagePools(2, 2, 4)
    sequence = pages.new()
    pages.extend([sequence], 3)
    digest = pages.history_digest
    for wrong in (
        lambda: pages.extend([7], 1),
        lambda: pages.extend([sequence, sequence], 1),
        lambda: pages.extend([], 1),
        lambda: pages.truncate(sequence, 4),
        lambda: pages.fork(-1),
        lambda: pages.free(1),
    ):
        with pytest.raises(SequenceError):
            wrong()
    with pytest.raises(ArgumentError, match="tokens=-1"):
        pages.extend([sequence], -1)
    with pytest.raises(LayoutError):
        pages.extend([sequence], zigzag(4, 3))
    with pytest.raises(OutOfPagesError, match="rank 0 has"):
        pages.extend([sequence], contiguous(30, 2))
    with pytest.raises(ArgumentError, match="page_size=0"):
        PagePools(1, 1, 0)
    assert pages.history_digest == digest
    assert pages.length(sequence) == 3


def test_an_older_extension_is_not_current() -> None:
    pages = PagePools(1, 4, 4)
    sequence = pages.new()
    first = pages.extend([sequence], 2)
    assert pages.is_current(first)
    pages.truncate(sequence, 1)
    assert not pages.is_current(first)


def test_prefixes_are_found_in_whole_blocks() -> None:
    prefixes = PrefixIndex(4)
    prefixes.insert(1, range(10))
    prefixes.insert(2, [*range(8), 99, 99, 99, 99])
    assert prefixes.longest_match(range(20)) == PrefixMatch(1, 8)
    assert prefixes.longest_match([*range(8), 99, 99, 99, 99, 1]) == PrefixMatch(2, 12)
    assert prefixes.longest_match([5, *range(1, 20)]) is None
    assert prefixes.longest_match([0, 1, 2]) is None
    prefixes.truncate(1, 7)
    assert prefixes.longest_match(range(20)) == PrefixMatch(1, 4) or prefixes.longest_match(range(20)) == PrefixMatch(
        2, 8
    )
    prefixes.truncate(2, 0)
    assert prefixes.longest_match(range(20)) == PrefixMatch(1, 4)
    prefixes.truncate(1, 0)
    assert prefixes.longest_match(range(20)) is None
