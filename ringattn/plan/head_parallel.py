"""Head parallelism: sharding heads over the ranks of one axis, and the layout of the rows that a rank gathers.

After the all-to-all a rank holds its shard of the heads for the rows of all ranks of the axis. The rows are sorted by
position, so that their layout has as few ranges as possible: all rows of a sequence are one range, whatever the layout
was before. The exchange along the other axis, if any, is planned on that layout. Rows may also stay in several parts,
one after the other in the layout: a part with the rows of one rank is not copied.

Source: Jacobs et al. 2023, arXiv:2309.14509; with a ring Fang and Zhao 2024, arXiv:2405.07719.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ringattn.geometry.layout import Layout
from ringattn.plan.head_shards import HeadShard
from ringattn.plan.payload import AttentionShape


@dataclass(frozen=True)
class GatheredRows:
    """The rows of all ranks of an axis, together.

    Args:
        num_rows: of each rank.
        row_slices: for each rank, pairs of slices: (of its rows, of all rows).
    """

    num_rows: tuple[int, ...]
    row_slices: tuple[tuple[tuple[slice, slice], ...], ...]

    @property
    def total(self) -> int:
        """How many rows there are."""
        return sum(self.num_rows)

    @property
    def in_place(self) -> bool:
        """Whether these are the rows of one rank, in its own order."""
        alone = len(self.row_slices) == 1
        return alone and all(held.step == 1 and held.start == rows.start for rows, held in self.row_slices[0])


@lru_cache(maxsize=64)
def gathered_layout(layout: Layout, num_groups: int) -> tuple[Layout, tuple[GatheredRows, ...]]:
    """Returns the layout of groups of consecutive ranks, each holding its ranks' rows; and each group's rows.

    Args:
        layout: of num_groups x W ranks, group by group.
        num_groups: 1 if all ranks make one group.
    """
    size = layout.world_size // num_groups
    ranges, gathered = [], []
    for group in range(num_groups):
        members = [layout.ranges(rank) for rank in range(group * size, (group + 1) * size)]
        held, rows = _gather_ranges(members)
        ranges.append(held)
        gathered.append(rows)
    return Layout(layout.seq_len, tuple(ranges), f"{layout} in {num_groups} groups"), tuple(gathered)


@lru_cache(maxsize=64)
def gathered_layout_in_parts(
    layout: Layout, num_groups: int, num_parts: int
) -> tuple[Layout, tuple[tuple[GatheredRows, ...], ...]]:
    """Returns the same as `gathered_layout`, with the rows of each group in parts of consecutive ranks.

    Args:
        layout: of num_groups x W ranks.
        num_groups: of consecutive ranks.
        num_parts: of each group; a divisor of W.
    Returns:
        the layout of the groups, and the parts of each, in the order of its rows.
    """
    parts, gathered = gathered_layout(layout, num_groups * num_parts)
    groups = [slice(first, first + num_parts) for first in range(0, num_groups * num_parts, num_parts)]
    ranges = tuple(tuple(run for part in parts.rank_ranges[group] for run in part) for group in groups)
    held = Layout(layout.seq_len, ranges, f"{layout} in {num_groups} groups of {num_parts} parts")
    return held, tuple(gathered[group] for group in groups)


def _gather_ranges(members: list[tuple[range, ...]]) -> tuple[tuple[range, ...], GatheredRows]:
    """Orders the members' ranges by position; joins neighbours, and stripes that are complete."""
    held = sorted((run.start, member, index) for member, own in enumerate(members) for index, run in enumerate(own))
    runs = [(member, index, members[member][index]) for _, member, index in held]
    slice_of: dict[tuple[int, int], slice] = {}
    joined: list[range] = []
    offset, at = 0, 0
    while at < len(runs):
        stripes = _complete_stripes([run for *_, run in runs[at : at + runs[at][2].step]])
        for number, (member, index, run) in enumerate(runs[at : at + stripes]):
            start, step = (offset, 1) if stripes == 1 else (offset + number, stripes)
            slice_of[member, index] = slice(start, start + step * (len(run) - 1) + 1, step)
        parts = [run for *_, run in runs[at : at + stripes]]
        whole = parts[0] if stripes == 1 else range(parts[0].start, parts[0].start + sum(map(len, parts)))
        if joined and joined[-1].step == whole.step == 1 and joined[-1].stop == whole.start:
            joined[-1] = range(joined[-1].start, whole.stop)
        else:
            joined.append(whole)
        offset, at = offset + len(whole), at + stripes
    row_slices = []
    for member, own in enumerate(members):
        found, start = [], 0
        for index, run in enumerate(own):
            found.append((slice(start, start + len(run)), slice_of[member, index]))
            start += len(run)
        row_slices.append(tuple(found))
    return tuple(joined), GatheredRows(tuple(sum(map(len, own)) for own in members), tuple(row_slices))


def _complete_stripes(runs: list[range]) -> int:
    """Returns how many of the runs are stripes that leave no gap between them: all of them, or just the first."""
    step = len(runs)
    first, total = runs[0], sum(map(len, runs))
    complete = all(run.step == step and run.start == first.start + i for i, run in enumerate(runs))
    fits = complete and all(len(run) == -(-(total - i) // step) for i, run in enumerate(runs))
    return step if fits and first.step == step else 1


def replicates_kv_heads(stages: tuple[tuple[HeadShard, ...], ...]) -> bool:
    """Whether some kv head is in several shards, [stage][rank]."""
    shards = [shard for stage in stages for shard in stage]
    return sum(len(shard.kv_heads) for shard in shards) > max(shard.kv_heads.stop for shard in shards)


@dataclass(frozen=True)
class HeadSharding:
    """How one rank's rows and heads are exchanged along one axis.

    Args:
        rank: this rank, on the axis.
        stages: which heads each rank computes in each stage, [stage][rank].
        q_rows, kv_rows: the rows of all ranks of the axis, of queries and of keys/values, in equally many parts.
    """

    rank: int
    stages: tuple[tuple[HeadShard, ...], ...]
    q_rows: tuple[GatheredRows, ...]
    kv_rows: tuple[GatheredRows, ...]

    @property
    def replicates(self) -> bool:
        """Whether some kv head is sent to several ranks, or in several stages, so that its gradients are summed up."""
        return replicates_kv_heads(self.stages)

    def bytes_sent(self, sizes: AttentionShape, wanted: tuple[bool, bool] = (True, True)) -> tuple[int, int]:
        """Returns the bytes that this rank sends to others along the axis in (forward, backward).

        Args:
            sizes: of the tensors, all heads.
            wanted: whether gradients of (q, k or v) are wanted.
        """
        b, item, wide = sizes.batch, sizes.itemsize, sizes.sum_itemsize
        both = sizes.head_dim + sizes.v_head_dim
        kv_item = wide if self.replicates else item
        q_rows, kv_rows = ([n for part in held for n in part.num_rows] for held in (self.q_rows, self.kv_rows))
        q_own, kv_own = q_rows[self.rank], kv_rows[self.rank]
        forward = backward = 0
        for stage in self.stages:
            mine = stage[self.rank]
            for peer, theirs in enumerate(stage):
                if peer == self.rank:
                    continue
                q_there = b * q_rows[peer] * len(mine.heads)
                kv_there = b * kv_rows[peer] * len(mine.kv_heads)
                q_out, kv_out = b * q_own * len(theirs.heads), b * kv_own * len(theirs.kv_heads)
                forward += q_out * sizes.head_dim * item + kv_out * both * item
                forward += q_there * (sizes.v_head_dim * item + wide)
                backward += q_out * (both * item + 2 * wide) + kv_out * both * item
                backward += q_there * sizes.head_dim * item if wanted[0] else 0
                backward += kv_there * both * kv_item if wanted[1] else 0
        return forward, backward
