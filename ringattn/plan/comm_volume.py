"""Communication volume: how many rows each rank receives and sends, and how many pairs it computes.

The sums follow from intervals of positions, without a table of all pairs of ranks: fast for thousands of ranks.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ringattn.geometry.intervals import overlapping_pairs
from ringattn.geometry.layout import Layout
from ringattn.geometry.masks import HI, K_START, K_STOP, LO, Q_START, Q_STOP, Mask
from ringattn.geometry.tiles import work_of_intervals
from ringattn.types import Ints


@lru_cache(maxsize=32)
def pairs_of_ranks(masks: tuple[Mask, ...], layout: Layout, kv_layout: Layout, column: int) -> Ints:
    """Returns how many allowed pairs each rank's rows of one side have: (world,) int64.

    Args:
        column: Q_START for the pairs of a rank's queries, K_START for the pairs of its keys.
    """
    held = layout if column == Q_START else kv_layout
    own = held.segments
    pairs = np.zeros(held.world_size, dtype=np.int64)
    for mask in masks:
        np.add.at(pairs, own.owner, work_of_intervals(_slices(mask, layout, kv_layout, column), own.start, own.stop))
    pairs.setflags(write=False)
    return pairs


@lru_cache(maxsize=32)
def rows_exchanged(masks: tuple[Mask, ...], layout: Layout, kv_layout: Layout, column: int) -> tuple[Ints, Ints]:
    """Returns how many rows each rank receives from others, and sends to others: two of (world,) int64.

    Args:
        column: the rows that move: K_START for keys, Q_START for queries.
    """
    held = kv_layout if column == K_START else layout
    own, width, world = held.segments, held.seq_len + 1, held.world_size
    # All ranks on one line of numbers: the intervals of rank r are shifted by r * width.
    start, stop = _united(*_needed(masks, layout, kv_layout, column, width))
    first, last = own.start + own.owner * width, own.stop + own.owner * width
    receiver, has = start // width, overlapping_pairs(start, stop, first, last)
    both = np.minimum(stop[has[0]], last[has[1]]) - np.maximum(start[has[0]], first[has[1]])
    local = np.bincount(own.owner[has[1]], both, world)
    start, stop = start - receiver * width, stop - receiver * width
    rows = _up_to(stop, own.start, own.stop) - _up_to(start, own.start, own.stop)
    copies = _up_to(own.stop, start, stop) - _up_to(own.start, start, stop)
    received, sent = (np.bincount(*of, world) - local for of in ((receiver, rows), (own.owner, copies)))
    found = received.astype(np.int64), sent.astype(np.int64)
    for counts in found:
        counts.setflags(write=False)
    return found


def _slices(mask: Mask, layout: Layout, kv_layout: Layout, column: int) -> Ints:
    """A mask's slices; with queries and keys exchanged for K_START."""
    slices = mask.slices(layout.seq_len, kv_layout.seq_len)
    if column == Q_START:
        return slices
    transposed: Ints = slices[:, [K_START, K_STOP, Q_START, Q_STOP, HI, LO]] * np.array([1, 1, 1, 1, -1, -1])
    return transposed


def _needed(masks: tuple[Mask, ...], layout: Layout, kv_layout: Layout, column: int, width: int) -> tuple[Ints, Ints]:
    """The positions of rows that each rank needs, as intervals; the intervals of rank r are shifted by r * width."""
    own, other = (layout.segments, Q_START) if column == K_START else (kv_layout.segments, K_START)
    starts, stops = [], []
    for mask in masks:
        slices = _slices(mask, layout, kv_layout, other)
        segment, index = overlapping_pairs(own.start, own.stop, slices[:, Q_START], slices[:, Q_STOP])
        s = slices[index]
        # The queries with at least one key; consecutive queries have consecutive keys.
        first = np.maximum.reduce([s[:, Q_START], own.start[segment], s[:, K_START] - s[:, HI]])
        last = np.minimum.reduce([s[:, Q_STOP], own.stop[segment], s[:, K_STOP] - s[:, LO]]) - 1
        start, stop = np.maximum(s[:, K_START], first + s[:, LO]), np.minimum(s[:, K_STOP], last + s[:, HI] + 1)
        some = (first <= last) & (start < stop)
        offset = own.owner[segment] * width
        starts.append((start + offset)[some])
        stops.append((stop + offset)[some])
    return np.concatenate(starts), np.concatenate(stops)


def _united(start: Ints, stop: Ints) -> tuple[Ints, Ints]:
    """The union of intervals, as intervals that do not touch."""
    order = np.argsort(start, kind="stable")
    start, reach = start[order], np.maximum.accumulate(stop[order])
    new = np.flatnonzero(np.append(True, start[1:] > reach[:-1])[: len(start)])
    return start[new], reach[np.append(new[1:] - 1, len(start) - 1)[: len(new)]]


def _up_to(position: Ints, start: Ints, stop: Ints) -> Ints:
    """How many positions of the intervals, counted with repetition, lie before each of these."""
    total = np.zeros_like(position)
    for ends, sign in ((np.sort(start), 1), (np.sort(stop), -1)):
        before = np.searchsorted(ends, position)
        total += sign * (before * position - np.append(0, np.cumsum(ends))[before])
    return total
