"""Half-open intervals of integers, as arrays: which of them overlap, and the integers in them."""

from __future__ import annotations

import numpy as np

from ringattn.types import Ints


def overlapping_pairs(a_start: Ints, a_stop: Ints, b_start: Ints, b_stop: Ints) -> tuple[Ints, Ints]:
    """Returns the indices (i, j) of all intervals a[i], b[j] that share a position, ordered by i.

    Intervals are half-open and may overlap among themselves; empty ones share nothing. Memory follows the
    number of pairs when the intervals of b do not nest deeply, which is so for slices and for ranges of step 1.
    """
    order = np.argsort(b_start, kind="stable")
    start, stop = b_start[order], b_stop[order]
    # Before `first`, every interval of b has ended; from `last` on, none has begun.
    first = np.searchsorted(np.maximum.accumulate(stop), a_start, side="right")
    last = np.searchsorted(start, a_stop, side="left")
    index_a, position = expand(first, last)
    keep = (stop[position] > a_start[index_a]) & (a_stop[index_a] > a_start[index_a])
    keep &= stop[position] > start[position]
    return index_a[keep], order[position[keep]]


def expand(first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """Returns (i, x) for every i and every x in [first[i], last[i])."""
    counts = np.maximum(last - first, 0)
    index = np.repeat(np.arange(len(first), dtype=np.int64), counts)
    ends = np.cumsum(counts)
    within = np.arange(len(index), dtype=np.int64) - np.repeat(ends - counts, counts)
    return index, first[index] + within
