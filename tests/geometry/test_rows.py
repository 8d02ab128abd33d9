"""Sets of rows as ranges, and tiles cut to them, against sets of integers spelled out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ringattn.geometry.masks import K_START, Q_START
from ringattn.geometry.rows import count_rows, slice_rows, split_rows, union_of
from ringattn.geometry.tiles import Tile, Tiles
from ringattn.types import Rows
from tests.geometry.brute import tile_counts
from tests.geometry.strategies import examples, tiles

intervals = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 6)).map(lambda x: (x[0], x[0] + x[1])), max_size=6)


def rows_of(found: list[tuple[int, int]]) -> Rows:
    table = np.array(found, dtype=np.int64).reshape(-1, 2)
    return union_of(table[:, 0], table[:, 1])


def spelled(rows: Rows) -> list[int]:
    return [row for run in rows for row in run]


@given(intervals, st.integers(1, 7))
@examples(200)
def test_rows(found: list[tuple[int, int]], parts: int) -> None:
    rows = rows_of(found)
    expected = sorted({row for a, b in found for row in range(a, b)})
    assert spelled(rows) == expected
    assert count_rows(rows) == len(expected)
    assert all(a.stop < b.start for a, b in pairwise(rows)), "neighbours are joined"
    cuts = split_rows(rows, parts)
    assert [row for part in cuts for row in spelled(part)] == expected
    assert max(map(count_rows, cuts)) - min(map(count_rows, cuts)) <= 1
    assert spelled(slice_rows(rows, 2, 5)) == expected[2:5]


@given(st.lists(tiles(20, 26, 2), max_size=3), intervals, st.booleans())
@examples(200)
def test_tiles_within_rows(found: list[Tile], cuts: list[tuple[int, int]], of_keys: bool) -> None:
    """The pairs of those rows, renumbered, and no other."""
    rows, length = rows_of(cuts), 26 if of_keys else 20
    rows = tuple(run[: max(length - run.start, 0)] for run in rows if run.start < length)
    apart = [Tiles.of(tile) for tile in found]
    for whole in apart:
        part = whole.select(rows, K_START if of_keys else Q_START, renumber=True)
        counts = tile_counts(whole, 2, 20, 26)
        expected = counts[:, :, spelled(rows)] if of_keys else counts[:, spelled(rows)]
        np.testing.assert_array_equal(tile_counts(part, 2, *expected.shape[1:]), expected)
