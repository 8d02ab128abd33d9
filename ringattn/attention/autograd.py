"""A call forward and backward, by any exchange; and the autograd.Function that joins the two."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.attention.execution_plan import ExecutionPlan
from ringattn.attention.executor import execute
from ringattn.attention.movement import Backward, BackwardByQueries, Forward
from ringattn.attention.ulysses import ulysses_backward, ulysses_forward
from ringattn.comm.topology import RankMesh
from ringattn.kernels.contract import BackwardQueries, Keys, Queries
from ringattn.softmax import add_sink_, empty_state, sink_gradient


class SavedForward(NamedTuple):
    """What a backward needs of its forward."""

    q: Tensor
    k: Tensor
    v: Tensor
    sink: Tensor | None
    out: Tensor
    lse: Tensor


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def forward(
    plan: ExecutionPlan, mesh: RankMesh, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Runs a plan's forward.

    Args:
        plan: of this rank.
        mesh: the ranks; all of them call this together.
        q, k, v: local rows, (B, S, H, D), (B, S_kv, H_kv, D), (B, S_kv, H_kv, Dv).
        sink: (H,) logits, or None.
    Returns:
        out, (B, S, H, Dv) in q.dtype, and lse, (B, H, S) in the accumulation dtype.
    """
    q, keys = _contiguous_rows(q), Keys(_contiguous_rows(k), _contiguous_rows(v))
    with _without_autocast(q):
        if plan.sharding is not None:
            out, lse = ulysses_forward(plan, plan.sharding, mesh, q, keys, sink)
        else:
            state = empty_state(q, v.shape[3])
            movement = Forward(plan.headwise, [Queries(q)], [state], [keys])
            execute(plan.compiled(mesh, backward=False), mesh, movement)
            if sink is not None:
                add_sink_(state.out, state.lse, sink)
            out, lse = state
    return out.to(q.dtype), lse


def backward(
    plan: ExecutionPlan,
    mesh: RankMesh,
    saved: SavedForward,
    dout: Tensor | None,
    dlse: Tensor | None,
    needed: Sequence[bool],
) -> Gradients:
    """Runs a plan's backward: the gradients of what every rank's out and lse contributed.

    Args:
        plan, mesh: of the forward.
        saved: its inputs and results.
        dout: the gradient of out; None is 0.
        dlse: the gradient of lse; None is 0.
        needed: whose gradients are returned, of (q, k, v, sink); the others are None.
    """
    q, k, v = saved[:3]
    sink, out, lse = saved[3:]
    q, keys = _contiguous_rows(q), Keys(_contiguous_rows(k), _contiguous_rows(v))
    dout = torch.zeros_like(out) if dout is None else _contiguous_rows(dout.to(q.dtype))
    delta = _row_dot(dout, out, lse.dtype)
    if dlse is not None:
        delta -= dlse
    # Where other ranks' queries arrive, their gradients of lse do, too.
    others_arrive = plan.sharding is not None or plan.moves_queries_back
    lse_grad = dlse is not None or (plan.returns_lse and others_arrive)
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    queries = BackwardQueries(q, dout, lse, delta, lse_grad)
    with _without_autocast(q):
        if plan.sharding is not None and any(plan.wanted):
            dq, dk, dv = ulysses_backward(plan, plan.sharding, mesh, queries, keys)
        elif any(plan.wanted):
            kind = BackwardByQueries if plan.moves_queries_back else Backward
            dq, dk, dv = _gradient_buffers(q, keys, lse.dtype, queries_move=plan.moves_queries_back)
            movement = kind(plan.headwise, [queries], [keys], [dq], [(dk, dv)])
            execute(plan.compiled(mesh, backward=True), mesh, movement)
        dsink = sink_gradient(sink, lse, delta) if sink is not None and needed[3] else None
    return (
        _like_input(dq, q) if needed[0] and dq is not None else None,
        _like_input(dk, k) if needed[1] and dk is not None else None,
        _like_input(dv, v) if needed[2] and dv is not None else None,
        dsink,
    )


class AttentionFunction(torch.autograd.Function):
    """(q, k, v, sink, plan, mesh) -> (out, lse), both differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, plan: ExecutionPlan, mesh: RankMesh
    ) -> tuple[Tensor, Tensor]:
        """Runs `forward`, and saves what `backward` needs."""
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.mesh = plan, mesh
        out, lse = forward(plan, mesh, q, k, v, sink)
        ctx.save_for_backward(q, k, v, sink, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Runs `backward`."""
        found = backward(ctx.plan, ctx.mesh, SavedForward(*ctx.saved_tensors), dout, dlse, ctx.needs_input_grad[:4])
        return *found, None, None


def _gradient_buffers(
    q: Tensor, keys: Keys, dtype: torch.dtype, *, queries_move: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns zeros for dq, dk, dv; gradients that move are heads-first in memory, like the messages added to them."""

    def zeros(x: Tensor, *, by_head: bool) -> Tensor:
        if not by_head:
            return torch.zeros(x.shape, dtype=dtype, device=x.device)
        return torch.zeros(x.transpose(1, 2).shape, dtype=dtype, device=x.device).transpose(1, 2)

    dk, dv = (zeros(x, by_head=not queries_move) for x in keys[:2])
    return zeros(q, by_head=queries_move), dk, dv


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _contiguous_rows(x: Tensor) -> Tensor:
    """Returns the tensor with its last dim contiguous, as kernels want it; a copy only where it is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _like_input(gradient: Tensor, x: Tensor) -> Tensor:
    """Returns the gradient in the dtype of its input, rows before heads in memory."""
    if gradient.dtype == x.dtype and gradient.is_contiguous():
        return gradient
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(gradient)


def _row_dot(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns rowsum(a * b), (B, S, H, D) x 2 -> (B, H, S); a head at a time, which bounds the memory."""
    result = torch.empty(a.shape[0], a.shape[2], a.shape[1], dtype=dtype, device=a.device)
    for head in range(a.shape[2]):
        torch.sum(a[:, :, head].to(dtype) * b[:, :, head].to(dtype), dim=-1, out=result[:, head])
    return result
