"""Sharding heads: which heads each rank computes in each stage.

Query head h uses kv head h // group. Query heads are sharded in order and as evenly as possible, together with the kv
heads that they use. So a kv head is replicated only on the ranks that compute some of its query heads, which is the
minimum for even shards of query heads; a shard need not consist of whole groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple


class HeadSlice(NamedTuple):
    """Query heads and their kv heads, all of one group size: the heads of one kernel call."""

    heads: range
    kv_heads: range


@dataclass(frozen=True)
class HeadShard:
    """Consecutive query heads, and the kv heads that they use."""

    heads: range
    kv_heads: range
    group: int  # query heads of a whole kv head

    def runs(self) -> tuple[HeadSlice, ...]:
        """Returns the shard in local numbers, cut where the query heads per kv head change: three slices at most."""
        if not self.heads:
            return ()
        a, b, g = self.heads.start, self.heads.stop, self.group
        # An incomplete group at either end, whole ones between.
        inner_start, inner_stop = min(-(-a // g) * g, b), max(b // g * g, a)
        cuts = sorted({a, inner_start, inner_stop, b}) if inner_start <= inner_stop else [a, b]
        return tuple(
            HeadSlice(
                _shifted(range(first, last), -a), _shifted(_kv_heads_of(range(first, last), g), -self.kv_heads.start)
            )
            for first, last in pairwise(cuts)
        )


def all_heads(heads: int, kv_heads: int) -> HeadShard:
    """Returns all heads."""
    return HeadShard(range(heads), range(kv_heads), heads // kv_heads)


def shard_heads(heads: int, kv_heads: int, world_size: int, stages: int = 1) -> tuple[tuple[HeadShard, ...], ...]:
    """Returns which heads each rank computes in each stage: [stage][rank].

    If a rank has at least as many kv heads as stages, no stage cuts a group. A shard may be empty.

    Args:
        heads: query heads in all, a multiple of kv_heads.
        kv_heads: kv heads in all.
        world_size: number of ranks.
        stages: number of parts of each rank's shard.
    """
    group = heads // kv_heads
    by_rank = [_stages(part, group, stages) for part in _even_ranges(range(heads), world_size)]
    return tuple(zip(*by_rank, strict=True))


def _stages(part: range, group: int, stages: int) -> list[HeadShard]:
    kv = _kv_heads_of(part, group)
    if len(kv) >= stages:
        cuts = [
            part[max(run.start * group - part.start, 0) : run.stop * group - part.start]
            for run in _even_ranges(kv, stages)
        ]
    else:
        cuts = _even_ranges(part, stages)
    return [HeadShard(cut, _kv_heads_of(cut, group), group) for cut in cuts]


def _even_ranges(whole: range, parts: int) -> list[range]:
    ends = [-(-len(whole) * part // parts) for part in range(parts + 1)]
    return [whole[a:b] for a, b in pairwise(ends)]


def _kv_heads_of(heads: range, group: int) -> range:
    return (
        range(heads.start // group, -(-heads.stop // group))
        if heads
        else range(heads.start // group, heads.start // group)
    )


def _shifted(numbers: range, by: int) -> range:
    return range(numbers.start + by, numbers.stop + by)
