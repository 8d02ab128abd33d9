"""Demand: how many rows, and how many pairs, two ranks have to do with each other. Tables of all ranks."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ringattn.geometry.layout import Ints, Layout
from ringattn.geometry.masks import K_START, Mask
from ringattn.geometry.rows import halves
from ringattn.geometry.tiles import areas, lowered_by_ranks


@lru_cache(maxsize=32)
def rows_seen(masks: tuple[Mask, ...], layout: Layout, kv_layout: Layout, column: int) -> Ints:
    """Returns how many rows of one side have an allowed pair with each rank of the other: (world, world) int64.

    Args:
        column: K_START counts key rows, [their rank, the queries' rank]; Q_START query rows, [theirs, the keys'].
    """
    world = layout.world_size
    counts = np.zeros(world * world)
    for table, q_owner, k_owner in lowered_by_ranks(masks, layout, kv_layout):
        counted, seeing = (k_owner, q_owner) if column == K_START else (q_owner, k_owner)
        pair = counted * world + seeing
        # Rows of each pair of ranks apart from those of all others, so that one sweep counts every union.
        base = pair * (max(layout.seq_len, kv_layout.seq_len) + 1)
        start, stop = base + table[:, column], base + table[:, column + 1]
        order = np.argsort(start, kind="stable")
        reach = np.maximum.accumulate(stop[order])
        new = np.maximum(reach - np.maximum(start[order], np.append(0, reach[:-1])), 0) if len(order) else reach
        np.add.at(counts, pair[order], new)
    found = counts.astype(np.int64).reshape(world, world)
    found.setflags(write=False)
    return found


@lru_cache(maxsize=32)
def pairs_seen(masks: tuple[Mask, ...], layout: Layout, kv_layout: Layout) -> Ints:
    """Returns how many allowed pairs two ranks have: (world, world) int64, [the queries' rank, the keys' rank]."""
    pairs = np.zeros((layout.world_size, layout.world_size), dtype=np.int64)
    for table, q_owner, k_owner in lowered_by_ranks(masks, layout, kv_layout):
        np.add.at(pairs, (q_owner, k_owner), areas(table))
    pairs.setflags(write=False)
    return pairs


@lru_cache(maxsize=32)
def pairs_seen_in_halves(masks: tuple[Mask, ...], layout: Layout, kv_layout: Layout, column: int) -> tuple[Ints, Ints]:
    """Returns the same of each half of the blocks of one side, as `rows.halves` cuts them.

    Args:
        column: whose blocks: K_START or Q_START.
    """
    held = kv_layout if column == K_START else layout
    whole = pairs_seen(masks, layout, kv_layout)
    middle = np.zeros_like(whole)
    runs = [halves(held.num_tokens(rank))[1] for rank in range(held.world_size)]
    start, stop = (
        np.array([getattr(r[0], end) if r else 0 for r in runs], dtype=np.int64) for end in ("start", "stop")
    )
    for table, q_owner, k_owner in lowered_by_ranks(masks, layout, kv_layout):
        owner = k_owner if column == K_START else q_owner
        part = table.copy()
        part[:, column] = np.maximum(part[:, column], start[owner])
        part[:, column + 1] = np.minimum(part[:, column + 1], stop[owner])
        np.add.at(middle, (q_owner, k_owner), areas(part))
    outer = whole - middle
    for found in (outer, middle):
        found.setflags(write=False)
    return outer, middle
