"""Heads dealt to ranks and stages, and rows of ranks united: each once, evenly, replicated as little as may be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn import Layout, contiguous, striped, zigzag
from ringattn.plan.head_parallel import HeadSharding, gathered_layout
from ringattn.plan.head_shards import HeadShard, HeadSlice, all_heads, shard_heads
from ringattn.plan.payload import AttentionShape
from tests.geometry.strategies import examples, layouts


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 9), st.integers(1, 5))
@examples(300)
def test_every_head_once_and_evenly(kv_heads: int, group: int, world: int, stages: int) -> None:
    heads = kv_heads * group
    found = shard_heads(heads, kv_heads, world, stages)
    assert [len(stage) for stage in found] == [world] * stages
    by_rank = [[head for stage in found for head in stage[rank].heads] for rank in range(world)]
    assert [head for own in by_rank for head in own] == list(range(heads))
    assert max(map(len, by_rank)) - min(map(len, by_rank)) <= 1
    for share in (share for stage in found for share in stage):
        assert set(share.kv_heads) == {head // group for head in share.heads}
    # One stage: a kv head is on the ranks of its query heads, which are consecutive, and on no other.
    (alone,) = shard_heads(heads, kv_heads, world)
    copies = sum(len(share.kv_heads) for share in alone)
    assert copies <= kv_heads + min(world, heads) - 1
    if kv_heads % world == 0:
        assert copies == kv_heads
    elif world % kv_heads == 0 and world <= heads and group % (world // kv_heads) == 0:
        assert copies == world
    # Stages send a kv head twice only where a rank has fewer of them than stages.
    for rank in range(world):
        several = sum(len(stage[rank].kv_heads) for stage in found)
        if len(alone[rank].kv_heads) >= stages:
            assert several == len(alone[rank].kv_heads)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 9), st.integers(1, 4))
@examples(300)
def test_runs_are_what_a_kernel_takes(kv_heads: int, group: int, world: int, stages: int) -> None:
    for share in (s for stage in shard_heads(kv_heads * group, kv_heads, world, stages) for s in stage):
        runs = share.runs()
        assert len(runs) <= 3
        assert [h for run in runs for h in run.heads] == list(range(len(share.heads)))
        assert [h for run in runs for h in run.kv_heads] == list(range(len(share.kv_heads)))
        for run in runs:
            each = len(run.heads) // len(run.kv_heads)
            for head in run.heads:
                kv = run.kv_heads[(head - run.heads.start) // each]
                assert share.kv_heads[kv] == share.heads[head] // group


def test_a_share_of_incomplete_groups() -> None:
    """Heads 2 to 9 of groups of four: half a group, a whole one, half a group."""
    share = HeadShard(range(2, 10), range(0, 3), 4)
    assert share.runs() == (
        HeadSlice(range(0, 2), range(0, 1)),
        HeadSlice(range(2, 6), range(1, 2)),
        HeadSlice(range(6, 8), range(2, 3)),
    )
    assert all_heads(6, 2).runs() == (HeadSlice(range(6), range(2)),)


def check_united(layout: Layout, num_groups: int) -> None:
    """A group holds the positions of its ranks, at the rows that `row_slices` gives."""
    together, groups = gathered_layout(layout, num_groups)
    size = layout.world_size // num_groups
    assert together.world_size == num_groups
    for group, union in enumerate(groups):
        found = np.full(union.total, -1)
        for member, row_slices in enumerate(union.row_slices):
            own = layout.positions(group * size + member)
            assert union.num_rows[member] == len(own)
            for rows, held in row_slices:
                assert (found[held] == -1).all()
                found[held] = own[rows]
        np.testing.assert_array_equal(found, together.positions(group))


@given(st.data(), st.integers(0, 70), st.integers(1, 4), st.integers(1, 4))
@examples(200)
def test_rows_united(data: st.DataObject, seq_len: int, num_groups: int, size: int) -> None:
    check_united(data.draw(layouts(seq_len, num_groups * size)), num_groups)


@pytest.mark.parametrize("seq_len", [8, 9, 31, 1000])
def test_all_rows_are_one_range_again(seq_len: int) -> None:
    for layout in (contiguous(seq_len, 4), zigzag(seq_len, 4), striped(seq_len, 4), striped(seq_len, 4, 3)):
        together, (union,) = gathered_layout(layout, 1)
        assert together.ranges(0) == (range(seq_len),)
        assert union.total == seq_len
    assert all(len(row_slices) == 1 for row_slices in gathered_layout(striped(seq_len, 4), 1)[1][0].row_slices)


def test_bytes_of_a_spread_by_hand() -> None:
    """Two ranks of 3 rows, 2 heads, 1 kv head, dims 4 and 2, bf16: each keeps one head of its own rows."""
    _, (rows,) = gathered_layout(contiguous(6, 2), 1)
    sizes = AttentionShape(1, 2, 1, 4, 2, 2, 4)
    for place in range(2):
        spread = HeadSharding(place, shard_heads(2, 1, 2), (rows,), (rows,))
        assert spread.replicates
        q, kv, out = 3 * 4 * 2, 3 * 6 * 2, 3 * (2 * 2 + 4)
        back_in, back_out = 3 * (6 * 2 + 8) + kv, 3 * 4 * 2 + 3 * 6 * 4
        assert spread.bytes_sent(sizes) == (q + kv + out, back_in + back_out)
        assert spread.bytes_sent(sizes, (False, True)) == (q + kv + out, back_in + 3 * 6 * 4)
    assert not HeadSharding(0, shard_heads(2, 2, 2), (rows,), (rows,)).replicates
