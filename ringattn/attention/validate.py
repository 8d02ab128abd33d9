"""Checking what was asked for, once per signature, and deciding how it is run."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringattn.attention.executor import ExecutionPlan
from ringattn.comm.topology import RankMesh, rank_mesh, resolve_group
from ringattn.cost.cost_model import CostModel
from ringattn.errors import ArgumentError, ArgumentTypeError, LayoutError, check_integer
from ringattn.geometry.layout import Layout, check_layout, contiguous
from ringattn.geometry.masks import Mask, normalize_masks
from ringattn.kernels import BlockKernel, ProblemSpec, select
from ringattn.plan.exchanges import Exchange, Gather, Ring, build_plan, select_backward
from ringattn.plan.head_parallel import HeadSharding, gathered_layout_in_parts
from ringattn.plan.head_shards import all_heads, shard_heads
from ringattn.plan.payload import AttentionShape
from ringattn.score import Score
from ringattn.softmax import accumulation_dtype
from ringattn.types import Masks

# The operation whose exchange is chosen.
AUTO = "context_parallel_attention"
# Operations that spread heads over the last axis, and run a plan along the first, if there are two.
_SPREADING = ("ulysses_attention", "hybrid_attention")
_DOUBLE_RING = ("outer", "inner")
_HYBRID = ("ring", "ulysses")

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ExchangePreference(NamedTuple):
    """What a choice of the exchange is asked for: one by its name, or "auto"; by which model, None being constants."""

    exchange: str
    model: CostModel | None


@dataclass(frozen=True)
class AttentionCall:
    """A call as the user made it, unchecked."""

    operation: str
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Masks
    layout: Layout | None
    kv_layout: Layout | None
    scale: float | None
    softcap: float | None
    sink: Tensor | None
    backend: str | None
    stages: int | None = 1  # None lets it be chosen, where the exchange is
    returns_lse: bool = False
    gradients: tuple[bool, ...] | None = None  # which of q, k, v, sink require them; None is as they say themselves
    asked: ExchangePreference | None = None  # of a call whose exchange is chosen

    def require_gradients(self) -> tuple[bool, ...]:
        """Returns which of q, k, v, sink require gradients of this call."""
        if self.gradients is not None:
            return self.gradients
        enabled = torch.is_grad_enabled()
        return tuple([isinstance(t, Tensor) and enabled and t.requires_grad for t in self.tensors])

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The tensors: q, k, v, sink."""
        return self.q, self.k, self.v, self.sink

    def signature(self) -> Hashable | None:
        """Returns what decides a call apart from its tensors' contents; None if that cannot be told."""
        mask = tuple(self.mask) if isinstance(self.mask, list) else self.mask
        options = (mask, self.layout, self.kv_layout, self.scale, self.softcap, self.backend, self.stages, self.asked)
        tensors = tuple((t.shape, t.dtype, t.device) if isinstance(t, Tensor) else t for t in self.tensors)
        gradients = self.require_gradients()
        key = (self.operation, self.returns_lse, options, tuple(map(type, options)), tensors, gradients)
        try:
            hash(key)
        except TypeError:
            return None
        return key


def mesh_for(operation: str, group: object) -> RankMesh:
    """Returns the ranks that the caller of an operation means.

    Raises:
        ArgumentTypeError: when `group` is neither a group nor a mesh.
        ArgumentError: when the operation does not run on it, or this process is not in it.
    """
    if operation == AUTO:
        return _mesh_of_any(group)
    if operation == "ring_attention":
        return rank_mesh(group, _DOUBLE_RING)
    if operation != "hybrid_attention":
        return rank_mesh(resolve_group(group))
    if not isinstance(group, DeviceMesh):
        raise ArgumentTypeError(f"mesh={group!r:.200}: must be a 2-D DeviceMesh with the axes {_HYBRID}")
    if group.ndim != 2:
        raise ArgumentError(f"mesh={group!r}: must have two dims, with the axes {_HYBRID}, not {group.ndim}")
    return rank_mesh(group, _HYBRID)


def _mesh_of_any(group: object) -> RankMesh:
    if isinstance(group, DeviceMesh) and group.ndim == 2:
        names = group.mesh_dim_names
        if names is not None and names[::-1] in (_DOUBLE_RING, _HYBRID):
            raise ArgumentError(f"group_or_mesh={group!r}: the axes must be {names[::-1]}, in this order, not {names}")
    return rank_mesh(group)


def apply_autocast(request: AttentionCall) -> AttentionCall:
    """Casts q, k, v as torch's own attention does inside autocast."""
    q, k, v = request.q, request.k, request.v
    if not isinstance(q, Tensor) or not torch.is_autocast_enabled(q.device.type):
        return request
    dtype = torch.get_autocast_dtype(q.device.type)

    def cast_down(x: Tensor) -> Tensor:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype is not torch.float64
        return x.to(dtype) if eligible else x

    return replace(request, q=cast_down(q), k=cast_down(k), v=cast_down(v))


class ValidatedCall(NamedTuple):
    """What a request means, once nothing is wrong with it; the exchange is not looked at."""

    told: Mapping[str, str]  # what the ranks must agree on
    layout: Layout
    kv_layout: Layout
    masks: tuple[Mask, ...]
    kernel: BlockKernel
    score: Score
    wanted: tuple[bool, bool]  # whether gradients of (q, k or v) are


def check_call(request: AttentionCall, team: RankMesh) -> ValidatedCall:
    """Checks a request, but for its exchange."""
    q, k, v, sink = request.q, request.k, request.v, request.sink
    check_tensors(q, k, v, sink)
    layout, kv_layout = layouts_of(request, team)
    score = Score(request.scale, request.softcap).resolve(q.shape[3])
    masks = normalize_masks(request.mask, q.shape[0])
    grads = list(request.require_gradients())
    kernel = select(
        request.backend,
        ProblemSpec(q.device.type, q.dtype, q.shape[2], k.shape[2], q.shape[3], v.shape[3], any(grads), score),
    )
    told = {
        "the operation": f"{request.operation}, lse {'too' if request.returns_lse else 'not'}",
        "the mesh": str(team.shape),
        "stages": repr(request.stages),
        "the batch size": str(q.shape[0]),
        "heads, kv heads, head dim, value head dim": f"{q.shape[2]}, {k.shape[2]}, {q.shape[3]}, {v.shape[3]}",
        "dtype": str(q.dtype),
        "device type": q.device.type,
        "layout": f"{layout} #{layout.digest}",
        "kv_layout": f"{kv_layout} #{kv_layout.digest}",
        "mask": "; ".join(f"{m} #{m.digest}" for m in masks),
        "scale": repr(score.scale),
        "softcap": repr(score.softcap),
        "sink": "None" if sink is None else f"{tuple(sink.shape)} {sink.dtype}",
        "backend": repr(request.backend),
        "which of q, k, v, sink require gradients": str(grads),
    }
    return ValidatedCall(told, layout, kv_layout, masks, kernel, score, (grads[0], grads[1] or grads[2]))


def plan_call(request: AttentionCall, team: RankMesh) -> tuple[Mapping[str, str], ExecutionPlan]:
    """Checks a request and returns what the ranks must agree on, and how to run it here."""
    q, k, v = request.q, request.k, request.v
    told, layout, kv_layout, masks, kernel, score, wanted = check_call(request, team)
    exchange = _exchange(request, team)
    spread, rank = None, team.rank
    if request.operation in _SPREADING:
        spread, rank, layout, kv_layout = _shard_heads(request, team, layout, kv_layout)
    backward = select_backward(exchange, masks, layout, kv_layout, shape_of(q, k, v), wanted)
    plan = build_plan(exchange, masks, layout, kv_layout, rank, backward)
    if spread is not None:
        plan = plan.in_parts(*([part.total for part in held] for held in (spread.q_rows, spread.kv_rows)))
    heads = all_heads(q.shape[2], k.shape[2]).runs()
    return told, ExecutionPlan(plan, spread, kernel, score, heads, request.returns_lse, wanted)


def _shard_heads(
    request: AttentionCall, team: RankMesh, layout: Layout, kv_layout: Layout
) -> tuple[HeadSharding, int, Layout, Layout]:
    """Returns how heads are spread over the last axis, and the rank and layouts that remain for the plan."""
    axis = team.axes[-1]
    num_groups = team.size // len(axis.ranks)
    group = team.rank // len(axis.ranks)
    # On a CPU a copy costs more than a call of the kernel, elsewhere it is the other way round.
    num_parts = len(axis.ranks) if request.q.device.type == "cpu" else 1
    layout, q_rows = gathered_layout_in_parts(layout, num_groups, num_parts)
    kv_layout, kv_rows = gathered_layout_in_parts(kv_layout, num_groups, num_parts)
    stages = shard_heads(request.q.shape[2], request.k.shape[2], len(axis.ranks), check_stages(request.stages))
    return HeadSharding(axis.coordinate, stages, q_rows[group], kv_rows[group]), group, layout, kv_layout


def _exchange(request: AttentionCall, team: RankMesh) -> Exchange:
    stages = check_stages(request.stages)
    if request.operation == "gather_attention":
        return Gather(stages)
    double = len(team.shape) == 2 and request.operation not in _SPREADING
    return Ring(team.shape[0] if double else 1)


def check_stages(stages: object) -> int:
    """Returns a number of stages if it is one."""
    return check_integer("stages", stages, 1)


def layouts_of(request: AttentionCall, team: RankMesh) -> tuple[Layout, Layout]:
    """Returns the layouts of the queries and of the keys/values, checked against the team and the tensors."""
    layout = request.layout
    if layout is None:
        layout = contiguous(request.q.shape[1] * team.size, team.size)
    layout = check_layout(layout, "layout", team.size)
    kv_layout = layout if request.kv_layout is None else check_layout(request.kv_layout, "kv_layout", team.size)
    _check_rows("q", request.q, layout, "layout", team.rank)
    _check_rows("k", request.k, kv_layout, "layout" if request.kv_layout is None else "kv_layout", team.rank)
    return layout, kv_layout


def shape_of(q: Tensor, k: Tensor, v: Tensor) -> AttentionShape:
    """Returns the sizes that bytes depend on."""
    batch, _, heads, dim = q.shape
    sums = accumulation_dtype(q.dtype)
    return AttentionShape(batch, heads, k.shape[2], dim, v.shape[3], q.dtype.itemsize, sums.itemsize)


def check_tensors(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> None:
    """Checks that the tensors are tensors that go together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ArgumentTypeError(
                f"{name}={x!r:.100}: must be a tensor (batch, rows, heads, head_dim), not {type(x).__name__}"
            )
        if x.ndim != 4:
            raise ArgumentError(f"{name} has shape {tuple(x.shape)}: must have 4 dims (batch, rows, heads, head_dim)")
    if q.dtype not in _DTYPES:
        raise ArgumentError(f"q has dtype {q.dtype}: must be one of {', '.join(map(str, _DTYPES))}")
    for name, x in (("k", k), ("v", v)):
        for what, value, wanted in (("dtype", x.dtype, q.dtype), ("device", x.device, q.device)):
            if value != wanted:
                raise ArgumentError(f"{name} has {what} {value}, but q has {wanted}: they must be the same")
        if x.shape[0] != q.shape[0]:
            raise ArgumentError(f"{name} has batch size {x.shape[0]}, but q has {q.shape[0]}: must be the same")
    if k.shape[1:3] != v.shape[1:3]:
        raise ArgumentError(
            f"k has (rows, heads) = {tuple(k.shape[1:3])}, but v has {tuple(v.shape[1:3])}: must be the same"
        )
    if k.shape[3] != q.shape[3]:
        raise ArgumentError(f"k has head_dim {k.shape[3]}, but q has {q.shape[3]}: must be the same")
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ArgumentError(
            f"q has {heads} heads and k, v have {kv_heads}: the heads must be a multiple of the kv heads"
        )
    if q.shape[3] < 1 or v.shape[3] < 1:
        raise ArgumentError(f"head dims {q.shape[3]} (q, k) and {v.shape[3]} (v): must be 1 or more")
    if sink is None:
        return
    if not isinstance(sink, Tensor):
        raise ArgumentTypeError(f"sink={sink!r:.100}: must be a tensor (heads,) or None, not {type(sink).__name__}")
    if sink.shape != (heads,) or not sink.is_floating_point():
        raise ArgumentError(
            f"sink has shape {tuple(sink.shape)} and dtype {sink.dtype}: must be ({heads},), one logit per query head, "
            "of a floating dtype"
        )
    if sink.device != q.device:
        raise ArgumentError(f"sink is on {sink.device}, but q is on {q.device}: they must be on the same device")


def _check_rows(name: str, x: Tensor, layout: Layout, argument: str, rank: int) -> None:
    expected = layout.num_tokens(rank)
    if x.shape[1] != expected:
        raise LayoutError(
            f"{name} has {x.shape[1]} rows, but {argument}={layout} gives rank {rank} {expected} positions; "
            f"pass the {argument} that the tensors are sharded by (None means equal, contiguous shards, and keys "
            "where the queries are)"
        )
