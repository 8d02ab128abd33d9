"""Tiles: their area, their tightness, and that they hold exactly the mask's pairs in few enough tiles."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn import Layout, Mask, balanced, causal, contiguous, documents, full, sliding_window, striped, zigzag
from ringattn.geometry.tiles import (
    EVERY_BATCH_ROW,
    NO_TILES,
    Tile,
    Tiles,
    areas,
    needed_blocks,
    pairs_of_queries,
    tiles_of_rank,
    work_of_ranges,
)
from tests.geometry.brute import tile_counts
from tests.geometry.strategies import examples, layouts, masks, tiles
from tests.harness.cases import MASK_CASES, Bools, MaskCase, case_ids


@given(tiles(20, 20))
@examples(300)
def test_area_is_the_count_of_pairs(tile: Tile) -> None:
    expected = int(tile_counts([tile], 1, 20, 20)[0].sum())
    assert areas(np.array([tile], dtype=np.int64)).tolist() == [expected]
    assert Tiles.of(tile).area() == expected


@given(st.lists(tiles(12, 12, batch=3), max_size=5))
@examples(100)
def test_area_over_a_batch(found: list[Tile]) -> None:
    assert Tiles.of(*found).area(batch=3) == int(tile_counts(found, 3, 12, 12).sum())


@given(tiles(20, 20))
@examples(300)
def test_of_is_tight(tile: Tile) -> None:
    """Every edge row, edge column and edge diagonal holds a pair; the pairs stay the same."""
    pairs = tile_counts([tile], 1, 20, 20)[0]
    tight = list(Tiles.of(tile))
    np.testing.assert_array_equal(tile_counts(tight, 1, 20, 20)[0], pairs)
    assert len(tight) == (1 if pairs.any() else 0)
    if tight:
        i, j = np.nonzero(pairs)
        expected = (i.min(), i.max() + 1, j.min(), j.max() + 1, (j - i).min(), (j - i).max(), tile.batch)
        assert tight[0] == expected


def test_a_list_of_tiles() -> None:
    found = Tiles.of(Tile(0, 4, 0, 4, -9, 0), Tile(2, 2, 0, 4, -9, 9), Tile(0, 1, 5, 6, -9, 9, batch=1))
    assert list(found) == [Tile(0, 4, 0, 4, -3, 0), Tile(0, 1, 5, 6, 5, 5, 1)]
    assert len(found) == len(found.rows) == 2
    assert found
    assert (found.area(), found.area(batch=2)) == (11, 21)
    assert repr(found) == "Tiles(2 tiles, area 11)"
    with pytest.raises(ValueError, match="read-only"):
        found.table[0, 0] = 1


def test_no_tiles() -> None:
    for none in (NO_TILES, Tiles.of()):
        assert not none
        assert len(none) == none.area() == 0
        assert list(none) == []


def check_rank(rank: int, found: dict[int, Tiles], allowed: list[Bools], layout: Layout, kv_layout: Layout) -> None:
    """The tiles of one rank hold each pair that it may compute once, under every batch row's own mask."""
    assert all(found.values()), "a source without pairs is left out"
    own = layout.positions(rank)
    for source in range(kv_layout.world_size):
        keys = kv_layout.positions(source)
        counts = tile_counts(found.get(source, NO_TILES), len(allowed), len(own), len(keys))
        for row, pairs in enumerate(allowed):
            np.testing.assert_array_equal(counts[row], pairs[np.ix_(own, keys)].astype(int))
        tight = Tiles.of(*found.get(source, NO_TILES))
        np.testing.assert_array_equal(tight.table, found.get(source, NO_TILES).table)


@given(st.data(), st.integers(0, 50), st.integers(1, 5), st.integers(1, 3))
@examples(150)
def test_holds_exactly_the_masks_pairs(data: st.DataObject, seq_len: int, world: int, batch: int) -> None:
    layout = data.draw(layouts(seq_len, world))
    cases = data.draw(st.lists(masks(seq_len), min_size=batch, max_size=batch))
    built = tuple(case.build(seq_len) for case in cases)
    allowed = [case.allowed(seq_len, seq_len) for case in cases]
    needed = needed_blocks(built, layout, layout)
    work = pairs_of_queries(built, layout, seq_len)
    for rank in range(world):
        found = tiles_of_rank(built, layout, layout, rank)
        check_rank(rank, found, allowed, layout, layout)
        assert sorted(found) == np.flatnonzero(needed[:, rank]).tolist()
        assert sum(t.area(batch) for t in found.values()) == work[rank]


@given(st.data(), st.integers(0, 40), st.integers(0, 40), st.integers(1, 5))
@examples(100)
def test_cross_attention(data: st.DataObject, q_len: int, k_len: int, world: int) -> None:
    layout, kv_layout = data.draw(layouts(q_len, world)), data.draw(layouts(k_len, world))
    case = data.draw(masks(max(q_len, k_len), cross=True))
    built = (case.build(max(q_len, k_len)),)
    needed = needed_blocks(built, layout, kv_layout)
    work = pairs_of_queries(built, layout, k_len)
    for rank in range(world):
        found = tiles_of_rank(built, layout, kv_layout, rank)
        check_rank(rank, found, [case.allowed(q_len, k_len)], layout, kv_layout)
        assert sorted(found) == np.flatnonzero(needed[:, rank]).tolist()
        assert sum(t.area() for t in found.values()) == work[rank]


def test_one_mask_is_for_every_batch_row() -> None:
    layout = contiguous(8, 2)
    assert all(t.batch == EVERY_BATCH_ROW for t in tiles_of_rank((causal(),), layout, layout, 1)[0])
    each = tiles_of_rank((causal(), full()), layout, layout, 1)[1]
    assert sorted(t.batch for t in each) == [0, 1]


SEQ_LENS = (1, 24, 97, 1000)


def most_tiles(mask: Mask, make: Callable[[int, int], Layout]) -> int:
    """The largest number of tiles that any rank has against any source."""
    most = 0
    for seq_len in SEQ_LENS:
        for world in (1, 2, 3, 8):
            layout = make(seq_len, world)
            for rank in range(world):
                found = tiles_of_rank((mask,), layout, layout, rank).values()
                most = max([most, *map(len, found)])
    return most


def _striped_blocks(seq_len: int, world: int) -> Layout:
    return striped(seq_len, world, 4)


def _balanced(seq_len: int, world: int) -> Layout:
    return balanced(causal(), seq_len, world, 10)


@pytest.mark.parametrize("make", [contiguous, zigzag, striped])
@pytest.mark.parametrize("mask", [causal(), full()], ids=str)
def test_one_tile_per_source(mask: Mask, make: Callable[[int, int], Layout]) -> None:
    assert most_tiles(mask, make) == 1


@pytest.mark.parametrize("make", [_striped_blocks, _balanced])
def test_full_attention_is_one_tile_per_source(make: Callable[[int, int], Layout]) -> None:
    assert most_tiles(full(), make) == 1


@pytest.mark.parametrize(("make", "most"), [(contiguous, 1), (striped, 1), (zigzag, 4)])
def test_few_tiles_for_a_window(make: Callable[[int, int], Layout], most: int) -> None:
    assert most_tiles(sliding_window(30, 5), make) <= most


def test_tiles_of_packed_documents_follow_the_documents_of_a_rank() -> None:
    seq_len, world = 4096, 4
    mask = documents([*range(0, seq_len, 16), seq_len]) & causal()
    for layout in (contiguous(seq_len, world), zigzag(seq_len, world)):
        found = tiles_of_rank((mask,), layout, layout, 1)
        assert sorted(found) == [1]
        assert len(found[1]) == seq_len // 16 // world


@pytest.mark.parametrize("case", MASK_CASES, ids=case_ids(MASK_CASES))
def test_work_of_ranges(case: MaskCase) -> None:
    seq_len = 47
    pieces = [range(0, 0), range(0, 5), range(5, 6), range(6, 40), range(30, 47)]
    allowed = case.allowed(seq_len, seq_len)
    expected = [int(allowed[piece.start : piece.stop].sum()) for piece in pieces]
    assert work_of_ranges(case.build(seq_len), pieces, seq_len).tolist() == expected
