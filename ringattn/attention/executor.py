"""The executor: runs any plan, forward and backward. There is one, and one autograd.Function for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from ringattn.comm.packet import Packet
from ringattn.comm.ring import Flight, Message, launch
from ringattn.geometry.plan import Payload, Plan, Step, Transfer
from ringattn.kernels import BlockKernel, Spec
from ringattn.softmax import accumulation_dtype, add_sink_, empty_state, sink_gradient

_TAGS = {payload: tag for tag, payload in enumerate(Payload)}


@dataclass(frozen=True)
class Job:
    """Everything about a call but its tensors: decided once per signature, the plan being this rank's own."""

    plan: Plan
    kernel: BlockKernel
    spec: Spec
    kv_grad: bool  # whether gradients of k or v are wanted, so that they must travel


class Attention(torch.autograd.Function):
    """(q, k, v, sink, job, group) -> (out, lse), both differentiable."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, job: Job, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        """Runs the plan's forward; see api.ring_attention_with_lse."""
        ctx.set_materialize_grads(False)
        ctx.job, ctx.group = job, group
        with torch.autocast(q.device.type, enabled=False):
            out, lse = run_forward(job, group, q, k, v)
            if sink is not None:
                add_sink_(out, lse, sink)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sink, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Runs the plan's backward: gradients of what every rank's out and lse contributed."""
        q, k, v, sink, out, lse = ctx.saved_tensors
        job: Job = ctx.job
        dout = torch.zeros_like(out) if dout is None else dout.to(q.dtype)
        delta = _row_products(dout, out, lse.dtype)
        if dlse is not None:
            delta -= dlse
            job = replace(job, spec=replace(job.spec, lse_grad=True))
        with torch.autocast(q.device.type, enabled=False):
            dq, dk, dv = run_backward(job, ctx.group, dout, q, k, v, lse, delta)
            dsink = sink_gradient(sink, lse, delta) if ctx.needs_input_grad[3] else None
        needed = ctx.needs_input_grad
        return (
            _as_input(dq, q) if needed[0] else None,
            _as_input(dk, k) if needed[1] else None,
            _as_input(dv, v) if needed[2] else None,
            dsink,
            None,
            None,
        )


def run_forward(job: Job, group: dist.ProcessGroup, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of this rank's queries over all keys, in the accumulation dtype."""
    out, lse = empty_state(q, v.shape[3])
    blocks = _Blocks(job, group, k, v)
    for step in job.plan.forward:
        flight = blocks.begin(step)
        if step.tiles:
            with record_function(f"ringattn: attend to block {step.block}"):
                job.kernel.forward(q, *blocks.kv(step.block), step.tiles, job.spec, out, lse)
        blocks.end(step, flight)
    return out, lse


def run_backward(
    job: Job, group: dist.ProcessGroup, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns this rank's dq, dk, dv in the accumulation dtype, every rank's share of dk and dv summed up."""
    dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
    blocks = _Blocks(job, group, k, v)
    for step in job.plan.backward:
        flight = blocks.begin(step)
        if step.tiles:
            with record_function(f"ringattn: gradients of block {step.block}"):
                _add_gradients(job, step, blocks, flight, dout, q, lse, delta, dq)
        blocks.end(step, flight)
    return dq, *blocks.gradients(job.plan.rank)


def _add_gradients(
    job: Job,
    step: Step,
    blocks: _Blocks,
    flight: Flight,
    dout: Tensor,
    q: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
) -> None:
    """Computes one step's gradients: dq in place, dk and dv into the sum that travels with the block.

    When that sum is still under way, a quarter of the heads is computed aside meanwhile, the others into it: a
    quarter of a block of memory instead of a whole one, and a quarter of the step's work to hide the rest of the
    transfer under.
    """
    k, v = blocks.kv(step.block)

    def compute(first: int, last: int, dk: Tensor, dv: Tensor) -> None:
        group = q.shape[2] // k.shape[2]
        kv_heads, heads = slice(first, last), slice(first * group, last * group)
        job.kernel.backward(
            dout[:, :, heads],
            q[:, :, heads],
            k[:, :, kv_heads],
            v[:, :, kv_heads],
            lse[:, heads],
            delta[:, heads],
            step.tiles,
            job.spec,
            dq[:, :, heads],
            dk,
            dv,
        )

    num_kv_heads = k.shape[2]
    if not blocks.awaits_gradients(step):
        compute(0, num_kv_heads, *blocks.gradients(step.block))
        return
    early = -(-num_kv_heads // 4)
    aside = [torch.zeros_like(x[:, :, :early], dtype=lse.dtype) for x in (k, v)]
    compute(0, early, *aside)
    flight.wait_receive(_TAGS[Payload.DKV])
    dk, dv = blocks.gradients(step.block)
    for total, part in zip((dk, dv), aside, strict=True):
        total[:, :, :early] += part
    del aside
    if early < num_kv_heads:
        compute(early, num_kv_heads, dk[:, :, early:], dv[:, :, early:])


class _Blocks:
    """The blocks that a rank holds while it runs a plan, their gradients' sums, and the transfers of both.

    In packets heads come before rows, (B, H, rows, D): a kernel then finds a head's rows next to each other, for no
    more than the copy that a message costs anyway.
    """

    def __init__(self, job: Job, group: dist.ProcessGroup, k: Tensor, v: Tensor) -> None:
        self._job = job
        self._group = group
        self._own = (k, v)
        self._packets: dict[int, Packet] = {}
        self._sums: dict[int, Packet] = {}
        self._spare: list[Tensor] = []

    def kv(self, block: int) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of a block that is here, (B, rows, H, D)."""
        if block not in self._packets:
            return self._own
        k, v = self._packets[block].tensors
        return k.transpose(1, 2), v.transpose(1, 2)

    def gradients(self, block: int) -> tuple[Tensor, Tensor]:
        """Returns the running sums of a block's dk and dv, (B, rows, H, D), zeros if none is here yet."""
        dk, dv = self._sum_of(block).tensors
        return dk.transpose(1, 2), dv.transpose(1, 2)

    def awaits_gradients(self, step: Step) -> bool:
        """Whether the sums for the step's own block are still on their way here."""
        return any(t.block == step.block for t in self._moving(step.receives) if t.payload is Payload.DKV)

    def begin(self, step: Step) -> Flight:
        """Posts the step's messages."""
        sends = [Message(self._to_send(t).flat, t.peer, _TAGS[t.payload]) for t in self._moving(step.sends)]
        receives = [Message(self._to_receive(t).flat, t.peer, _TAGS[t.payload]) for t in self._moving(step.receives)]
        with record_function("ringattn: post"):
            return launch(self._group, sends, receives)

    def end(self, step: Step, flight: Flight) -> None:
        """Waits for the step's messages and lets go of what is done with."""
        with record_function("ringattn: wait"):
            flight.wait()
        for t in step.sends:
            if t.payload is Payload.DKV:
                self._sums.pop(t.block, None)
        for block in step.frees:
            if block in self._packets:
                self._spare.append(self._packets.pop(block).buffer)
        if not self._job.kv_grad:
            self._sums.clear()

    def _moving(self, transfers: tuple[Transfer, ...]) -> list[Transfer]:
        return [t for t in transfers if t.payload is Payload.KV or self._job.kv_grad]

    def _to_send(self, t: Transfer) -> Packet:
        if t.payload is Payload.DKV:
            return self._sum_of(t.block)
        if t.block not in self._packets:
            self._packets[t.block] = Packet.of([x.transpose(1, 2) for x in self._own])
        return self._packets[t.block]

    def _to_receive(self, t: Transfer) -> Packet:
        k, _ = self._own
        shapes = self._shapes(t.block)
        if t.payload is Payload.DKV:
            self._sums[t.block] = Packet.empty(shapes, accumulation_dtype(k.dtype), k.device)
            return self._sums[t.block]
        needed = sum(torch.Size(shape).numel() for shape in shapes)
        spare = next((i for i, buffer in enumerate(self._spare) if buffer.numel() >= needed), None)
        if spare is None:
            self._packets[t.block] = Packet.empty(shapes, k.dtype, k.device)
        else:
            self._packets[t.block] = Packet(self._spare.pop(spare), shapes)
        return self._packets[t.block]

    def _sum_of(self, block: int) -> Packet:
        if block not in self._sums:
            k, _ = self._own
            self._sums[block] = Packet.zeros(self._shapes(block), accumulation_dtype(k.dtype), k.device)
        return self._sums[block]

    def _shapes(self, block: int) -> list[tuple[int, ...]]:
        rows = self._job.plan.block_rows[block]
        return [(x.shape[0], x.shape[2], rows, x.shape[3]) for x in self._own]


def _as_input(gradient: Tensor, x: Tensor) -> Tensor:
    """Returns the gradient in the dtype of its input, rows before heads in memory."""
    if gradient.dtype == x.dtype and gradient.is_contiguous():
        return gradient
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(gradient)


def _row_products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns rowsum(a * b), (B, S, H, D) x 2 -> (B, H, S); a head at a time, which bounds the memory."""
    result = torch.empty(a.shape[0], a.shape[2], a.shape[1], dtype=dtype, device=a.device)
    for head in range(a.shape[2]):
        torch.sum(a[:, :, head].to(dtype) * b[:, :, head].to(dtype), dim=-1, out=result[:, head])
    return result
