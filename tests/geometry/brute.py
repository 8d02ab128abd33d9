"""Tiles spelled out pair by pair: what the clever integer code must agree with."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ringattn.geometry.tiles import Tile

Counts = npt.NDArray[np.int64]


def tile_counts(tiles: Iterable[Tile], batch: int, rows: int, cols: int) -> Counts:
    """How many of the tiles hold each (batch row, query row, key row): (batch, rows, cols).

    Raises:
        AssertionError: when a tile leaves the matrix.
    """
    counts = np.zeros((batch, rows, cols), dtype=np.int64)
    i, j = np.arange(rows)[:, None], np.arange(cols)[None, :]
    for tile in tiles:
        assert 0 <= tile.q_start <= tile.q_stop <= rows, tile
        assert 0 <= tile.k_start <= tile.k_stop <= cols, tile
        assert -1 <= tile.batch < batch, tile
        inside = (tile.q_start <= i) & (i < tile.q_stop) & (tile.k_start <= j) & (j < tile.k_stop)
        inside = inside & (tile.lo <= j - i) & (j - i <= tile.hi)
        counts[slice(None) if tile.batch < 0 else tile.batch] += inside
    return counts


def slice_counts(slices: npt.NDArray[np.int64], q_len: int, k_len: int) -> Counts:
    """How many slices of a mask hold each (query position, key position)."""
    tiles = (Tile(*row) for row in slices.tolist())
    whole: Counts = tile_counts(tiles, 1, q_len, k_len)[0]
    return whole
