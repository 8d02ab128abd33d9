"""The public operations: checking what was asked for, once per signature, and handing it to the executor."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringattn.attention.executor import Attention, Job
from ringattn.comm.group import agreed, resolve
from ringattn.errors import ArgumentError, ArgumentTypeError, LayoutError
from ringattn.geometry.layout import Layout, check_layout, contiguous
from ringattn.geometry.masks import Mask, check_mask
from ringattn.geometry.plan import build_plan
from ringattn.kernels import Call, Spec, select

Group = dist.ProcessGroup | DeviceMesh | None
Masks = Mask | Sequence[Mask] | None

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group = None,
    *,
    mask: Masks = None,
    layout: Layout | None = None,
    kv_layout: Layout | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of this rank's queries over the keys/values of all ranks, which go round in a ring.

    The result is exact: that of one process that holds the whole sequence. All ranks of the group call it
    together, forward and backward. Gradients are those of the sum of what the ranks compute from their outputs.
    Inside autocast the inputs are cast as torch's own attention casts them.

    Args:
        q: local queries, (B, S_local, H, D), float64, float32, bfloat16 or float16.
        k: local keys, (B, S_kv_local, H_kv, D), H % H_kv == 0, dtype of q.
        v: local values, (B, S_kv_local, H_kv, Dv), dtype of q.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the default group.
        mask: who may attend to whom, in global positions; a list gives each batch row its own; None is full.
        layout: the positions of the local queries; None is contiguous with equal shards on all ranks.
        kv_layout: the positions of the local keys/values (cross-attention); None is the queries' layout.
        scale: softmax scale, dimensionless; D ** -0.5 if None.
        softcap: scores become softcap * tanh(score / softcap); positive; None leaves them.
        sink: (H,) learned logits that take part in each row's denominator; the same on all ranks. Its gradient is
            this rank's share, to be summed over the group like that of every replicated parameter.
        backend: a name out of `ringattn info`, which then runs or raises; None takes the first that can.
    Returns:
        (B, S_local, H, Dv) in q.dtype; accumulated in fp32 (float64 for float64). Rows that may attend to nothing
        are 0.
    Raises:
        ArgumentError: when an argument is not allowed; LayoutError, MaskError when a layout or a mask does not fit.
        BackendError: when the backend cannot run this call.
        DisagreementError: when the ranks do not ask for the same. All of these on every rank, before anything is
            sent, on the first call of a signature (shapes, dtypes, options); later calls of it are not compared.
    Communication: per rank and hop the block at hand, rows x H_kv x (D + Dv) elements per batch row; a block stops
        at the last rank that needs it, W - 1 hops away at most. In backward the same again; and the block's
        gradients in the accumulation dtype, one transfer more, as they go home.
    Source: Liu et al. 2023, arXiv:2310.01889.
    """
    request = _Request("ring", q, k, v, mask, layout, kv_layout, scale, softcap, sink, backend)
    return _attend(request, group)[0]


def ring_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group = None,
    *,
    mask: Masks = None,
    layout: Layout | None = None,
    kv_layout: Layout | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The output of `ring_attention` and the log-sum-exp of each row's scores, both differentiable.

    Args, errors and communication are those of `ring_attention`.

    Returns:
        out, (B, S_local, H, Dv) in q.dtype, and lse, (B, H, S_local), natural log, fp32 (float64 for float64);
        lse takes in the sink, and is -inf for rows that attend to nothing.
    """
    request = _Request("ring", q, k, v, mask, layout, kv_layout, scale, softcap, sink, backend)
    return _attend(request, group)


@dataclass(frozen=True)
class _Request:
    """A call as the user made it, unchecked."""

    exchange: str
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

    def signature(self) -> Hashable | None:
        """Returns what decides a call apart from its tensors' contents; None if that cannot be told."""
        mask = tuple(self.mask) if isinstance(self.mask, list) else self.mask
        options = (mask, self.layout, self.kv_layout, self.scale, self.softcap, self.backend)
        tensors = tuple(
            (t.shape, t.dtype, t.device, t.requires_grad) if isinstance(t, Tensor) else t
            for t in (self.q, self.k, self.v, self.sink)
        )
        key = (self.exchange, options, tuple(map(type, options)), tensors, torch.is_grad_enabled())
        try:
            hash(key)
        except TypeError:
            return None
        return key


def _attend(request: _Request, group: Group) -> tuple[Tensor, Tensor]:
    found = resolve(group)
    request = _autocast(request)
    job = agreed(found, request.signature(), lambda: _prepare(request, found))
    out, lse = Attention.apply(request.q, request.k, request.v, request.sink, job, found)  # type: ignore[no-untyped-call]
    return cast(Tensor, out), cast(Tensor, lse)


def _autocast(request: _Request) -> _Request:
    """Casts q, k, v as torch's own attention does inside autocast."""
    q, k, v = request.q, request.k, request.v
    if not isinstance(q, Tensor) or not torch.is_autocast_enabled(q.device.type):
        return request
    dtype = torch.get_autocast_dtype(q.device.type)

    def cast_down(x: Tensor) -> Tensor:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype is not torch.float64
        return x.to(dtype) if eligible else x

    return replace(request, q=cast_down(q), k=cast_down(k), v=cast_down(v))


def _prepare(request: _Request, group: dist.ProcessGroup) -> tuple[Mapping[str, str], Job]:
    """Checks a request and returns what the ranks must agree on, and how to run it here."""
    q, k, v, sink = request.q, request.k, request.v, request.sink
    _check_tensors(q, k, v, sink)
    rank, world = group.rank(), group.size()
    layout = request.layout
    if layout is None:
        layout = contiguous(q.shape[1] * world, world)
    layout = check_layout(layout, "layout", world)
    kv_layout = layout if request.kv_layout is None else check_layout(request.kv_layout, "kv_layout", world)
    _check_rows("q", q, layout, "layout", rank)
    _check_rows("k", k, kv_layout, "layout" if request.kv_layout is None else "kv_layout", rank)
    scale = q.shape[3] ** -0.5 if request.scale is None else _number("scale", request.scale)
    softcap = None if request.softcap is None else _number("softcap", request.softcap)
    if softcap is not None and softcap <= 0:
        raise ArgumentError(f"softcap={softcap}: must be positive, or None")
    masks = check_mask(request.mask, q.shape[0])

    grads = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (q, k, v, sink)]
    spec = Spec(scale, softcap)
    kernel = select(
        request.backend,
        Call(q.device.type, q.dtype, q.shape[2], k.shape[2], q.shape[3], v.shape[3], any(grads), spec),
    )
    plan = build_plan(request.exchange, masks, layout, kv_layout, rank)
    told = {
        "the operation": request.exchange,
        "the batch size": str(q.shape[0]),
        "heads, kv heads, head dim, value head dim": f"{q.shape[2]}, {k.shape[2]}, {q.shape[3]}, {v.shape[3]}",
        "dtype": str(q.dtype),
        "device type": q.device.type,
        "layout": f"{layout} #{layout.digest}",
        "kv_layout": f"{kv_layout} #{kv_layout.digest}",
        "mask": "; ".join(f"{m} #{m.digest}" for m in masks),
        "scale": repr(scale),
        "softcap": repr(softcap),
        "sink": "None" if sink is None else f"{tuple(sink.shape)} {sink.dtype}",
        "backend": repr(request.backend),
        "which of q, k, v, sink require gradients": str(grads),
    }
    return told, Job(plan, kernel, spec, kv_grad=grads[1] or grads[2])


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> None:
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


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(f"{name}={value!r:.100}: must be a number or None, not {type(value).__name__}")
    if not math.isfinite(value):
        raise ArgumentError(f"{name}={value}: must be finite")
    return float(value)
