"""Packing of tiles into few calls of a varlen kernel.

A varlen kernel attends segment by segment: queries [q_ends[s], q_ends[s + 1]) to keys [k_ends[s], k_ends[s + 1]), for
all segments in one call, under one window that is aligned to each segment's last query and last key. Every tight tile
is a segment: its last query and last key both take part, so their distances to its diagonals are at least zero. Tiles
share a call if

- one window fits all of them. A diagonal that cuts nothing off a tile may be anywhere beyond it, so a causal document
  shorter than the window is packed with longer ones;
- their queries and their keys are disjoint and in the same order. Rows between them become segments without keys, or
  without queries, so nothing is copied. Tiles that share keys or cross go into further calls: gathering rows for one
  call would cost a pass over them, and gradients a scattered sum. The steps of a staircase (a causal mask over a layout
  of blocks) are split at halves, quarters, ... of the keys. Parts over the same keys join, and parts of one size share
  a call, so n steps take about log2(n) calls.

A call of one tile needs no segments: it is a rectangle of the tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ringattn.geometry.tiles import EVERY_BATCH_ROW, Tiles

Ints = npt.NDArray[np.int32]


class Window(NamedTuple):
    """Key j is visible to query i of a segment if -left <= j - i - (keys - queries) <= right; None is no limit."""

    left: int | None
    right: int | None

    @property
    def causal(self) -> bool:
        """Whether it is the causal window of the kernels."""
        return self.left is None and self.right == 0


class Packing(NamedTuple):
    """The ends of a call's segments, (segments + 1,) int32 from 0 on, counted over its batch rows."""

    q_ends: Ints
    k_ends: Ints
    max_q: int
    max_k: int
    q_rows: Ints | None  # the queries that have keys; None if all have


@dataclass(frozen=True, eq=False)
class Launch:
    """One call: a block of batch rows, query rows and key rows; dense if there is no packing."""

    window: Window
    batch: slice
    q: slice
    k: slice
    packing: Packing | None = None


class _Segment(NamedTuple):
    """A tile in rows counted over the batch, and the distances from its last query and key to its diagonals."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    left: int
    right: int

    @property
    def window(self) -> Window:
        """The limits that cut anything off."""
        return Window(
            self.left if self.left < self.k_stop - self.k_start - 1 else None,
            self.right if self.right < self.q_stop - self.q_start - 1 else None,
        )

    def is_compatible(self, window: Window) -> bool:
        """Whether another tile's window selects exactly this tile's pairs."""
        own = self.window
        left = window.left == own.left or (own.left is None and (window.left or 0) >= self.left)
        right = window.right == own.right or (own.right is None and (window.right or 0) >= self.right)
        return left and right

    def shifted(self, rows: int, cols: int) -> _Segment:
        """The segment, further on in the batch."""
        return self._replace(
            q_start=self.q_start + rows,
            q_stop=self.q_stop + rows,
            k_start=self.k_start + cols,
            k_stop=self.k_stop + cols,
        )


@lru_cache(maxsize=512)
def varlen_launches(tiles: Tiles, batch: int, num_q: int, num_k: int) -> tuple[Launch, ...]:
    """Returns calls that together cover each pair of the tiles once, and no other pair.

    Args:
        tiles: tight and disjoint.
        batch: number of batch rows.
        num_q: query rows per batch row.
        num_k: key rows per batch row.
    """
    # Tiles of every batch row are packed once, and repeated.
    all_alike = all(tile.batch == EVERY_BATCH_ROW for tile in tiles)
    segments = _segments(tiles, 1 if all_alike else batch, num_q, num_k)
    repeats = range(batch if all_alike else 1)
    return tuple(
        _launch(chain, repeats, num_q, num_k)
        for window, group in _group_by_window(segments).items()
        for chain in _min_chains(group, window)
    )


def _segments(tiles: Tiles, batch: int, num_q: int, num_k: int) -> list[_Segment]:
    segments: list[_Segment] = []
    for tile in tiles:
        surplus = (tile.k_stop - tile.k_start) - (tile.q_stop - tile.q_start)
        corner = tile.k_start - tile.q_start
        segment = _Segment(
            tile.q_start, tile.q_stop, tile.k_start, tile.k_stop, surplus + corner - tile.lo, tile.hi - corner - surplus
        )
        rows: Iterable[int] = range(batch) if tile.batch == EVERY_BATCH_ROW else (tile.batch,)
        segments.extend(segment.shifted(row * num_q, row * num_k) for row in rows)
    return segments


def _group_by_window(segments: list[_Segment]) -> dict[Window, list[_Segment]]:
    """Groups segments by a common window; segments with the most limits first, which leave the least choice."""
    groups: dict[Window, list[_Segment]] = {}
    for segment in sorted(segments, key=lambda s: s.window.count(None)):
        window = next((window for window in groups if segment.is_compatible(window)), segment.window)
        groups.setdefault(window, []).append(segment)
    return groups


def _min_chains(segments: list[_Segment], window: Window) -> list[list[_Segment]]:
    chains = _chains(segments)
    if len(chains) > 1 and window == Window(None, None):
        chains = min(chains, _chains(_split_at_powers(segments)), key=len)
    return chains


def _split_at_powers(segments: list[_Segment]) -> list[_Segment]:
    """Splits rectangles along their keys, at powers of two of a unit, and joins those over the same keys."""
    unit = min(s.q_stop - s.q_start for s in segments)
    origin = min(s.k_start for s in segments)
    rows: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for segment in sorted(segments):
        for keys in _power_ranges(segment.k_start - origin, segment.k_stop - origin, unit):
            ranges = rows.setdefault(keys, [])
            start = segment.q_start
            if ranges and ranges[-1][1] == start:
                start = ranges.pop()[0]
            ranges.append((start, segment.q_stop))
    return [
        _Segment(i, i_stop, origin + j, origin + j_stop, j_stop - j - 1, i_stop - i - 1)
        for (j, j_stop), ranges in rows.items()
        for i, i_stop in ranges
    ]


def _power_ranges(start: int, stop: int, unit: int) -> Iterator[tuple[int, int]]:
    """Ranges whose union is [start, stop): powers of two of the unit, aligned to their size, and remainders."""
    while start < stop:
        size = unit - start % unit
        while size % unit == 0 and start % (2 * size) == 0 and start + 2 * size <= stop:
            size *= 2
        yield start, min(start + size, stop)
        start += size


def _chains(segments: list[_Segment]) -> list[list[_Segment]]:
    """Splits segments into chains in which both queries and keys follow one another."""
    chains: list[list[_Segment]] = []
    for segment in sorted(segments):
        fitting = [c for c in chains if c[-1].q_stop <= segment.q_start and c[-1].k_stop <= segment.k_start]
        if fitting:
            # The chain that can take the fewest of the remaining segments.
            max(fitting, key=lambda c: c[-1].k_stop).append(segment)
        else:
            chains.append([segment])
    return chains


def _launch(chain: list[_Segment], repeats: range, num_q: int, num_k: int) -> Launch:
    window = Window(
        next((s.left for s in chain if s.window.left is not None), None),
        next((s.right for s in chain if s.window.right is not None), None),
    )
    first, last = chain[0], chain[-1]
    row = first.q_start // num_q
    if len(chain) == 1 and _fits_dense_call(first, window):
        first = first.shifted(-row * num_q, -row * num_k)
        q, k = slice(first.q_start, first.q_stop), slice(first.k_start, first.k_stop)
        return Launch(window, slice(row, row + len(repeats)), q, k)
    num_rows = (last.q_stop - 1) // num_q - row + len(repeats)
    batch, q, k = slice(row, row + num_rows), slice(0, num_q), slice(0, num_k)
    if num_rows == 1:
        # Only whole batch rows are contiguous, so a range of rows needs a single one.
        q = slice(first.q_start - row * num_q, last.q_stop - row * num_q)
        k = slice(first.k_start - row * num_k, last.k_stop - row * num_k)
    origin = -row * num_q - q.start, -row * num_k - k.start
    packed = [s.shifted(origin[0] + r * num_q, origin[1] + r * num_k) for r in repeats for s in chain]
    return Launch(window, batch, q, k, _pack(packed, num_rows * (q.stop - q.start), num_rows * (k.stop - k.start)))


def _fits_dense_call(segment: _Segment, window: Window) -> bool:
    """Whether every generation computes a call without segments right.

    FlashAttention-2 takes a limit of at least as many keys as there are for no limit, also on the right, where it cuts
    off keys of the first queries if there are more queries than keys. A varlen call can state longer keys instead.
    """
    unlimited = window.left is None and window.right is None
    return unlimited or window.causal or segment.k_stop - segment.k_start >= segment.q_stop - segment.q_start


def _pack(segments: list[_Segment], total_q: int, total_k: int) -> Packing:
    q_ends, k_ends = [0], [0]

    def end(q_stop: int, k_stop: int) -> None:
        if (q_stop, k_stop) != (q_ends[-1], k_ends[-1]):
            q_ends.append(q_stop)
            k_ends.append(k_stop)

    for segment in segments:
        end(segment.q_start, k_ends[-1])
        end(segment.q_start, segment.k_start)
        end(segment.q_stop, segment.k_stop)
    end(total_q, k_ends[-1])
    end(total_q, total_k)
    q, k = np.array(q_ends, dtype=np.int32), np.array(k_ends, dtype=np.int32)
    rows = np.concatenate([np.arange(s.q_start, s.q_stop, dtype=np.int32) for s in segments])
    return Packing(q, k, int(np.diff(q).max()), int(np.diff(k).max()), rows if len(rows) < total_q else None)
