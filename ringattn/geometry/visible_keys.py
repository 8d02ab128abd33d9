"""The keys that single queries see, as ranges: masks lowered for the few rows of a decoding step."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ringattn.errors import MaskError
from ringattn.geometry.masks import HI, K_START, K_STOP, LO, Q_START, Q_STOP, Mask
from ringattn.types import Ints


@lru_cache(maxsize=64)
def visible_key_ranges(mask: Mask, start: int, stop: int) -> Ints:
    """Returns the range of keys that each query in [start, stop) sees, in a sequence of `stop` tokens.

    Args:
        mask: the allowed pairs.
        start: position of the first query.
        stop: the position after the last query.
    Returns:
        (stop - start, 2) int64: the first visible key and the position after the last one; (0, 0) if there is none.
    Raises:
        MaskError: when a query sees two ranges of keys that do not touch, or the mask is for another length.
    """
    slices = mask.slices(stop, stop)
    slices = slices[(slices[:, Q_STOP] > start) & (slices[:, Q_START] < stop)]
    found = np.zeros((stop - start, 2), dtype=np.int64)
    for row, q in enumerate(range(start, stop)):
        s = slices[(slices[:, Q_START] <= q) & (q < slices[:, Q_STOP])]
        firsts, stops = np.maximum(s[:, K_START], q + s[:, LO]), np.minimum(s[:, K_STOP], q + s[:, HI] + 1)
        some = firsts < stops
        firsts, stops = np.sort(firsts[some]), np.sort(stops[some])
        if (firsts[1:] != stops[:-1]).any():
            raise MaskError(f"mask={mask}: the query at {q} sees several runs of keys; when decoding it must see one")
        if len(firsts):
            found[row] = firsts[0], stops[-1]
    return found
