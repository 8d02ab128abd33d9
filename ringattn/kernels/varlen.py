"""Packing tiles into as few calls as a varlen kernel takes.

A varlen kernel attends segment by segment: queries [q_ends[s], q_ends[s + 1]) to keys [k_ends[s], k_ends[s + 1]), for
all segments in one call, under one window, which is aligned to each segment's last query and last key. Every tight
tile is a segment: its last query and its last key both take part, so the distances from them to its diagonals are
no less than zero. Tiles share a call when

- one window says what all of them mean. A diagonal that cuts nothing off a tile may lie anywhere beyond it, so a
  causal document that is shorter than the window goes with the longer ones;
- their queries and their keys are disjoint, and in the same order. What lies between them becomes segments without
  keys, or without queries, so that nothing is copied. Tiles that share keys or cross go into further calls: rows
  gathered for one call would cost a pass over them, and gradients a scattered sum. Steps of a staircase, which a
  layout of blocks makes of a causal mask, are cut at halves, quarters, ... of the keys: pieces over the same keys
  join, and those of one size make one call, so that n steps take about log2(n) calls.

A call of one tile needs no segments: it is a rectangle of the tensors as they are.
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
    """Query i of a segment sees its key j when -left <= j - i - (keys - queries) <= right; None is no limit."""

    left: int | None
    right: int | None

    @property
    def causal(self) -> bool:
        """Whether it is what kernels call causal."""
        return self.left is None and self.right == 0


class Packing(NamedTuple):
    """Where the segments of a call end, (segments + 1,) int32 from 0 on, counted over its batch rows."""

    q_ends: Ints
    k_ends: Ints
    max_q: int
    max_k: int
    q_rows: Ints | None  # the queries that have keys; None if all have


@dataclass(frozen=True, eq=False)
class Launch:
    """One call: a block of batch rows, query rows and key rows, dense if there is no packing."""

    window: Window
    batch: slice
    q: slice
    k: slice
    packing: Packing | None = None


class _Segment(NamedTuple):
    """A tile, in rows counted over the batch, and its window; a diagonal that cuts nothing off is as far as it is."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    left: int
    right: int

    @property
    def window(self) -> Window:
        """Its limits, where they cut anything off."""
        return Window(
            self.left if self.left < self.k_stop - self.k_start - 1 else None,
            self.right if self.right < self.q_stop - self.q_start - 1 else None,
        )

    def fits(self, window: Window) -> bool:
        """Whether another tile's window leaves it just its own pairs."""
        own = self.window
        left = window.left == own.left or (own.left is None and (window.left or 0) >= self.left)
        right = window.right == own.right or (own.right is None and (window.right or 0) >= self.right)
        return left and right

    def shifted(self, rows: int, cols: int) -> _Segment:
        """The same, further on in the batch."""
        return self._replace(
            q_start=self.q_start + rows,
            q_stop=self.q_stop + rows,
            k_start=self.k_start + cols,
            k_stop=self.k_stop + cols,
        )


@lru_cache(maxsize=512)
def launches_of(tiles: Tiles, batch: int, num_q: int, num_k: int) -> tuple[Launch, ...]:
    """Returns calls that together hold each pair of the tiles once, and no other.

    Args:
        tiles: tight and disjoint.
        batch: how many batch rows there are.
        num_q: query rows of each.
        num_k: key rows of each.
    """
    # Tiles of every batch row are packed once, and repeated.
    alike = all(tile.batch == EVERY_BATCH_ROW for tile in tiles)
    segments = _segments(tiles, 1 if alike else batch, num_q, num_k)
    repeats = range(batch if alike else 1)
    return tuple(
        _launch(chain, repeats, num_q, num_k)
        for window, group in _by_window(segments).items()
        for chain in _fewest_chains(group, window)
    )


def _segments(tiles: Tiles, batch: int, num_q: int, num_k: int) -> list[_Segment]:
    found: list[_Segment] = []
    for tile in tiles:
        surplus = (tile.k_stop - tile.k_start) - (tile.q_stop - tile.q_start)
        corner = tile.k_start - tile.q_start
        here = _Segment(
            tile.q_start, tile.q_stop, tile.k_start, tile.k_stop, surplus + corner - tile.lo, tile.hi - corner - surplus
        )
        rows: Iterable[int] = range(batch) if tile.batch == EVERY_BATCH_ROW else (tile.batch,)
        found.extend(here.shifted(row * num_q, row * num_k) for row in rows)
    return found


def _by_window(segments: list[_Segment]) -> dict[Window, list[_Segment]]:
    """Groups segments that one window fits, those first that leave no choice."""
    groups: dict[Window, list[_Segment]] = {}
    for segment in sorted(segments, key=lambda s: s.window.count(None)):
        window = next((window for window in groups if segment.fits(window)), segment.window)
        groups.setdefault(window, []).append(segment)
    return groups


def _fewest_chains(segments: list[_Segment], window: Window) -> list[list[_Segment]]:
    chains = _chains(segments)
    if len(chains) > 1 and window == Window(None, None):
        chains = min(chains, _chains(_halved(segments)), key=len)
    return chains


def _halved(segments: list[_Segment]) -> list[_Segment]:
    """Cuts rectangles along their keys, at the largest powers of two of a unit, and joins those over the same keys."""
    unit = min(s.q_stop - s.q_start for s in segments)
    origin = min(s.k_start for s in segments)
    rows: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for segment in sorted(segments):
        for keys in _powers(segment.k_start - origin, segment.k_stop - origin, unit):
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


def _powers(start: int, stop: int, unit: int) -> Iterator[tuple[int, int]]:
    """Ranges that make up [start, stop): units times powers of two, each at a multiple of its size, and rests."""
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
            # The one that would be closed to more of the others.
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
    if len(chain) == 1 and _can_be_dense(first, window):
        first = first.shifted(-row * num_q, -row * num_k)
        q, k = slice(first.q_start, first.q_stop), slice(first.k_start, first.k_stop)
        return Launch(window, slice(row, row + len(repeats)), q, k)
    num_rows = (last.q_stop - 1) // num_q - row + len(repeats)
    batch, q, k = slice(row, row + num_rows), slice(0, num_q), slice(0, num_k)
    if num_rows == 1:
        # Rows of several batch rows follow one another only as wholes.
        q = slice(first.q_start - row * num_q, last.q_stop - row * num_q)
        k = slice(first.k_start - row * num_k, last.k_stop - row * num_k)
    origin = -row * num_q - q.start, -row * num_k - k.start
    packed = [s.shifted(origin[0] + r * num_q, origin[1] + r * num_k) for r in repeats for s in chain]
    return Launch(window, batch, q, k, _pack(packed, num_rows * (q.stop - q.start), num_rows * (k.stop - k.start)))


def _can_be_dense(segment: _Segment, window: Window) -> bool:
    """Whether a call without segments is understood by every kernel.

    FlashAttention-2 takes a limit of as many keys as there are, or more, for none, also on the right, where it would
    cut off keys of the first of more queries. A varlen call can be told of longer keys.
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
