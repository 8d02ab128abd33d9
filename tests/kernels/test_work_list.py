"""The work list of the Triton kernels against the tiles spelled out pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn.geometry.tiles import Tile, Tiles
from ringattn.kernels.triton.work_list import WorkList, build_work_list, heads_per_section, transpose_tiles
from tests.geometry.brute import Counts, tile_counts
from tests.geometry.strategies import examples, tiles

BATCH = 2


def pairs(work_list: WorkList, rows: int, cols: int, block: int, step: int) -> Counts:
    """How often a program meets each (batch row, own row, other row), as the kernels do."""
    counts = np.zeros((BATCH, rows, cols), dtype=np.int64)
    i, j = np.arange(rows)[:, None], np.arange(cols)[None, :]
    for row, first, full, edge, end in work_list.items.tolist():
        own = (first <= i) & (i < first + block)
        for number in range(full, end):
            start, stop, lo, hi, own_start, own_stop = work_list.runs[number].tolist()
            assert 0 <= start < stop <= cols
            seen = own & (start <= j) & (j < stop)
            if number < edge:
                assert (stop - start) % step == 0, "full runs are whole steps: nothing behind them is loaded"
            else:
                seen = seen & (lo <= j - i) & (j - i <= hi) & (own_start <= i) & (i < own_stop)
            counts[row] += seen
    return counts


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tiles, int, int, int, int]:
    """Any tiles, overlapping ones too, with sizes of blocks and steps."""
    rows, cols = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    listed = Tiles.of(*draw(st.lists(tiles(rows, cols, BATCH), max_size=5)))
    return listed, rows, cols, draw(st.sampled_from([1, 2, 4, 8, 16])), draw(st.sampled_from([1, 2, 4, 8, 16]))


@given(problem=problems())
@examples(300)
def test_every_pair_is_met_as_often_as_tiles_hold_it(problem: tuple[Tiles, int, int, int, int]) -> None:
    listed, rows, cols, block, step = problem
    expected = tile_counts(listed, BATCH, rows, cols)
    found = pairs(build_work_list(listed.table, rows, BATCH, block, step), rows, cols, block, step)
    assert (found == expected).all()
    mirrored = pairs(build_work_list(transpose_tiles(listed.table), cols, BATCH, block, step), cols, rows, block, step)
    assert (mirrored == expected.transpose(0, 2, 1)).all()


@given(problem=problems())
@examples(200)
def test_a_block_has_one_program_and_long_ones_come_first(problem: tuple[Tiles, int, int, int, int]) -> None:
    listed, rows, _, block, step = problem
    work_list = build_work_list(listed.table, rows, BATCH, block, step)
    blocks = [(row, first) for row, first, *_ in work_list.items.tolist()]
    assert len(set(blocks)) == len(blocks), "two programs would write to the same rows"
    assert all(first % block == 0 for _, first in blocks)
    length = -(-(work_list.runs[:, 1] - work_list.runs[:, 0]) // step)
    cost = [int(length[full:end].sum()) for _, _, full, _, end in work_list.items.tolist()]
    assert cost == sorted(cost, reverse=True)
    assert all(cost), "no program without work"
    covered = sorted(number for _, _, full, _, end in work_list.items.tolist() for number in range(full, end))
    assert covered == list(range(len(work_list.runs))), "every run belongs to one program"


@pytest.mark.parametrize(("lo", "hi"), [(-(1 << 40), 0), (0, 1 << 40), (-4096, 0), (-700, 300)])
def test_work_follows_the_area(lo: int, hi: int) -> None:
    """Steps hold little more than the band, and masks are applied only along its edges."""
    rows, block, step = 8192, 128, 64
    listed = Tiles.of(Tile(0, rows, 0, rows, lo, hi))
    work_list = build_work_list(listed.table, rows, 1, block, step)
    length = -(-(work_list.runs[:, 1] - work_list.runs[:, 0]) // step) * step
    assert int(length.sum()) * block <= listed.area() + 2 * (block + step) * rows
    full = np.concatenate([np.arange(full, edge) for _, _, full, edge, _ in work_list.items.tolist()])
    masked = int(length.sum() - length[full].sum()) * block
    assert masked <= 2 * (block + 2 * step) * rows


def test_tiles_of_one_block_share_its_program() -> None:
    """Packed documents: a block of queries that many tiles touch is still one program's."""
    documents = Tiles.of(*(Tile(7 * n, 7 * n + 7, 7 * n, 7 * n + 7, -(1 << 40), 0) for n in range(100)))
    work_list = build_work_list(documents.table, 700, 3, 128, 64)
    assert len(work_list.items) == 3 * -(-700 // 128)
    assert len(work_list.runs) >= 3 * 100


def test_no_tiles() -> None:
    work_list = build_work_list(Tiles.of().table, 5, 2, 16, 16)
    assert len(work_list.items) == len(work_list.runs) == 0


def test_rows_beyond_32_bits_are_refused() -> None:
    far = Tiles.of(Tile(0, 4, 1 << 33, (1 << 33) + 4, -(1 << 60), 1 << 60))
    with pytest.raises(OverflowError, match="row numbers must fit 32 bits"):
        build_work_list(far.table, 4, 1, 16, 16)


def test_heads_stay_within_the_cache() -> None:
    assert heads_per_section(32, 4, 1 << 20, 24 << 20) == 32
    assert heads_per_section(32, 4, 8 << 20, 24 << 20) == 12
    assert heads_per_section(32, 4, 1 << 30, 24 << 20) == 4, "heads that share keys stay together"
    assert heads_per_section(6, 4, 1 << 30, 24 << 20) == 4
    assert heads_per_section(2, 1, 0, 24 << 20) == 2
