"""Ulysses: an all-to-all turns some rows of all heads into all rows of some heads; another exchange does the rest.

On one axis nothing is left to move. On a mesh, `then` runs along the first axis, once heads are sharded along the last.

Source: Jacobs et al. 2023, arXiv:2309.14509; with a ring Fang and Zhao 2024, arXiv:2405.07719.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from ringattn.cost.cost_model import CostModel
from ringattn.cost.lower_bound import LowerBound, nothing, transfer_s
from ringattn.errors import ArgumentTypeError, check_integer
from ringattn.plan.comm_pattern import CommPattern
from ringattn.plan.exchanges.exchange import Exchange, register_exchange_class
from ringattn.plan.exchanges.ring import Ring
from ringattn.plan.head_parallel import gathered_layout, replicates_kv_heads
from ringattn.plan.head_shards import HeadShard, shard_heads
from ringattn.plan.plan import Program
from ringattn.plan.workload import Workload
from ringattn.types import Floats


@register_exchange_class
@dataclass(frozen=True, repr=False)
class Ulysses(Exchange):
    """Heads are sharded over the ranks of the last axis.

    Args:
        stages: the number of parts in which a rank computes its heads, 1 or more.
        then: the exchange along the first axis of a mesh.
    """

    mesh_axes = ("ring", "ulysses")
    stages: int = 1
    then: Exchange = field(default_factory=Ring)

    def __post_init__(self) -> None:
        check_integer("stages", self.stages, 1)
        if not isinstance(self.then, Exchange) or isinstance(self.then, Ulysses):
            raise ArgumentTypeError(f"then={self.then!r:.100}: must be an exchange such as Ring(), and not Ulysses")
        super().__post_init__()

    @property
    def name(self) -> str:
        """What people call it."""
        return "ulysses" if self.stages == 1 else f"ulysses in {self.stages} stages"

    @property
    def inner(self) -> Exchange:
        """The exchange along the first axis."""
        return self.then

    def shard_heads(self, heads: int, kv_heads: int, mesh: tuple[int, ...]) -> tuple[tuple[HeadShard, ...], ...]:
        """Returns which heads each rank of the last axis computes, [stage][rank]."""
        return shard_heads(heads, kv_heads, mesh[-1], self.stages)

    def program(self, pattern: CommPattern, rank: int, *, returns: bool) -> Program:
        """Returns the steps of `then`; the pattern describes the gathered rows."""
        return self.then.program(pattern, rank, returns=returns)

    def rows_moved(self, pattern: CommPattern) -> tuple[int, int]:
        """Returns how many rows all ranks together send in `then`."""
        return self.then.rows_moved(pattern)

    def lower_bound(self, workload: Workload, model: CostModel) -> LowerBound:
        """Returns the least time: the all-to-all to the heads, the exchange between the groups, the all-to-all back."""
        shape, link = workload.shape, model.link
        num_groups = workload.layout.world_size // workload.mesh[-1]
        all_shards = self.shard_heads(shape.heads, shape.kv_heads, workload.mesh)
        inner = replace(
            workload,
            layout=gathered_layout(workload.layout, num_groups)[0],
            kv_layout=gathered_layout(workload.kv_layout, num_groups)[0],
            mesh=workload.mesh[:-1] or (1,),
        )
        scatter, gather = scatter_bytes(workload), gather_bytes(workload, replicates_kv_heads(all_shards))
        sent, received = np.zeros((2, num_groups, workload.mesh[-1]))
        flops, busy_s, inner_bytes, num_messages, first_s, last_s = np.zeros((6, *sent.shape))
        link_s, path_s, held = 0.0, 0.0, 0.0
        for stage, shards in enumerate(all_shards):
            out, come = all_to_all_bytes(workload, num_groups, shards, scatter)
            come_back, out_back = all_to_all_bytes(workload, num_groups, shards, gather)
            sent, received = sent + out + out_back, received + come + come_back
            num_messages += ((out > 0) + (out_back > 0)) * (len(shards) - 1)
            first_s = first_s if stage else transfer_s(come, link)
            last_s = np.maximum(transfer_s(out_back, link), transfer_s(come_back, link))
            bounds = self._inner_bounds(inner, model, shards)
            for place, found in enumerate(bounds):
                flops[:, place] += found.flops
                busy_s[:, place] += found.busy_s
                inner_bytes[:, place] += found.num_bytes
                num_messages[:, place] += found.num_messages
            # Any place gives a bound; the first has the most heads.
            link_s, path_s = link_s + bounds[0].link_s, max(path_s, bounds[0].path_s)
            held = max(held, float((out + come).max()) * min(self.stages, 2) + bounds[0].buffer_bytes)
        path_s += self._later_stages_s(inner, model)
        busy_s += (sent + received) / model.compute.copy_bytes_per_s
        seconds = max(
            float((first_s + busy_s + last_s).max()),
            float(np.maximum(sent, received).max()) / link.bytes_per_s,
            float(first_s.min()) + max(link_s, path_s) + float(last_s.min()),
        )
        amounts = (sent + inner_bytes).ravel(), num_messages.ravel(), held
        return LowerBound(seconds, flops.ravel(), busy_s.ravel(), link_s, path_s, *amounts)

    def _later_stages_s(self, inner: Workload, model: CostModel) -> float:
        """Seconds that stages after the first add to the path: a rank begins one when the one before is finished.

        Where ranks need each other's blocks, two of them wait for each other in every stage, half a ring apart.
        """
        needed = inner.pattern.needed
        mutual = bool((needed == needed.T).all() and needed.sum() > needed.diagonal().sum())
        return mutual * (self.stages - 1) * (len(needed) // 2) * model.links[1].latency_s

    def _inner_bounds(self, inner: Workload, model: CostModel, shards: tuple[HeadShard, ...]) -> list[LowerBound]:
        """The bounds of the exchange between the groups, on the slow axis, for the ranks at each place."""
        slow = replace(model, link=model.links[1], outer_link=None)
        found: dict[tuple[int, int], LowerBound] = {}
        counts = [(len(shard.heads), len(shard.kv_heads)) for shard in shards]
        for heads in dict.fromkeys(counts):
            part = replace(inner, shape=inner.shape.of_heads(*heads))
            found[heads] = self.then.lower_bound(part, slow) if heads[0] else nothing(inner.layout.world_size)
        return [found[heads] for heads in counts]


def scatter_bytes(workload: Workload) -> tuple[int, int]:
    """Returns what goes to the rank that computes a head, in bytes of a row of (a query head, a kv head)."""
    s = workload.shape
    both = s.head_dim + s.v_head_dim
    query = both * s.itemsize + 2 * s.sum_itemsize if workload.phase.is_backward else s.head_dim * s.itemsize
    return query, both * s.itemsize


def gather_bytes(workload: Workload, replicated: bool) -> tuple[int, int]:
    """Returns what comes back, in the same bytes.

    Args:
        workload: the direction.
        replicated: whether some kv head is computed in several places.
    """
    s, (q_wanted, kv_wanted) = workload.shape, workload.wanted
    if not workload.phase.is_backward:
        return s.v_head_dim * s.itemsize + s.sum_itemsize, 0
    item = s.sum_itemsize if replicated else s.itemsize
    return s.head_dim * s.itemsize if q_wanted else 0, (s.head_dim + s.v_head_dim) * item if kv_wanted else 0


def all_to_all_bytes(
    workload: Workload, num_groups: int, shards: tuple[HeadShard, ...], row_bytes: tuple[int, int]
) -> tuple[Floats, Floats]:
    """Returns the bytes that each rank sends and receives where rows go to the heads' ranks, (groups, places)."""
    out, come = np.zeros((2, num_groups, len(shards)))
    heads = [len(shard.heads) for shard in shards], [len(shard.kv_heads) for shard in shards]
    for held, numbers, num_bytes in zip((workload.layout, workload.kv_layout), heads, row_bytes, strict=True):
        rows = np.array([held.num_tokens(rank) for rank in range(held.world_size)]).reshape(num_groups, -1)
        number = np.array(numbers)
        out += rows * (number.sum() - number) * (workload.shape.batch * num_bytes)
        come += (rows.sum(axis=1, keepdims=True) - rows) * number * (workload.shape.batch * num_bytes)
    return out, come
