"""Decomposition of tiles into dense tiles, which a fused kernel can express: rectangles, triangles, masked strips.

Fused attention kernels know `full` and `causal` (top-left: j <= i). A tile between two diagonals is decomposed so that
nothing outside its band is computed:

    upper diagonal only:  ▉▉▉◣      a rectangle and a causal triangle
    lower diagonal only:  ◥▉▉▉      a triangle that is causal when its rows and columns are reversed, a rectangle
    both, a band:         ◥▉◣       strips of a few rows, each with all keys that are visible to any of its rows, under
                            ◥▉◣     a dense mask; strips are equal, so a batched call takes many

The overhead of a strip over its band is in proportion to its height. A small tile becomes one masked tile, since
triangles would cost more in calls than they save. docs/performance.md compares this with triangles as high as the band
is wide.
"""

from __future__ import annotations

from enum import Enum
from functools import lru_cache
from typing import NamedTuple

from ringattn.geometry.tiles import Tile, Tiles

# Strips are a quarter as high as their band is wide, within these bounds; a tile of at most MIN_STRIP rows and columns
# is masked as a whole. Batches of strips bound the memory of overlapping gradients.
MIN_STRIP, MAX_STRIP = 64, 256
STRIPS_PER_BATCH = 16


class TileShape(Enum):
    """The pairs (i, j) of a dense tile's own rows and columns that may attend."""

    FULL = "full"
    CAUSAL = "causal"  # j <= i
    REVERSED = "reversed"  # j >= i: causal once rows and columns are reversed; square
    MASKED = "masked"  # lo <= j - i <= hi


class DenseTile(NamedTuple):
    """`copies` equal tiles of rows x cols, each `stride` rows and columns further down the diagonal."""

    shape: TileShape
    q_start: int
    k_start: int
    rows: int
    cols: int
    batch: int
    copies: int = 1
    stride: int = 0
    lo: int = 0
    hi: int = 0


@lru_cache(maxsize=512)
def dense_tiles(tiles: Tiles) -> tuple[DenseTile, ...]:
    """Returns disjoint dense tiles with exactly the pairs of the tiles."""
    return tuple(dense for tile in tiles for dense in _decompose(tile))


@lru_cache(maxsize=512)
def masked_tiles(tiles: Tiles) -> Tiles:
    """Returns the masked dense tiles of the tiles, as tiles."""
    return Tiles.of(
        *(
            Tile(
                dense.q_start + strip * dense.stride,
                dense.q_start + strip * dense.stride + dense.rows,
                dense.k_start + strip * dense.stride,
                dense.k_start + strip * dense.stride + dense.cols,
                dense.lo + dense.k_start - dense.q_start,
                dense.hi + dense.k_start - dense.q_start,
                dense.batch,
            )
            for dense in dense_tiles(tiles)
            if dense.shape is TileShape.MASKED
            for strip in range(dense.copies)
        )
    )


def _decompose(tile: Tile) -> list[DenseTile]:
    rows, cols = tile.q_stop - tile.q_start, tile.k_stop - tile.k_start
    corner = tile.k_start - tile.q_start
    lo, hi = tile.lo - corner, tile.hi - corner
    # The lower diagonal cuts rows from `low` on, the upper one rows before `high`.
    low = min(max(1 - lo, 0), rows)
    high = min(max(cols - 1 - hi, 0), rows)
    # The outermost uncut row is at a diagonal's end: it completes the adjacent triangle or band.
    if high < low:
        high += high > 0
        low -= high < low < rows
    elif high < rows:
        high += 1
    if rows <= MIN_STRIP and cols <= MIN_STRIP and (low, high) != (rows, 0) and not (lo <= 1 - rows and hi == 0):
        return [DenseTile(TileShape.MASKED, tile.q_start, tile.k_start, rows, cols, tile.batch, lo=lo, hi=hi)]

    pieces: list[DenseTile] = []

    def add(shape: TileShape, i: int, j: int, height: int, width: int, copies: int = 1, **band: int) -> None:
        if height > 0 and width > 0 and copies > 0:
            pieces.append(
                DenseTile(shape, tile.q_start + i, tile.k_start + j, height, width, tile.batch, copies, **band)
            )

    def upper(i: int, stop: int) -> None:
        add(TileShape.FULL, i, 0, stop - i, i + hi)
        add(TileShape.CAUSAL, i, i + hi, stop - i, stop - i)

    def lower(i: int, stop: int) -> None:
        add(TileShape.REVERSED, i, i + lo, stop - i, stop - i)
        add(TileShape.FULL, i, stop + lo, stop - i, cols - stop - lo)

    def band(i: int, stop: int) -> None:
        width = hi - lo
        height = min(max(width // 4, MIN_STRIP), MAX_STRIP)
        count, rest = divmod(stop - i, height)
        for first in range(0, count, STRIPS_PER_BATCH):
            row, copies = i + first * height, min(STRIPS_PER_BATCH, count - first)
            add(TileShape.MASKED, row, row + lo, height, height + width, copies, stride=height, hi=width)
        add(TileShape.MASKED, stop - rest, stop - rest + lo, rest, rest + width, hi=width)

    if low <= high:
        upper(0, low)
        if low < high:
            band(low, high)
        lower(high, rows)
    else:
        upper(0, high)
        add(TileShape.FULL, high, 0, low - high, cols)
        lower(low, rows)
    return pieces
