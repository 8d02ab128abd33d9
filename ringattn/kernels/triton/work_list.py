"""From tiles to a work list: what each program of a kernel computes, as two tables of integers.

A program owns a block of rows on one side: of queries in the forward and for dq, of keys for dk and dv. Its item
tells which rows of the other side they meet, as *runs* over all tiles, so that nobody else writes to its block:

    own block ─►  ◥▉▉▉▉▉▉▉◣     full runs: whole steps that every row of the block sees; no mask is applied there
                  ╎            ╎    edge runs: the steps that a diagonal, or an end of a tile, cuts through

Steps begin where the block's view of the tile begins. Items are in the order of their cost, the longest first, so
that the last programs to run are short ones.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ringattn.geometry.masks import HI, K_START, K_STOP, LO, Q_START, Q_STOP, expand
from ringattn.geometry.tiles import BATCH, EVERY_BATCH_ROW
from ringattn.types import Ints

Table = npt.NDArray[np.int32]

_TRANSPOSED = [K_START, K_STOP, Q_START, Q_STOP, HI, LO, BATCH]


class WorkList(NamedTuple):
    """The work list of one launch, for each head.

    items: (n, 5): batch row, first own row, and where in `runs` its full runs begin, its edge runs begin, both end.
    runs: (m, 6): rows [start, stop) of the other side; for edge runs also what may meet there: own rows
        [own_start, own_stop), with lo <= other - own <= hi.
    """

    items: Table
    runs: Table


def transposed(table: Ints) -> Ints:
    """Returns a tile table with queries and keys exchanged: the schedule of keys is that of its queries."""
    t = table[:, _TRANSPOSED]
    t[:, [LO, HI]] *= -1
    return t


def build(table: Ints, num_rows: int, batch: int, block: int, step: int) -> WorkList:
    """Returns the work list of a tile table.

    Args:
        table: (n, 7) int64, tight tiles. Their query side is the one whose blocks programs own.
        num_rows: rows on that side; blocks may overhang them.
        batch: rows of the batch.
        block: own rows of a program.
        step: rows of the other side that it takes at a time.
    """
    table = _by_batch_row(table, batch)
    tile, number = expand(table[:, Q_START] // block, -(-table[:, Q_STOP] // block))
    t, first = table[tile], number * block
    last = np.minimum(first + block, num_rows) - 1
    own_start, own_stop = np.maximum(t[:, Q_START], first), np.minimum(t[:, Q_STOP], last + 1)
    # What any of the block's rows sees, and what all of them see.
    start = np.maximum(t[:, K_START], own_start + t[:, LO])
    stop = np.minimum(t[:, K_STOP], own_stop + t[:, HI])
    whole = (own_start == first) & (own_stop == last + 1)
    seen_start, seen_stop = np.maximum(t[:, K_START], last + t[:, LO]), np.minimum(t[:, K_STOP], first + t[:, HI] + 1)
    full_start = start + -(-(seen_start - start) // step) * step
    num_full = np.where(whole, np.maximum(seen_stop - full_start, 0) // step, 0)
    full_start = np.where(num_full > 0, full_start, stop)
    full_stop = full_start + num_full * step

    bounds = [t[:, LO], t[:, HI], own_start, own_stop]
    parts = ((full_start, full_stop), (start, full_start), (full_stop, stop))
    runs = np.concatenate([np.stack([a, b, *bounds], axis=1) for a, b in parts])
    edge = np.repeat([0, 1, 1], len(t))
    block_key = np.tile(t[:, BATCH] * (num_rows // block + 1) + number, 3)
    order = np.lexsort((runs[:, 0], edge, block_key))
    order = order[(runs[:, 0] < runs[:, 1])[order]]
    return _listed(runs[order], edge[order], block_key[order], num_rows // block + 1, block, step)


def _by_batch_row(table: Ints, batch: int) -> Ints:
    """Tiles of every batch row, told once for each."""
    every = table[:, BATCH] == EVERY_BATCH_ROW
    index, row = expand(np.where(every, 0, table[:, BATCH]), np.where(every, batch, table[:, BATCH] + 1))
    t = table[index]
    t[:, BATCH] = row
    return t


def _listed(runs: Ints, edge: Ints, block_key: Ints, num_blocks: int, block: int, step: int) -> WorkList:
    """Items over runs that are in the order of their blocks, full ones first."""
    if runs.size and int(np.abs(runs).max()) > np.iinfo(np.int32).max:
        raise OverflowError(f"tiles reach row {int(np.abs(runs).max())}; row numbers must fit 32 bits")
    keys, begin, count = np.unique(block_key, return_index=True, return_counts=True)
    end = begin + count
    num_edges, num_steps = (np.concatenate([[0], np.cumsum(x)]) for x in (edge, -(-(runs[:, 1] - runs[:, 0]) // step)))
    middle = end - (num_edges[end] - num_edges[begin])
    cost = num_steps[end] - num_steps[begin]
    items = np.stack([keys // num_blocks, keys % num_blocks * block, begin, middle, end], axis=1)
    longest_first = np.argsort(-cost, kind="stable")
    return WorkList(items[longest_first].astype(np.int32), runs.astype(np.int32))


def heads_together(num_heads: int, group: int, bytes_per_group: int, cache_bytes: int) -> int:
    """Returns how many heads programs should run through at a time, so that what they all read stays in the cache.

    Args:
        num_heads: heads of a launch.
        group: heads that read the same; they stay together.
        bytes_per_group: what the heads of a group read.
        cache_bytes: the size of the cache.
    """
    groups = max(1, cache_bytes // max(bytes_per_group, 1))
    return min(groups * group, num_heads)
