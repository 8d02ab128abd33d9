"""Tiles: masks and layouts, lowered to local row numbers. Kernels see neither masks nor layouts, only tiles.

A tile says: queries in rows [q_start, q_stop) of this rank attend to keys in rows [k_start, k_stop) of one block
of keys, where lo <= j - i <= hi for query row i and key row j. Tiles are kept *tight* (no row without a pair, a
band no wider than the pairs in it), so that equal sets of pairs look equal, and two tiles can be joined exactly
when the tile around them holds no pair more than they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from ringattn.geometry.intervals import expand, overlapping_pairs
from ringattn.geometry.layout import Layout
from ringattn.geometry.masks import HI, K_START, K_STOP, LO, Q_START, Q_STOP, Mask
from ringattn.types import Bools, Ints, Rows

EVERY_BATCH_ROW = -1

# Columns of a tile table that stand before the six of a slice table.
BATCH = 6
SOURCE = 7
_HULL_STARTS = [Q_START, K_START, LO]
_HULL_STOPS = [Q_STOP, K_STOP, HI]


class Tile(NamedTuple):
    """Local query rows x local key rows, between two diagonals, in one batch row (`batch`) or in all (-1)."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    lo: int
    hi: int
    batch: int = EVERY_BATCH_ROW


class Tiles:
    """An immutable list of disjoint, tight tiles against one block of keys.

    Args:
        table: (n, 7) int64: q_start, q_stop, k_start, k_stop, lo, hi, batch.
    """

    table: Ints

    def __init__(self, table: Ints) -> None:
        self.table = np.ascontiguousarray(table, dtype=np.int64)
        self.table.setflags(write=False)
        # What a kernel makes of the tiles, by its name, so that it makes it once.
        self.kernel_data: dict[str, Any] = {}

    @classmethod
    def of(cls, *tiles: Tile) -> Tiles:
        """Returns the tight form of these tiles, without empty ones."""
        table = np.array(tiles, dtype=np.int64).reshape(-1, 7)
        return cls(_tighten(table))

    @cached_property
    def rows(self) -> tuple[Tile, ...]:
        """The tiles, as named tuples of Python integers."""
        return tuple(Tile(*row) for row in self.table.tolist())

    def __iter__(self) -> Iterator[Tile]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.table)

    def __bool__(self) -> bool:
        return len(self.table) > 0

    @cached_property
    def bounding_box(self) -> BoundingBox:
        """The smallest rectangle around all tiles, and the tiles in row numbers that count from its corner."""
        if not len(self.table):
            return BoundingBox(slice(0, 0), slice(0, 0), self)
        q_start, k_start = (int(self.table[:, c].min()) for c in (Q_START, K_START))
        q_stop, k_stop = (int(self.table[:, c].max()) for c in (Q_STOP, K_STOP))
        shift = np.array([q_start, q_start, k_start, k_start, k_start - q_start, k_start - q_start, 0])
        inner = Tiles(self.table - shift) if q_start or k_start else self
        return BoundingBox(slice(q_start, q_stop), slice(k_start, k_stop), inner)

    def select(self, rows: Rows, column: int, *, renumber: bool) -> Tiles:
        """Returns the pairs of the tiles that lie in these rows of one side.

        Args:
            rows: rows of the side, ascending.
            column: the side: Q_START for query rows, K_START for key rows.
            renumber: whether the selected rows are numbered 0, 1, ... in their order, as in a block that holds these
                rows only; otherwise they keep their numbers.
        """
        table, run = self._clipped(rows, column)
        if renumber:
            length = np.array([len(r) for r in rows], dtype=np.int64)
            shift = (np.cumsum(length) - length - np.array([r.start for r in rows], dtype=np.int64))[run]
            table[:, column : column + 2] += shift[:, None]
            table[:, LO : HI + 1] += (shift if column == K_START else -shift)[:, None]
        return _tighten_and_join(table)

    def _clipped(self, rows: Rows, column: int) -> tuple[Ints, Ints]:
        """Clips each tile to each range that it overlaps; returns a table, and the index of the range of each entry."""
        start = np.array([r.start for r in rows], dtype=np.int64)
        stop = np.array([r.stop for r in rows], dtype=np.int64)
        tile, run = overlapping_pairs(self.table[:, column], self.table[:, column + 1], start, stop)
        t = self.table[tile].copy()
        t[:, column] = np.maximum(t[:, column], start[run])
        t[:, column + 1] = np.minimum(t[:, column + 1], stop[run])
        return t, run

    def area(self, batch: int = 1) -> int:
        """Returns the number of (query, key) pairs of the tiles, summed over `batch` batch rows."""
        copies = np.where(self.table[:, BATCH] == EVERY_BATCH_ROW, batch, 1)
        return int((areas(self.table) * copies).sum())

    def __repr__(self) -> str:
        return f"Tiles({len(self)} tiles, area {self.area()})"


class BoundingBox(NamedTuple):
    """A rectangle of local rows, and tiles in row numbers that count from its corner."""

    q: slice
    k: slice
    tiles: Tiles


NO_TILES = Tiles(np.empty((0, 7), dtype=np.int64))


def areas(table: Ints) -> Ints:
    """Returns the number of pairs (i, j) of each tile of a table, (n,) int64."""
    q_count = np.maximum(table[:, Q_STOP] - table[:, Q_START], 0)
    k_count = np.maximum(table[:, K_STOP] - table[:, K_START], 0)
    shift = table[:, K_START] - table[:, Q_START]

    def up_to(diagonal: Ints) -> Ints:
        """Pairs with j - i <= diagonal, counted from the tile's corner: sum over i of clip(i + diagonal + 1, 0, k)."""
        d = np.clip(diagonal, -q_count, k_count)
        cut = d - k_count
        return _triangle(q_count + d) - _triangle(d) - _triangle(q_count + cut) + _triangle(cut)

    size: Ints = np.maximum(up_to(table[:, HI] - shift) - up_to(table[:, LO] - shift - 1), 0)
    return size


def _triangle(x: Ints) -> Ints:
    x = np.maximum(x, 0)
    return x * (x + 1) // 2


def _tighten(table: Ints) -> Ints:
    """Removes rows without a pair, diagonals without a pair, and empty tiles."""
    t = table.copy()
    t[:, Q_START] = np.maximum(t[:, Q_START], t[:, K_START] - t[:, HI])
    t[:, Q_STOP] = np.minimum(t[:, Q_STOP], t[:, K_STOP] - t[:, LO])
    t[:, K_START] = np.maximum(t[:, K_START], t[:, Q_START] + t[:, LO])
    t[:, K_STOP] = np.minimum(t[:, K_STOP], t[:, Q_STOP] + t[:, HI])
    t[:, LO] = np.maximum(t[:, LO], t[:, K_START] - t[:, Q_STOP] + 1)
    t[:, HI] = np.minimum(t[:, HI], t[:, K_STOP] - 1 - t[:, Q_START])
    some = (t[:, Q_START] < t[:, Q_STOP]) & (t[:, K_START] < t[:, K_STOP]) & (t[:, LO] <= t[:, HI])
    return t[some]


def _tighten_and_join(table: Ints) -> Tiles:
    t = _tighten(table)
    return Tiles(_coalesce(np.column_stack([t, np.zeros_like(t[:, BATCH])]))[:, :SOURCE])


def _coalesce(table: Ints) -> Ints:
    """Joins tiles of the same source and batch row as long as the tile around two of them holds only their pairs."""
    while True:
        before = len(table)
        for along, across in ((K_START, Q_START), (Q_START, K_START)):
            order = np.lexsort((table[:, along], table[:, across], table[:, BATCH], table[:, SOURCE]))
            table = _join_neighbours(table[order])
        if len(table) == before:
            return table


def _join_neighbours(table: Ints) -> Ints:
    while len(table) > 1:
        left, right = table[:-1], table[1:]
        hull = left.copy()
        hull[:, _HULL_STARTS] = np.minimum(left[:, _HULL_STARTS], right[:, _HULL_STARTS])
        hull[:, _HULL_STOPS] = np.maximum(left[:, _HULL_STOPS], right[:, _HULL_STOPS])
        size = areas(table)
        fits = (left[:, BATCH] == right[:, BATCH]) & (left[:, SOURCE] == right[:, SOURCE])
        fits &= areas(hull) == size[:-1] + size[1:]
        # Of a run of tiles that all fit their neighbours, join the 1st with the 2nd, the 3rd with the 4th, ...
        index = np.arange(len(fits))
        run_start = np.maximum.accumulate(np.where(fits, -1, index)) + 1
        join = np.flatnonzero(fits & ((index - run_start) % 2 == 0))
        if not len(join):
            break
        table = table.copy()
        table[join] = hull[join]
        table = np.delete(table, join + 1, axis=0)
    return table


class _Ranges(NamedTuple):
    """Ranges as arrays: piece x holds positions start + step * [0, length), in local rows offset + [0, length)."""

    owner: Ints
    start: Ints
    step: Ints
    length: Ints
    offset: Ints

    @property
    def stop(self) -> Ints:
        return np.where(self.length > 0, self.start + self.step * (self.length - 1) + 1, self.start)

    def take(self, index: Ints | Bools) -> _Ranges:
        return _Ranges(*(column[index] for column in self))

    def single_rows(self) -> _Ranges:
        piece, row = expand(np.zeros_like(self.length), self.length)
        return _Ranges(
            self.owner[piece],
            self.start[piece] + row * self.step[piece],
            np.ones_like(row),
            np.ones_like(row),
            self.offset[piece] + row,
        )


def _ceil_div(a: Ints, b: Ints) -> Ints:
    return -((-a) // b)


@lru_cache(maxsize=32)
def tiles_of_rank(masks: tuple[Mask, ...], layout: Layout, kv_layout: Layout, rank: int) -> dict[int, Tiles]:
    """Returns the tiles of a rank's queries against the block of every source rank with a key that they see.

    Args:
        masks: one mask for all batch rows, or one for each.
        layout: the positions of the queries.
        kv_layout: the positions of the keys and values.
        rank: the rank of the queries.
    Raises:
        MaskError: when a mask does not fit the lengths.
    """
    q, k = _Ranges(*layout.runs), _Ranges(*kv_layout.runs)
    table, _, k_owner = _lowered(masks, layout, kv_layout, q.take(q.owner == rank), k)
    return _by_source(table, k_owner)


@lru_cache(maxsize=32)
def tiles_of_keys(masks: tuple[Mask, ...], layout: Layout, kv_layout: Layout, rank: int) -> dict[int, Tiles]:
    """Returns the tiles of every rank with a query that sees a key of `rank`: the transpose of `tiles_of_rank`."""
    q, k = _Ranges(*layout.runs), _Ranges(*kv_layout.runs)
    table, q_owner, _ = _lowered(masks, layout, kv_layout, q, k.take(k.owner == rank))
    return _by_source(table, q_owner)


def _lowered(
    masks: tuple[Mask, ...], layout: Layout, kv_layout: Layout, q: _Ranges, k: _Ranges
) -> tuple[Ints, Ints, Ints]:
    """Returns the tiles of these ranges under all masks, (n, 7), and the owners of their queries and keys, (n,)."""
    steps = np.unique(np.concatenate([q.step[q.length > 1], k.step[k.length > 1]]))
    if len(steps) > 1:
        # A band between ranges of different steps is no band in local rows, unless one of them is a single row.
        q = q.single_rows()
    tables = []
    for row, mask in enumerate(masks):
        batch = EVERY_BATCH_ROW if len(masks) == 1 else row
        tables.append(_lower(mask.slices(layout.seq_len, kv_layout.seq_len), q, k, batch))
    table = np.concatenate(tables)
    return table[:, :SOURCE], table[:, SOURCE], table[:, SOURCE + 1]


def _by_source(table: Ints, source: Ints) -> dict[int, Tiles]:
    table = _coalesce(np.column_stack([table, source]))
    order = np.lexsort((table[:, K_START], table[:, Q_START], table[:, BATCH], table[:, SOURCE]))
    table = table[order]
    sources, first = np.unique(table[:, SOURCE], return_index=True)
    parts = np.split(table[:, :SOURCE], first[1:])
    return {int(source): Tiles(part) for source, part in zip(sources, parts, strict=False)}


def _lower(slices: Ints, q: _Ranges, k: _Ranges, batch: int) -> Ints:
    """Intersects slices with ranges of queries and keys: (n, 9) tight tiles; the last columns are the owners."""
    piece, sl = overlapping_pairs(q.start, q.stop, slices[:, Q_START], slices[:, Q_STOP])
    qs, s = q.take(piece), slices[sl]
    i_start = np.clip(_ceil_div(s[:, Q_START] - qs.start, qs.step), 0, qs.length)
    i_stop = np.clip(_ceil_div(s[:, Q_STOP] - qs.start, qs.step), 0, qs.length)
    some = i_start < i_stop
    qs, s, i_start, i_stop = qs.take(some), s[some], i_start[some], i_stop[some]
    # Only the keys that a query of the range may see.
    seen_start = np.maximum(s[:, K_START], qs.start + qs.step * i_start + s[:, LO])
    seen_stop = np.minimum(s[:, K_STOP], qs.start + qs.step * (i_stop - 1) + s[:, HI] + 1)
    pair, key = overlapping_pairs(seen_start, seen_stop, k.start, k.stop)
    qs, s, i_start, i_stop, ks = qs.take(pair), s[pair], i_start[pair], i_stop[pair], k.take(key)
    j_start = np.clip(_ceil_div(s[:, K_START] - ks.start, ks.step), 0, ks.length)
    j_stop = np.clip(_ceil_div(s[:, K_STOP] - ks.start, ks.step), 0, ks.length)
    step = np.where(qs.length == 1, ks.step, qs.step)
    shift = ks.offset - qs.offset
    columns = [
        qs.offset + i_start,
        qs.offset + i_stop,
        ks.offset + j_start,
        ks.offset + j_stop,
        _ceil_div(s[:, LO] + qs.start - ks.start, step) + shift,
        (s[:, HI] + qs.start - ks.start) // step + shift,
        np.full(len(pair), batch, dtype=np.int64),
        qs.owner,
        ks.owner,
    ]
    return _tighten(np.stack(columns, axis=1))


@lru_cache(maxsize=64)
def needed_blocks(masks: tuple[Mask, ...], layout: Layout, kv_layout: Layout) -> Bools:
    """Returns a (world, world) bool table: [source, rank] is True where a query of `rank` sees a key of `source`."""
    needed = np.zeros((kv_layout.world_size, layout.world_size), dtype=bool)
    for mask in masks:
        needed |= _needs_of_mask(mask, layout, kv_layout)
    needed.setflags(write=False)
    return needed


def _needs_of_mask(mask: Mask, layout: Layout, kv_layout: Layout) -> Bools:
    slices = mask.slices(layout.seq_len, kv_layout.seq_len)
    q, k = layout.segments, kv_layout.segments
    needed = np.zeros((kv_layout.world_size, layout.world_size), dtype=bool)
    # The queries that see any of some consecutive keys are consecutive: one interval for each piece of keys.
    sl, segment = overlapping_pairs(slices[:, K_START], slices[:, K_STOP], k.start, k.stop)
    s, owner = slices[sl], k.owner[segment]
    k_first = np.maximum(s[:, K_START], k.start[segment])
    k_last = np.minimum(s[:, K_STOP], k.stop[segment]) - 1
    q_start = np.maximum(s[:, Q_START], k_first - s[:, HI])
    q_stop = np.minimum(s[:, Q_STOP], k_last - s[:, LO] + 1)
    some = q_start < q_stop
    owner, q_start, q_stop = owner[some], q_start[some], q_stop[some]
    first = np.searchsorted(q.stop, q_start, side="right")
    last = np.searchsorted(q.start, q_stop, side="left")
    # Owners that repeat with a period (as in a striped layout) need only one period of columns.
    world = layout.world_size
    periodic = len(q.owner) > world and bool((q.owner[world:] == q.owner[:-world]).all())
    period = world if periodic else len(q.owner)
    if not period:
        return needed
    count = np.minimum(last - first, period)
    first = first % period
    by_owner = np.argsort(q.owner[:period], kind="stable")
    ranks, group = np.unique(q.owner[:period][by_owner], return_index=True)
    width = 2 * period + 1
    batch = max(1, (1 << 24) // width)
    for low in range(0, kv_layout.world_size, batch):
        here = (owner >= low) & (owner < low + batch)
        height = min(batch, kv_layout.world_size - low)
        base = (owner[here] - low) * width + first[here]
        marks = np.bincount(base, minlength=height * width) - np.bincount(base + count[here], minlength=height * width)
        inside = np.cumsum(marks.reshape(height, width), axis=1) > 0
        seen = inside[:, :period] | inside[:, period : 2 * period]
        needed[low : low + height, ranks] = np.logical_or.reduceat(seen[:, by_owner], group, axis=1)
    return needed


def work_of_ranges(mask: Mask, ranges: Sequence[range], seq_len: int, k_len: int | None = None) -> Ints:
    """Returns the number of pairs of the queries of each range (of step 1), (len(ranges),) int64."""
    k_len = seq_len if k_len is None else k_len
    start = np.array([r.start for r in ranges], dtype=np.int64)
    stop = np.array([r.stop for r in ranges], dtype=np.int64)
    return work_of_intervals(mask.slices(seq_len, k_len), start, stop)


def work_of_intervals(slices: Ints, start: Ints, stop: Ints) -> Ints:
    """Returns the number of pairs of the queries of each interval under these slices, (len(start),) int64."""
    piece, sl = overlapping_pairs(start, stop, slices[:, Q_START], slices[:, Q_STOP])
    part = slices[sl].copy()
    part[:, Q_START] = np.maximum(part[:, Q_START], start[piece])
    part[:, Q_STOP] = np.minimum(part[:, Q_STOP], stop[piece])
    work = np.zeros(len(start), dtype=np.int64)
    np.add.at(work, piece, areas(part))
    return work


@lru_cache(maxsize=64)
def pairs_of_queries(masks: tuple[Mask, ...], layout: Layout, k_len: int) -> tuple[int, ...]:
    """Returns the work of each rank: the number of (query, key) pairs of its queries, summed over the masks."""
    q = layout.segments
    work = np.zeros(layout.world_size, dtype=np.int64)
    for mask in masks:
        np.add.at(work, q.owner, work_of_intervals(mask.slices(layout.seq_len, k_len), q.start, q.stop))
    return tuple(work.tolist())
