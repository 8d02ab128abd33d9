"""Checking a call once per signature, and planning how it is run."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.attention.execution_plan import ExecutionPlan, TensorSpec, without_tensors
from ringattn.comm.topology import RankMesh, rank_mesh, resolve_group
from ringattn.cost.cost_model import CostModel
from ringattn.errors import ArgumentError, ArgumentTypeError, LayoutError
from ringattn.geometry.layout import Layout, check_layout, contiguous
from ringattn.geometry.masks import Mask, normalize_masks
from ringattn.kernels import BlockKernel, ProblemSpec, select
from ringattn.plan.exchanges import EXCHANGES, Exchange, Ring, Ulysses, build_plan, select_backward
from ringattn.plan.head_parallel import HeadSharding, gathered_layout_in_parts
from ringattn.plan.head_shards import HeadShard
from ringattn.score import Score
from ringattn.types import Masks

# The operation whose exchange may be chosen automatically.
AUTO = "context_parallel_attention"

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AttentionCall:
    """A call as the user made it, unchecked.

    Args:
        operation: the public function.
        q, k, v, mask, layout, kv_layout, backend: its arguments.
        score: scale, softcap, sink.
        exchange: a value; or the name of one, which of `AUTO` may be "auto".
        stages: of an exchange that is given by its name; None selects it.
        model: by which `AUTO` computes times; None is constants.
        returns_lse: whether the caller gets lse.
        gradients: which of q, k, v, sink require gradients; None asks the tensors.
    """

    operation: str
    q: Tensor
    k: Tensor
    v: Tensor
    score: Score
    mask: Masks
    layout: Layout | None
    kv_layout: Layout | None
    backend: str | None
    exchange: Exchange | str
    stages: int | None = None
    model: CostModel | None = None
    returns_lse: bool = False
    gradients: tuple[bool, ...] | None = None

    def require_gradients(self) -> tuple[bool, ...]:
        """Returns which of q, k, v, sink require gradients of this call."""
        if self.gradients is not None:
            return self.gradients
        enabled = torch.is_grad_enabled()
        return tuple([isinstance(t, Tensor) and enabled and t.requires_grad for t in self.tensors])

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The tensors: q, k, v, sink."""
        return self.q, self.k, self.v, self.score.sink

    def signature(self) -> Hashable | None:
        """Returns what decides a call apart from the contents of its tensors; None if it is not hashable."""
        mask: object = self.mask
        if isinstance(mask, list | tuple):
            mask = tuple([getattr(row, "text", row) for row in mask])
        looks: list[object] = []
        for x in (self.q, self.k, self.v):
            looks += (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else (x,)
        # Values are compared by their texts: a text caches its hash.
        for value in (mask, self.layout, self.kv_layout, self.exchange, self.model):
            looks.append(getattr(value, "text", value))
            looks.append(type(value))
        key = (
            self.operation, self.returns_lse, self.backend, self.stages, type(self.stages), *looks,
            *self.score.signature(), self.require_gradients(),
        )  # fmt: skip
        try:
            hash(key)
        except TypeError:
            return None
        return key


def mesh_for(operation: str, exchange: Exchange | str, group: object) -> RankMesh:
    """Returns the ranks that the caller of an operation means.

    Raises:
        ArgumentTypeError: when `group` is neither a group nor a mesh.
        ArgumentError: when the exchange does not run on it, or this process is not in it.
    """
    if operation == "ring_attention":
        return rank_mesh(group, Ring.mesh_axes or ())
    if operation == "hybrid_attention":
        return _hybrid_mesh(group)
    if operation != AUTO:
        return rank_mesh(resolve_group(group))
    if isinstance(exchange, Exchange) and exchange.mesh_axes is None:
        return rank_mesh(resolve_group(group))
    names = getattr(group, "mesh_dim_names", None)
    if names is not None and len(names) == 2 and names[::-1] in (Ring.mesh_axes, Ulysses.mesh_axes):
        raise ArgumentError(f"group_or_mesh={group!r}: the axes must be {names[::-1]}, in this order, not {names}")
    return rank_mesh(group)


def _hybrid_mesh(group: object) -> RankMesh:
    axes = Ulysses.mesh_axes
    num_dims = getattr(group, "ndim", None)
    if num_dims is None:
        raise ArgumentTypeError(f"mesh={group!r:.200}: must be a 2-D DeviceMesh with the axes {axes}")
    if num_dims != 2:
        raise ArgumentError(f"mesh={group!r}: must have two dims, with the axes {axes}, not {num_dims}")
    return rank_mesh(group, axes)


def apply_autocast(call: AttentionCall) -> AttentionCall:
    """Casts q, k, v as torch's own attention does inside autocast."""
    q, k, v = call.q, call.k, call.v
    if not isinstance(q, Tensor) or not torch.is_autocast_enabled(q.device.type):
        return call
    dtype = torch.get_autocast_dtype(q.device.type)

    def cast_down(x: Tensor) -> Tensor:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype is not torch.float64
        return x.to(dtype) if eligible else x

    return replace(call, q=cast_down(q), k=cast_down(k), v=cast_down(v))


class ValidatedCall(NamedTuple):
    """A call without errors; the exchange is not looked at.

    Args:
        fingerprint: what all ranks must have in common, by name.
        layout, kv_layout: of the queries, and of the keys and values.
        masks: one for all batch rows, or one for each.
        kernel: what computes.
        score: resolved.
        tensors: dims and dtype.
        wanted: whether gradients of (q, k or v) are wanted.
    """

    fingerprint: Mapping[str, str]
    layout: Layout
    kv_layout: Layout
    masks: tuple[Mask, ...]
    kernel: BlockKernel
    score: Score
    tensors: TensorSpec
    wanted: tuple[bool, bool]


def check_call(call: AttentionCall, mesh: RankMesh) -> ValidatedCall:
    """Checks everything of a call except its exchange."""
    q, k, v = call.q, call.k, call.v
    check_tensors(q, k, v, call.score.sink)
    layout, kv_layout = layouts_of(call, mesh)
    tensors, score = spec_of(q, k, v), call.score.resolve(q.shape[3])
    masks = normalize_masks(call.mask, q.shape[0])
    grads = list(call.require_gradients())
    problem = ProblemSpec(q.device.type, q.dtype, *tensors[1:5], any(grads), score)
    kernel = select(call.backend, problem)
    fingerprint = {
        "the operation": f"{call.operation}, lse {'too' if call.returns_lse else 'not'}",
        "the mesh": str(mesh.shape),
        "exchange": repr(call.exchange),
        "stages": repr(call.stages),
        "the batch size": str(q.shape[0]),
        "heads, kv heads, head dim, value head dim": ", ".join(map(str, tensors[1:5])),
        "dtype": str(q.dtype),
        "device type": q.device.type,
        "layout": f"{layout} #{layout.digest}",
        "kv_layout": f"{kv_layout} #{kv_layout.digest}",
        "mask": "; ".join(f"{m} #{m.digest}" for m in masks),
        **score.describe(),
        "backend": repr(call.backend),
        "which of q, k, v, sink require gradients": str(grads),
    }
    wanted = (grads[0], grads[1] or grads[2])
    return ValidatedCall(fingerprint, layout, kv_layout, masks, kernel, score, tensors, wanted)


def make_exchange(call: AttentionCall) -> Exchange:
    """Returns the exchange of a call that names one."""
    if isinstance(call.exchange, Exchange):
        return call.exchange
    named = EXCHANGES[call.exchange]
    return named.make(call.stages if named.stages else 1)  # type: ignore[arg-type]  # None is refused there


def plan_call(call: AttentionCall, mesh: RankMesh, checked: ValidatedCall, exchange: Exchange) -> ExecutionPlan:
    """Returns how this rank runs a checked call by an exchange."""
    layout, kv_layout, tensors, wanted = checked.layout, checked.kv_layout, checked.tensors, checked.wanted
    if len(mesh.shape) == 2 and exchange.mesh_axes is None:
        raise ArgumentError(f"exchange={exchange!r}: runs on one group of ranks, not on a mesh of two axes")
    shards = exchange.shard_heads(tensors.heads, tensors.kv_heads, mesh.shape)
    sharding, rank, shape = None, mesh.rank, mesh.shape
    if shards is not None:
        sharding, layout, kv_layout = _shard_heads(shards, mesh, call.q.device, layout, kv_layout)
        rank, shape = mesh.rank // mesh.shape[-1], mesh.shape[:-1] or (1,)
    arguments = exchange.inner, checked.masks, layout, kv_layout
    backward = select_backward(*arguments, tensors.shape, wanted, shape)
    plan = build_plan(*arguments, rank, backward, mesh=shape)
    q_chunks: tuple[int, ...] = (layout.num_tokens(rank),)
    kv_chunks: tuple[int, ...] = (kv_layout.num_tokens(rank),)
    if sharding is not None:
        q_chunks, kv_chunks = (tuple(part.total for part in held) for held in (sharding.q_rows, sharding.kv_rows))
        plan = plan.in_chunks(q_chunks, kv_chunks)
    score = without_tensors(checked.score)
    return ExecutionPlan(plan, sharding, checked.kernel, score, tensors, q_chunks, kv_chunks, call.returns_lse, wanted)


def _shard_heads(
    shards: tuple[tuple[HeadShard, ...], ...], mesh: RankMesh, device: torch.device, layout: Layout, kv_layout: Layout
) -> tuple[HeadSharding, Layout, Layout]:
    """Returns how heads are sharded over the last axis, and the layouts of the gathered rows."""
    axis = mesh.axes[-1]
    num_groups, group = mesh.size // len(axis.ranks), mesh.rank // len(axis.ranks)
    # On a CPU a copy costs more than a kernel call; on a GPU the call costs more.
    num_parts = len(axis.ranks) if device.type == "cpu" else 1
    layout, q_rows = gathered_layout_in_parts(layout, num_groups, num_parts)
    kv_layout, kv_rows = gathered_layout_in_parts(kv_layout, num_groups, num_parts)
    return HeadSharding(axis.coordinate, shards, q_rows[group], kv_rows[group]), layout, kv_layout


def layouts_of(call: AttentionCall, mesh: RankMesh) -> tuple[Layout, Layout]:
    """Returns the layouts of the queries and of the keys/values, checked against the mesh and the tensors."""
    layout = call.layout
    if layout is None:
        layout = contiguous(call.q.shape[1] * mesh.size, mesh.size)
    layout = check_layout(layout, "layout", mesh.size)
    kv_layout = layout if call.kv_layout is None else check_layout(call.kv_layout, "kv_layout", mesh.size)
    _check_rows("q", call.q, layout, "layout", mesh.rank)
    _check_rows("k", call.k, kv_layout, "layout" if call.kv_layout is None else "kv_layout", mesh.rank)
    return layout, kv_layout


def spec_of(q: Tensor, k: Tensor, v: Tensor) -> TensorSpec:
    """Returns the dims and the dtype of a call's tensors."""
    return TensorSpec(q.shape[0], q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.dtype)


def check_tensors(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> None:
    """Checks that types, shapes, dtypes and devices are consistent."""
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
