"""Pieces: exactly the tiles' pairs, at a cost that follows their area."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ringattn.geometry.tiles import Tile, Tiles
from ringattn.kernels.decompose import (
    MAX_STRIP,
    MIN_STRIP,
    STRIPS_PER_BATCH,
    DenseTile,
    TileShape,
    dense_tiles,
    masked_tiles,
)
from tests.geometry.brute import Counts, tile_counts
from tests.geometry.strategies import examples, tiles

BIG = 1 << 60


def block_of(piece: DenseTile, strip: int = 0) -> Tile:
    """One of a piece's blocks, as a tile."""
    i, j = piece.q_start + strip * piece.stride, piece.k_start + strip * piece.stride
    lo, hi = {
        TileShape.FULL: (-BIG, BIG),
        TileShape.CAUSAL: (-BIG, 0),
        TileShape.REVERSED: (0, BIG),
        TileShape.MASKED: (piece.lo, piece.hi),
    }[piece.shape]
    return Tile(i, i + piece.rows, j, j + piece.cols, lo + j - i, hi + j - i, piece.batch)


def blocks(pieces: tuple[DenseTile, ...]) -> list[Tile]:
    return [block_of(piece, strip) for piece in pieces for strip in range(piece.copies)]


def computed(pieces: tuple[DenseTile, ...]) -> int:
    """Scores that a kernel computes which knows no triangles: the worst."""
    return sum(piece.rows * piece.cols * piece.copies for piece in pieces)


def check_pieces(tile: Tile, rows: int, cols: int) -> None:
    found = Tiles.of(tile)
    pieces = dense_tiles(found)
    expected = tile_counts([tile], 1, rows, cols)
    np.testing.assert_array_equal(tile_counts(blocks(pieces), 1, rows, cols), expected)
    check_shapes(pieces)
    check_masked(found, pieces, rows, cols)


def check_shapes(pieces: tuple[DenseTile, ...]) -> None:
    for piece in pieces:
        assert min(piece.rows, piece.cols, piece.copies) >= 1
        assert piece.copies == 1 or piece.stride >= piece.rows, "strips share no query row"
        if piece.shape in (TileShape.CAUSAL, TileShape.REVERSED):
            assert piece.rows == piece.cols, "top-left and bottom-right alignment agree on squares only"
        assert piece.copies == 1 or piece.shape is TileShape.MASKED, "only the strips of a band are batched"
        assert piece.copies <= STRIPS_PER_BATCH
        one = tile_counts([block_of(piece)._replace(batch=-1)], 1, *extent(piece))[0]
        used = one[piece.q_start :, piece.k_start :]
        assert used.any(1).all(), "a fused kernel must not meet a row without keys"


def extent(piece: DenseTile) -> tuple[int, int]:
    return piece.q_start + piece.rows, piece.k_start + piece.cols


def check_masked(found: Tiles, pieces: tuple[DenseTile, ...], rows: int, cols: int) -> None:
    """masked_tiles has the pairs of the masked pieces and no others."""
    masked = tuple(piece for piece in pieces if piece.shape is TileShape.MASKED)
    expected: Counts = tile_counts(blocks(masked), 1, rows, cols)
    np.testing.assert_array_equal(tile_counts(masked_tiles(found), 1, rows, cols), expected)


@given(tiles(30, 30))
@examples(200)
def test_small_tiles(tile: Tile) -> None:
    check_pieces(tile, 30, 30)


@given(tiles(260, 230))
@examples(120)
def test_large_tiles(tile: Tile) -> None:
    check_pieces(tile, 260, 230)


@given(st.integers(1, 330), st.integers(1, 330), st.integers(-340, 340), st.integers(0, 200))
@examples(120)
def test_bands(rows: int, cols: int, lo: int, width: int) -> None:
    check_pieces(Tile(0, rows, 0, cols, lo, lo + width), rows, cols)


@pytest.mark.parametrize(
    "width", sorted({0, 1, *(x + d for x in (MIN_STRIP, 2 * MIN_STRIP, 4 * MIN_STRIP) for d in (-1, 0, 1)), 199})
)
@pytest.mark.parametrize("rows", [65, 128, 129, 300])
def test_bands_at_the_edges_of_strips(width: int, rows: int) -> None:
    for lo in (-width, -width // 2, 0, -rows // 2):
        check_pieces(Tile(0, rows, 0, rows, lo, lo + width), rows, rows)


@given(st.lists(tiles(90, 90, batch=2), max_size=4))
@examples(60)
def test_lists_of_tiles(found: list[Tile]) -> None:
    pieces = dense_tiles(Tiles.of(*found))
    np.testing.assert_array_equal(tile_counts(blocks(pieces), 2, 90, 90), tile_counts(found, 2, 90, 90))


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(-2000, 2000), st.integers(MIN_STRIP, 4000))
@examples(300)
def test_cost_follows_area(rows: int, cols: int, lo: int, width: int) -> None:
    """A band wider than the smallest strip costs at most twice its area; a small masked tile its rectangle."""
    found = Tiles.of(Tile(0, rows, 0, cols, lo, lo + width))
    assume(found)
    tile = found.rows[0]
    assume(tile.hi - tile.lo >= MIN_STRIP)
    pieces = dense_tiles(found)
    assert computed(pieces) <= max(2 * found.area(), MIN_STRIP**2)
    assert len(pieces) <= 9 + rows // (MIN_STRIP * STRIPS_PER_BATCH)


@given(st.integers(4 * MAX_STRIP, 4000), st.integers(4 * MAX_STRIP, 16 * MAX_STRIP))
@examples(50)
def test_wide_bands_cost_little_more_than_their_area(rows: int, width: int) -> None:
    """A strip is at most a quarter as high as its band is wide."""
    strips = [p for p in dense_tiles(Tiles.of(Tile(0, rows, 0, rows, -width, 0))) if p.shape is TileShape.MASKED]
    assert bool(strips) == (rows > width + 1), "a window that cuts nothing off is causal"
    assert all(strip.cols <= 1.25 * (width + 1) for strip in strips)


@given(st.integers(MIN_STRIP + 1, 5000), st.integers(0, MIN_STRIP - 1), st.integers(-300, 300))
@examples(200)
def test_cost_of_narrow_bands_follows_rows(rows: int, width: int, lo: int) -> None:
    """A narrow band costs 2 strips' height of keys for each row, however long the sequence."""
    found = Tiles.of(Tile(0, rows, 0, rows, lo, lo + width))
    pieces = dense_tiles(found)
    seen = sum(t.q_stop - t.q_start for t in found)
    assert computed(pieces) <= 2 * MIN_STRIP * seen
    assert len(pieces) <= 6 + rows // (MIN_STRIP * STRIPS_PER_BATCH)


def test_what_a_fused_kernel_knows_is_one_piece() -> None:
    for tile, shape in (
        (Tile(0, 500, 0, 400, -BIG, BIG), TileShape.FULL),
        (Tile(0, 500, 0, 500, -BIG, 0), TileShape.CAUSAL),
        (Tile(3, 13, 40, 50, -BIG, 37), TileShape.CAUSAL),
        (Tile(3, 13, 40, 45, -BIG, BIG), TileShape.FULL),
        (Tile(0, 500, 0, 500, 0, BIG), TileShape.REVERSED),
    ):
        (piece,) = dense_tiles(Tiles.of(tile))
        assert (piece.shape, piece.copies) == (shape, 1)
        assert not masked_tiles(Tiles.of(tile))


def test_no_tiles_no_pieces() -> None:
    assert dense_tiles(Tiles.of()) == ()
    assert not masked_tiles(Tiles.of())
