"""The work list of a launch: the rows that each program computes, as two tables of integers.

A program owns a block of rows on one side: of queries in the forward and for dq, of keys for dk and dv. Its item
lists the rows of the other side that the block attends to, as *runs* over all tiles, so that no other program writes to
the block:

    own block ─►  ◥▉▉▉▉▉▉▉◣     full runs: whole steps, visible to every row of the block, computed without a mask
                  ╎            ╎    edge runs: steps that a diagonal, or an end of a tile, cuts through

Steps begin at the first visible row of the tile. Items are sorted by cost, the longest first, so that the last programs
to run are short.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ringattn.geometry.intervals import expand
from ringattn.geometry.masks import HI, K_START, K_STOP, LO, Q_START, Q_STOP
from ringattn.geometry.tiles import BATCH, EVERY_BATCH_ROW
from ringattn.types import Ints

Table = npt.NDArray[np.int32]

_TRANSPOSED_COLUMNS = [K_START, K_STOP, Q_START, Q_STOP, HI, LO, BATCH]


class WorkList(NamedTuple):
    """The work list of one launch, the same for each head.

    items: (n, 5): batch row, first own row, and three indices into `runs`: first full run, first edge run, end.
    runs: (m, 6): rows [start, stop) of the other side, and for edge runs the mask: lo, hi, own_start, own_stop allow
        the own rows [own_start, own_stop) with lo <= other - own <= hi.
    """

    items: Table
    runs: Table


def transpose_tiles(table: Ints) -> Ints:
    """Returns a tile table with queries and keys exchanged, for the work list of keys."""
    t = table[:, _TRANSPOSED_COLUMNS]
    t[:, [LO, HI]] *= -1
    return t


def build_work_list(table: Ints, num_rows: int, batch: int, block: int, step: int) -> WorkList:
    """Returns the work list of a tile table.

    Args:
        table: (n, 7) int64, tight tiles. Programs own blocks of their query side.
        num_rows: rows of the query side; the last block may be incomplete.
        batch: number of batch rows.
        block: own rows per program.
        step: rows of the other side per step.
    """
    table = _expand_batch_rows(table, batch)
    tile, number = expand(table[:, Q_START] // block, -(-table[:, Q_STOP] // block))
    t, first = table[tile], number * block
    last = np.minimum(first + block, num_rows) - 1
    own_start, own_stop = np.maximum(t[:, Q_START], first), np.minimum(t[:, Q_STOP], last + 1)
    # Rows visible to any row of the block, and rows visible to all of them.
    start = np.maximum(t[:, K_START], own_start + t[:, LO])
    stop = np.minimum(t[:, K_STOP], own_stop + t[:, HI])
    whole = (own_start == first) & (own_stop == last + 1)
    common_start = np.maximum(t[:, K_START], last + t[:, LO])
    common_stop = np.minimum(t[:, K_STOP], first + t[:, HI] + 1)
    full_start = start + -(-(common_start - start) // step) * step
    num_full = np.where(whole, np.maximum(common_stop - full_start, 0) // step, 0)
    full_start = np.where(num_full > 0, full_start, stop)
    full_stop = full_start + num_full * step

    bounds = [t[:, LO], t[:, HI], own_start, own_stop]
    parts = ((full_start, full_stop), (start, full_start), (full_stop, stop))
    runs = np.concatenate([np.stack([a, b, *bounds], axis=1) for a, b in parts])
    edge = np.repeat([0, 1, 1], len(t))
    block_key = np.tile(t[:, BATCH] * (num_rows // block + 1) + number, 3)
    order = np.lexsort((runs[:, 0], edge, block_key))
    order = order[(runs[:, 0] < runs[:, 1])[order]]
    return _order_by_cost(runs[order], edge[order], block_key[order], num_rows // block + 1, block, step)


def _expand_batch_rows(table: Ints, batch: int) -> Ints:
    """Repeats tiles of every batch row for each batch row."""
    every = table[:, BATCH] == EVERY_BATCH_ROW
    index, row = expand(np.where(every, 0, table[:, BATCH]), np.where(every, batch, table[:, BATCH] + 1))
    t = table[index]
    t[:, BATCH] = row
    return t


def _order_by_cost(runs: Ints, edge: Ints, block_key: Ints, num_blocks: int, block: int, step: int) -> WorkList:
    """Makes the items of runs that are sorted by block, full runs first."""
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


def heads_per_section(num_heads: int, group: int, bytes_per_group: int, cache_bytes: int) -> int:
    """Returns how many heads to run side by side, so that the rows that they read stay in the cache.

    Args:
        num_heads: heads of a launch.
        group: heads that read the same rows; a section holds whole groups.
        bytes_per_group: bytes that a group reads.
        cache_bytes: size of the cache in bytes.
    """
    groups = max(1, cache_bytes // max(bytes_per_group, 1))
    return min(groups * group, num_heads)
