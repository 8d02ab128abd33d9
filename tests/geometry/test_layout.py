"""Layouts: who holds which positions, for every constructor, length and world size."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn import (
    ArgumentError,
    Layout,
    LayoutError,
    Mask,
    balanced,
    causal,
    contiguous,
    documents,
    full,
    sliding_window,
    striped,
    zigzag,
)
from ringattn.geometry.balance import _heaviest_first, _starts, _Swaps, _who_sees_whom
from ringattn.geometry.layout import check_layout
from ringattn.geometry.tiles import pairs_of_queries, work_of_ranges
from ringattn.plan.comm_pattern import CommPattern
from ringattn.plan.exchanges import Gather
from ringattn.plan.payload import Payload
from tests.geometry.strategies import examples, layouts
from tests.harness.cases import LAYOUT_CASES, LayoutCase, case_ids

LENGTHS = (0, 1, 2, 7, 31, 64, 97)
WORLDS = (1, 2, 3, 5, 8, 101)


def owners(layout: Layout) -> list[int]:
    """The rank that holds each position."""
    held = np.full(layout.seq_len, -1)
    for rank in range(layout.world_size):
        held[layout.positions(rank)] = rank
    return cast(list[int], held.tolist())


def check_consistent(layout: Layout) -> None:
    """Each position is held once, and all views of the layout tell the same."""
    world = range(layout.world_size)
    everything = np.concatenate([layout.positions(rank) for rank in world])
    assert sorted(everything.tolist()) == list(range(layout.seq_len))
    for rank in world:
        positions = layout.positions(rank)
        assert positions.dtype == np.int64
        assert positions.tolist() == [p for run in layout.ranges(rank) for p in run]
        assert layout.num_tokens(rank) == len(positions)
        assert all(len(run) for run in layout.ranges(rank))
    check_runs(layout)
    check_segments(layout)


def check_runs(layout: Layout) -> None:
    runs = layout.runs
    assert runs.start.tolist() == sorted(runs.start.tolist())
    for owner, start, step, length, offset in zip(*(column.tolist() for column in runs), strict=True):
        held = layout.positions(owner)[offset : offset + length]
        assert held.tolist() == [start + step * x for x in range(length)]
    assert int(runs.length.sum()) == layout.seq_len


def check_segments(layout: Layout) -> None:
    spelled: list[int] = []
    segments = layout.segments
    for owner, start, stop in zip(*(column.tolist() for column in segments), strict=True):
        assert start == len(spelled) < stop
        spelled += [owner] * (stop - start)
    assert spelled == owners(layout)
    assert (segments.owner[1:] != segments.owner[:-1]).all()


@pytest.mark.parametrize("case", LAYOUT_CASES, ids=case_ids(LAYOUT_CASES))
def test_each_position_is_held_once(case: LayoutCase) -> None:
    for seq_len in LENGTHS:
        for world_size in WORLDS:
            layout = case.build(seq_len, world_size)
            assert (layout.seq_len, layout.world_size) == (seq_len, world_size)
            check_consistent(layout)


@given(st.data(), st.integers(0, 60), st.integers(1, 9))
@examples(60)
def test_any_layout_is_consistent(data: st.DataObject, seq_len: int, world_size: int) -> None:
    check_consistent(data.draw(layouts(seq_len, world_size)))


@given(st.integers(0, 200), st.integers(1, 20))
@examples(60)
def test_contiguous_is_even_to_one_position(seq_len: int, world_size: int) -> None:
    layout = contiguous(seq_len, world_size)
    sizes = [layout.num_tokens(rank) for rank in range(world_size)]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert owners(layout) == sorted(owners(layout))


@given(st.integers(0, 200), st.integers(1, 20))
@examples(60)
def test_zigzag_holds_a_run_and_its_mirror(seq_len: int, world_size: int) -> None:
    layout = zigzag(seq_len, world_size)
    # The 2W runs are those of contiguous over 2W ranks, which another test checks.
    runs = contiguous(seq_len, 2 * world_size)
    for rank in range(world_size):
        mirror = 2 * world_size - 1 - rank
        expected = [*runs.positions(rank).tolist(), *runs.positions(mirror).tolist()]
        assert layout.positions(rank).tolist() == expected


@given(st.integers(0, 200), st.integers(1, 20), st.integers(1, 9))
@examples(60)
def test_striped_deals_blocks_in_turn(seq_len: int, world_size: int, block: int) -> None:
    layout = striped(seq_len, world_size, block)
    assert owners(layout) == [position // block % world_size for position in range(seq_len)]
    for rank in range(world_size):
        assert layout.positions(rank).tolist() == sorted(layout.positions(rank).tolist())


def test_striped_by_one_is_one_range_with_a_step() -> None:
    layout = striped(12, 2)
    assert layout.rank_ranges == ((range(0, 12, 2),), (range(1, 12, 2),))


@pytest.mark.parametrize("mask", [full(), causal(), sliding_window(9), documents([0, 50, 60, 200]) & causal()])
def test_balanced_is_even_in_tokens(mask: Mask) -> None:
    """Every rank has as many chunks, or one less. Only the last chunk may be short: fewer than 2 chunks apart."""
    seq_len = 200
    for world_size in (1, 2, 3, 7, 40):
        for chunk in (1, 4, 7, 33, 500):
            layout = balanced(mask, seq_len, world_size, chunk)
            check_consistent(layout)
            firsts = [sum(p % chunk == 0 for p in layout.positions(rank).tolist()) for rank in range(world_size)]
            assert max(firsts) - min(firsts) <= 1
            sizes = [layout.num_tokens(rank) for rank in range(world_size)]
            assert max(sizes) - min(sizes) < 2 * chunk
            if seq_len % chunk == 0:
                assert max(sizes) - min(sizes) <= chunk
            whole = {p // chunk for rank in range(world_size) for p in layout.positions(rank).tolist()}
            assert len(whole) == -(-seq_len // chunk)


@pytest.mark.parametrize("world_size", [2, 3, 4, 8, 16])
@pytest.mark.parametrize(("seq_len", "within"), [(4096, 0.02), (4097, 0.03), (100_003, 0.02)])
def test_balanced_is_even_in_causal_work(world_size: int, seq_len: int, within: float) -> None:
    work = pairs_of_queries((causal(),), balanced(causal(), seq_len, world_size), seq_len)
    assert sum(work) == seq_len * (seq_len + 1) // 2
    assert max(work) <= (1 + within) * sum(work) / world_size


def test_balanced_beats_contiguous_for_uneven_documents() -> None:
    mask = documents([0, 3000, 3100, 3200, 4000]) & causal()
    dealt = pairs_of_queries((mask,), balanced(mask, 4000, 4), 4000)
    runs = pairs_of_queries((mask,), contiguous(4000, 4), 4000)
    assert max(dealt) * 4 / sum(dealt) < 1.02 < max(runs) * 4 / sum(runs)


def drawn_documents(seed: int) -> Mask:
    """64k tokens of documents from 128 to 16k, as many short ones as long ones on a logarithmic scale."""
    generator, ends = np.random.default_rng(seed), [0]
    while ends[-1] < 65536:
        ends.append(min(65536, ends[-1] + int(np.exp(generator.uniform(np.log(128), np.log(16384))))))
    return documents(ends) & causal()


def rows_received(mask: Mask, layout: Layout) -> int:
    return Gather().rows_moved(CommPattern(Payload.KV, (mask,), layout, layout))[0]


@pytest.mark.parametrize("seed", range(8))
def test_balanced_is_even_for_packed_documents(seed: int) -> None:
    """Within 5 % on 8 ranks, a required bound, for a fraction of the rows of dealing by work alone."""
    mask = drawn_documents(seed)
    layout = balanced(mask, 65536, 8)
    work = pairs_of_queries((mask,), layout, 65536)
    assert max(work) * 8 / sum(work) < 1.05
    assert {layout.num_tokens(rank) for rank in range(8)} == {8192}
    chunks = [range(a, a + 256) for a in range(0, 65536, 256)]
    owner = _heaviest_first(work_of_ranges(mask, chunks, 65536), 8).tolist()
    by_work = Layout(65536, tuple(tuple(c for c, o in zip(chunks, owner, strict=True) if o == r) for r in range(8)))
    assert rows_received(mask, layout) < 0.5 * rows_received(mask, by_work)


@pytest.mark.parametrize("mask", [full(), documents(range(0, 4097, 64)) & causal()], ids=["full", "short_documents"])
def test_balanced_moves_nothing_that_is_even_already(mask: Mask) -> None:
    assert balanced(mask, 4096, 8) == contiguous(4096, 8)


def test_balanced_counts_traffic_as_a_gather_does() -> None:
    """The search's own figure, kept up to date swap by swap, is that of the plan: here chunks are seen whole."""
    ends, chunks = [0, 30, 34, 36, 60, 64], [range(a, a + 16) for a in range(0, 1024, 16)]
    mask = documents([16 * end for end in ends])
    work = work_of_ranges(mask, chunks, 1024)
    for start in _starts(len(chunks), 8):
        before = start.copy()
        swaps = _Swaps(_who_sees_whom(mask, chunks, 1024), chunks, work, start).run()
        owner = swaps.owner.tolist()
        assert owner != before.tolist()
        layout = Layout(1024, tuple(tuple(c for c, o in zip(chunks, owner, strict=True) if o == r) for r in range(8)))
        assert swaps.traffic == rows_received(mask, layout)


def test_equal_and_hashed_by_content() -> None:
    by_hand = Layout(12, ((range(0, 6),), (range(6, 12),)), "by hand")
    assert by_hand == contiguous(12, 2)
    assert hash(by_hand) == hash(contiguous(12, 2))
    assert by_hand != zigzag(12, 2)
    assert contiguous(12, 2) != contiguous(12, 3)
    assert contiguous(12, 2) != "contiguous(12, 2)"
    # Empty ranges are no content, the order of local rows is.
    assert Layout(2, ((range(0), range(2)), (range(1, 1),))) == Layout(2, ((range(2),), ()))
    # Ranges are equal by their elements, whatever end and step they were made with.
    odd, even = Layout(5, ((range(0, 6, 2),), (range(1, 5, 2),))), Layout(5, ((range(0, 5, 2),), (range(1, 4, 2),)))
    assert (odd, hash(odd), odd.digest, odd.ranges(1)) == (even, hash(even), even.digest, even.ranges(1))
    assert Layout(1, ((range(0, 1, 7),),)).digest == Layout(1, ((range(1),),)).digest
    assert Layout(2, ((range(1), range(1, 2)),)) != Layout(2, ((range(1, 2), range(1)),))
    assert len({striped(12, 2, 3), striped(12, 2, 3), striped(12, 2, 2)}) == 2


def test_the_same_arguments_give_the_same_object() -> None:
    assert zigzag(100, 4) is zigzag(100, 4)


def test_shows_how_it_was_made() -> None:
    assert repr(contiguous(12, 2)) == "contiguous(12, 2)"
    assert repr(zigzag(12, 2)) == "zigzag(12, 2)"
    assert repr(striped(12, 2, 3)) == "striped(12, 2, block=3)"
    assert repr(balanced(causal(), 12, 2, 3)) == "balanced(causal(), 12, 2, chunk=3)"


def test_numpy_integers_are_integers() -> None:
    assert contiguous(cast(int, np.int64(12)), cast(int, np.int32(2))) == contiguous(12, 2)
    assert striped(12, 2, cast(int, np.int64(3))) == striped(12, 2, 3)


MAKERS: list[tuple[str, Callable[..., Layout]]] = [
    ("contiguous", contiguous),
    ("zigzag", zigzag),
    ("striped", striped),
    ("balanced", lambda *numbers: balanced(causal(), *numbers)),
]


@pytest.mark.parametrize("make", [make for _, make in MAKERS], ids=[name for name, _ in MAKERS])
@pytest.mark.parametrize("bad", [-1, True, 2.0, 2.5, "4", None])
def test_refuses_bad_numbers_with_name_and_value(make: Callable[..., Layout], bad: Hashable) -> None:
    with pytest.raises(LayoutError, match="seq_len=") as told:
        make(bad, 2)
    assert str(bad) in str(told.value)
    with pytest.raises(LayoutError, match="world_size=") as told:
        make(8, bad)
    assert str(bad) in str(told.value)


@pytest.mark.parametrize("make", [make for _, make in MAKERS], ids=[name for name, _ in MAKERS])
def test_refuses_a_world_of_none(make: Callable[..., Layout]) -> None:
    with pytest.raises(LayoutError, match="world_size=0"):
        make(8, 0)


@pytest.mark.parametrize("bad", [0, -1, True, 2.0, "4"])
def test_refuses_bad_blocks_and_chunks(bad: object) -> None:
    with pytest.raises(LayoutError, match="block="):
        striped(8, 2, cast(int, bad))
    with pytest.raises(LayoutError, match="chunk="):
        balanced(causal(), 8, 2, cast(int, bad))


def test_equal_numbers_of_another_type_do_not_hit_the_cache() -> None:
    """1 == True == 1.0: a cache by equality alone would let them through."""
    contiguous(1, 1)
    for bad in (True, 1.0):
        with pytest.raises(LayoutError):
            contiguous(cast(int, bad), 1)


@pytest.mark.parametrize(
    ("seq_len", "rank_ranges", "told"),
    [
        (-1, ((),), "seq_len=-1"),
        (4, (), "at least one rank"),
        (4, ((range(0, 2),), (range(1, 4),)), "position 1 is held 2 times"),
        (4, ((range(0, 2),), (range(3, 4),)), "position 2 is held 0 times"),
        (4, ((range(0, 2),), (range(2, 5),)), "leaves the sequence of 4"),
        (4, ((range(-1, 4),),), "leaves the sequence of 4"),
        (4, ((range(3, -1, -1),),), "ascend"),
        (1, ((),), "position 0 is held 0 times"),
    ],
)
def test_refuses_what_is_no_layout(seq_len: int, rank_ranges: tuple[tuple[range, ...], ...], told: str) -> None:
    with pytest.raises(LayoutError, match=told):
        Layout(seq_len, rank_ranges)


@pytest.mark.parametrize("times", [2, 256, 257])
def test_refuses_a_position_that_many_ranks_hold(times: int) -> None:
    """However many: a counter of 8 bits would wrap around to 1 at 257."""
    with pytest.raises(LayoutError, match=f"held {times} times"):
        Layout(1, ((range(1),),) * times)


@pytest.mark.parametrize("rank", [-1, 2, 100])
def test_refuses_ranks_it_has_not(rank: int) -> None:
    layout = contiguous(8, 2)
    for ask in (layout.ranges, layout.num_tokens, layout.positions):
        with pytest.raises(LayoutError, match=f"rank={rank}"):
            ask(rank)


def test_check_layout_names_the_argument() -> None:
    assert check_layout(contiguous(8, 2), "layout", 2) is contiguous(8, 2)
    with pytest.raises(ArgumentError, match="kv_layout='zigzag'"):
        check_layout("zigzag", "kv_layout", 2)
    with pytest.raises(LayoutError, match="made for 2 ranks, but the group has 3"):
        check_layout(contiguous(8, 2), "layout", 3)


def test_a_layout_may_leave_positions_to_nobody() -> None:
    ranges = ((range(0, 2), range(6, 7)), (range(2, 4), range(9, 10)))
    with pytest.raises(LayoutError, match="position 4 is held 0 times"):
        Layout(11, ranges)
    layout = Layout(11, ranges, whole=False)
    assert [x.tolist() for x in layout.segments] == [[0, 1, 0, 1], [0, 2, 6, 9], [2, 4, 7, 10]]
    with pytest.raises(LayoutError, match="position 1 is held 2 times"):
        Layout(4, ((range(2),), (range(1, 3),)), whole=False)
    striped_with_gap = Layout(9, ((range(1, 8, 3),), (range(2, 9, 3),)), whole=False)
    assert [x.tolist() for x in striped_with_gap.segments] == [[0, 1] * 3, [1, 2, 4, 5, 7, 8], [2, 3, 5, 6, 8, 9]]
