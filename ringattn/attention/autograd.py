"""A call forward and backward, whatever its exchange; and the one autograd.Function, which is both of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.attention.backward_modes import GradBuffers
from ringattn.attention.executor import ExecutionPlan, run_backward, run_forward
from ringattn.attention.ulysses import ulysses_backward, ulysses_forward
from ringattn.comm.topology import RankMesh
from ringattn.kernels import BackwardQueries, Keys, Queries
from ringattn.plan.plan import Payload
from ringattn.softmax import empty_state, sink_gradient


class SavedForward(NamedTuple):
    """What a backward needs of its forward."""

    q: Tensor
    k: Tensor
    v: Tensor
    sink: Tensor | None
    out: Tensor
    lse: Tensor


InputGradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def forward(
    job: ExecutionPlan, team: RankMesh, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Runs the plan's forward; see api.ring_attention_with_lse."""
    q, k, v = (_contiguous_rows(x) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        if job.spread is None:
            out, lse = state = empty_state(q, v.shape[3])
            run_forward(job, team, [Queries(q)], [Keys(k, v)], [state], sink)
        else:
            out, lse = ulysses_forward(job, job.spread, team, q, Keys(k, v), sink)
    return out.to(q.dtype), lse


def backward(
    job: ExecutionPlan,
    team: RankMesh,
    saved: SavedForward,
    dout: Tensor | None,
    dlse: Tensor | None,
    needed: Sequence[bool],
) -> InputGradients:
    """Runs the plan's backward: gradients of what every rank's out and lse contributed.

    Args:
        job: the forward's.
        team: the forward's.
        saved: its inputs and results.
        dout: the gradient of out; None is 0.
        dlse: the gradient of lse; None is 0.
        needed: whose gradients are returned, of (q, k, v, sink); the others are None.
    """
    q, k, v = (_contiguous_rows(x) for x in saved[:3])
    sink, out, lse = saved[3:]
    dout = torch.zeros_like(out) if dout is None else _contiguous_rows(dout.to(q.dtype))
    delta = _row_dot(dout, out, lse.dtype)
    if dlse is not None:
        delta -= dlse
    # Where other ranks' queries come, so do their gradients of lse.
    others_come = job.spread is not None or job.plan.backward.carried is Payload.Q
    lse_grad = dlse is not None or (job.returns_lse and others_come)
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    queries, keys = BackwardQueries(q, dout, lse, delta, lse_grad), Keys(k, v)
    with torch.autocast(q.device.type, enabled=False):
        if job.spread is not None and any(job.wanted):
            dq, dk, dv = ulysses_backward(job, job.spread, team, queries, keys)
        elif any(job.wanted):
            (dq,), ((dk, dv),) = run_backward(job, team, [queries], [keys], GradBuffers.anywhere([queries], [keys]))
        dsink = sink_gradient(sink, lse, delta) if sink is not None and needed[3] else None
    return (
        _like_input(dq, q) if needed[0] and dq is not None else None,
        _like_input(dk, k) if needed[1] and dk is not None else None,
        _like_input(dv, v) if needed[2] and dv is not None else None,
        dsink,
    )


class AttentionFunction(torch.autograd.Function):
    """(q, k, v, sink, job, team) -> (out, lse), both differentiable."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, job: ExecutionPlan, team: RankMesh
    ) -> tuple[Tensor, Tensor]:
        """Runs `forward`, and saves what `backward` needs."""
        ctx.set_materialize_grads(False)
        ctx.job, ctx.team = job, team
        out, lse = forward(job, team, q, k, v, sink)
        ctx.save_for_backward(q, k, v, sink, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Runs `backward`."""
        found = backward(ctx.job, ctx.team, SavedForward(*ctx.saved_tensors), dout, dlse, ctx.needs_input_grad[:4])
        return *found, None, None


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
