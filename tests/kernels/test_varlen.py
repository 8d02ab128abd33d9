"""Packing tiles: each pair of the tiles in just one call, no other, and few calls."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn import Layout, Mask, causal, contiguous, documents, full, prefix_lm, sliding_window, striped, zigzag
from ringattn.geometry.tiles import Tile, Tiles, tiles_of_rank
from ringattn.kernels.varlen import Launch, Window, varlen_launches
from tests.geometry.brute import Counts, tile_counts
from tests.geometry.strategies import examples, layouts, masks, tiles


def launch_counts(launches: tuple[Launch, ...], batch: int, num_q: int, num_k: int) -> Counts:
    """How many calls attend to each pair, (batch, num_q, num_k), by what varlen kernels mean."""
    counts = np.zeros((batch, num_q, num_k), dtype=np.int64)
    for launch in launches:
        here = counts[launch.batch, launch.q, launch.k]
        rows, cols = here.shape[1:]
        whole = np.zeros((here.shape[0] * rows, here.shape[0] * cols), dtype=np.int64)
        if launch.packing is None:
            q_ends, k_ends = (np.arange(here.shape[0] + 1) * size for size in (rows, cols))
        else:
            q_ends, k_ends = launch.packing.q_ends, launch.packing.k_ends
            assert q_ends.dtype == k_ends.dtype == np.int32
            assert (q_ends[0], q_ends[-1], k_ends[0], k_ends[-1]) == (0, len(whole), 0, whole.shape[1])
            assert (launch.packing.max_q, launch.packing.max_k) == (np.diff(q_ends).max(), np.diff(k_ends).max())
        for i in range(len(q_ends) - 1):
            block = whole[q_ends[i] : q_ends[i + 1], k_ends[i] : k_ends[i + 1]]
            ahead = np.arange(block.shape[1]) - np.arange(block.shape[0])[:, None] - (block.shape[1] - block.shape[0])
            left, right = (np.inf if limit is None else limit for limit in launch.window)
            block += (-left <= ahead) & (ahead <= right)
        if launch.packing is not None:
            with_keys = np.flatnonzero(whole.any(1))
            told = launch.packing.q_rows
            np.testing.assert_array_equal(np.arange(len(whole)) if told is None else told, with_keys)
        for b in range(here.shape[0]):
            # Queries of one batch row never meet keys of another.
            here[b] += whole[b * rows : (b + 1) * rows, b * cols : (b + 1) * cols]
            whole[b * rows : (b + 1) * rows, b * cols : (b + 1) * cols] = 0
        assert not whole.any()
    return counts


def check(found: Tiles, batch: int, num_q: int, num_k: int) -> tuple[Launch, ...]:
    launches = varlen_launches(found, batch, num_q, num_k)
    expected = tile_counts(found, batch, num_q, num_k)
    np.testing.assert_array_equal(launch_counts(launches, batch, num_q, num_k), expected)
    return launches


@given(st.integers(1, 3), st.data())
@examples(400)
def test_any_tiles(batch: int, data: st.DataObject) -> None:
    """Overlapping ones as well: they are counted twice, as they are by other kernels."""
    num_q, num_k = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    check(Tiles.of(*data.draw(st.lists(tiles(num_q, num_k, batch), max_size=6))), batch, num_q, num_k)


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 2), st.data())
@examples(150)
def test_tiles_of_ranks(seq_len: int, world_size: int, batch: int, data: st.DataObject) -> None:
    mask, layout = data.draw(masks(seq_len)), data.draw(layouts(seq_len, world_size))
    for rank in range(world_size):
        for source, found in tiles_of_rank((mask.build(seq_len),), layout, layout, rank).items():
            check(found, batch, layout.num_tokens(rank), layout.num_tokens(source))


@given(st.integers(1, 30), st.data())
@examples(100)
def test_every_diagonal_is_told_from_the_last_query_and_key(size: int, data: st.DataObject) -> None:
    found = Tiles.of(data.draw(tiles(size, data.draw(st.integers(1, 30)))))
    for launch in varlen_launches(found, 1, size, 30):
        assert all(limit is None or limit >= 0 for limit in launch.window)


DOCUMENTS = documents([0, 100, 1500, 1501, 3000, 4096])
NO_LIMIT, CAUSAL = Window(None, None), Window(None, 0)


def windows_of(mask: Mask, layout: Layout, rank: int, batch: int = 1) -> list[tuple[int, list[Window], list[bool]]]:
    """For each source, the windows of its calls, and which of them are packed."""
    found = []
    for source, some in tiles_of_rank((mask,), layout, layout, rank).items():
        launches = varlen_launches(some, batch, layout.num_tokens(rank), layout.num_tokens(source))
        found.append((source, [x.window for x in launches], [x.packing is not None for x in launches]))
    return found


def test_steps_of_a_causal_zigzag_ring_are_one_call_without_segments() -> None:
    for rank in range(4):
        for source, windows, packed in windows_of(causal(), zigzag(4096, 4), rank, batch=3):
            assert windows == [CAUSAL if source == rank else NO_LIMIT]
            assert packed == [False]


def test_packed_documents_are_one_call() -> None:
    assert windows_of(DOCUMENTS & causal(), contiguous(4096, 1), 0) == [(0, [CAUSAL], [True])]
    assert windows_of(DOCUMENTS, contiguous(4096, 1), 0, batch=2) == [(0, [NO_LIMIT], [True])]


def test_documents_shorter_than_a_window_go_with_the_longer_ones() -> None:
    mask = DOCUMENTS & causal() & sliding_window(500)
    assert windows_of(mask, contiguous(4096, 1), 0) == [(0, [Window(500, 0)], [True])]


@pytest.mark.parametrize("mask", [DOCUMENTS, DOCUMENTS & causal(), causal() & sliding_window(500), full()], ids=str)
@pytest.mark.parametrize("layout", [zigzag(4096, 4), striped(4096, 4), contiguous(4096, 4)], ids=str)
def test_few_calls(mask: Mask, layout: Layout) -> None:
    """Whatever the layout, no more than two for these masks."""
    for rank in range(4):
        assert all(len(windows) <= 2 for _, windows, _ in windows_of(mask, layout, rank))


def test_a_prefix_is_what_several_calls_are_for() -> None:
    """Keys that all rows see, besides causal ones: two kinds."""
    ((_, windows, packed),) = windows_of(prefix_lm(700), contiguous(4096, 1), 0)
    assert set(windows) == {NO_LIMIT, CAUSAL}
    assert packed == [False, False]


@pytest.mark.parametrize(
    ("layout", "most"), [(striped(1024, 4, 4), 8), (striped(1027, 4, 4), 9), (striped(1024, 4), 1)]
)
def test_staircases_take_few_calls(layout: Layout, most: int) -> None:
    """64 steps, of which each takes the keys of the one before."""
    for rank in range(4):
        for source, found in tiles_of_rank((causal(),), layout, layout, rank).items():
            num_q, num_k = layout.num_tokens(rank), layout.num_tokens(source)
            assert len(check(found, 1, num_q, num_k)) <= most


def test_crossed_tiles_are_not_gathered() -> None:
    found = Tiles.of(Tile(0, 4, 6, 9, -99, 99), Tile(4, 8, 0, 5, -99, 99), Tile(9, 11, 2, 5, -99, 99))
    assert len(check(found, 2, 13, 9)) == 3


def test_tall_windows_are_packed() -> None:
    """Where FlashAttention-2 would take the limit for none."""
    (launch,) = check(Tiles.of(Tile(0, 30, 0, 10, -99, 5)), 1, 30, 10)
    assert launch.window == Window(None, 25)
    assert launch.packing is not None
    (launch,) = check(Tiles.of(Tile(0, 10, 0, 30, -4, 40)), 1, 10, 30)
    assert launch.packing is None


def test_no_tiles_no_calls() -> None:
    assert varlen_launches(Tiles.of(), 2, 5, 5) == ()
