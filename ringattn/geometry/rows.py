"""Sets of local rows, as ascending ranges that do not touch: equal sets are equal values."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ringattn.types import Ints, Rows


def union_of(start: Ints, stop: Ints) -> Rows:
    """Returns the union of intervals [start, stop), none of them empty."""
    if not len(start):
        return ()
    order = np.argsort(start, kind="stable")
    start, reach = start[order], np.maximum.accumulate(stop[order])
    first = np.ones(len(start), dtype=bool)
    first[1:] = start[1:] > reach[:-1]
    last = np.append(first[1:], True)
    return tuple(map(range, start[first].tolist(), reach[last].tolist()))


def count_rows(rows: Rows) -> int:
    """Returns the number of rows."""
    return sum(map(len, rows))


def split_rows(rows: Rows, parts: int) -> list[Rows]:
    """Cuts the rows, in order, into `parts` sets whose sizes differ by at most one."""
    total = count_rows(rows)
    ends = [total * part // parts for part in range(parts + 1)]
    return [slice_rows(rows, a, b) for a, b in pairwise(ends)]


def halves(num_rows: int) -> tuple[Rows, Rows]:
    """Cuts a block in two: its outer quarters, and its middle.

    Both parts have the same work if the work per row is constant, rises linearly (as under a causal mask), or is in one
    half of the block only (as in the steps of a zigzag ring).
    """
    quarter = num_rows // 4
    outer, middle = (range(quarter), range(num_rows - quarter, num_rows)), range(quarter, num_rows - quarter)
    return tuple(run for run in outer if run), (middle,) if middle else ()


def slice_rows(rows: Rows, first: int, last: int) -> Rows:
    """Returns the rows number first, first + 1, ..., last - 1 of the set."""
    found, seen = [], 0
    for run in rows:
        part = run[max(first - seen, 0) : max(last - seen, 0)]
        if part:
            found.append(part)
        seen += len(run)
    return tuple(found)
