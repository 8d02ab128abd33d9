"""What each rank does when, in one ring attention: computing, transfers under way, waiting."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

import ringattn
from benchmarks.session import Session
from ringattn.parallel import DecoderConfig
from ringattn.plan.exchanges import Ring, build_plan, select_backward
from ringattn.plan.payload import AttentionShape
from ringattn.plan.plan import Program, Step


class Span(NamedTuple):
    """A stretch of time on one rank; seconds since the start. `kind` is compute, transfer, flight or wait."""

    rank: int
    kind: str
    start: float
    stop: float
    label: str


def record(here: Session, layout: ringattn.Layout, config: DecoderConfig) -> list[Span]:
    """Runs one causal forward and backward under the profiler; returns all ranks' spans on rank 0, else none.

    A transfer begins when it is posted. When it ends cannot be seen from outside the process group, only that it had
    ended when the wait for it returned. So it is drawn twice: as long as the same number of bytes takes with nothing
    else to do (transfer), and up to the end of the wait (flight).
    """
    rows = layout.num_tokens(here.rank)
    shapes = [
        (1, rows, heads, config.head_dim) for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    ]
    q, k, v = (torch.randn(shape, device=here.device, requires_grad=True) for shape in shapes)
    mask = ringattn.causal()

    def once() -> None:
        out = ringattn.ring_attention(q, k, v, mask=mask, layout=layout)
        torch.autograd.grad(out.sum(), [q, k, v])

    once()
    sizes = AttentionShape(1, config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim, 4, 4)
    backward = select_backward(Ring(), (mask,), layout, layout, sizes)
    plan = build_plan(Ring(), (mask,), layout, layout, here.rank, backward)
    alone = [
        _seconds_alone(here, _numbers_sent(program, step, sizes))
        for program in (plan.forward, plan.backward)
        for step in program.steps
    ]
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        dist.barrier()
        zero = time.time_ns()
        once()
    marks = sorted(
        (event.start_ns() - zero, event.start_ns() + event.duration_ns() - zero, event.name())
        for event in profile.profiler.kineto_results.events()
        if event.name().startswith("ringattn: ")
    )
    spans = []
    step, posted, waited = -1, 0, 0

    def landed() -> None:
        """Draws the transfers of the step whose messages have been awaited."""
        if step >= 0 and alone[step]:
            over = max(waited, posted) / 1e9
            spans.append(Span(here.rank, "flight", posted / 1e9, over, ""))
            spans.append(Span(here.rank, "transfer", posted / 1e9, min(posted / 1e9 + alone[step], over), ""))

    for start, stop, name in marks:
        label = name.removeprefix("ringattn: ")
        if label == "post":
            landed()
            step, posted = step + 1, start
        elif label == "wait":
            waited = stop
            spans.append(Span(here.rank, "wait", start / 1e9, stop / 1e9, ""))
        else:
            spans.append(Span(here.rank, "compute", start / 1e9, stop / 1e9, label))
    landed()
    everyone: list[list[Span]] = [[] for _ in range(here.world_size)]
    dist.gather_object(spans, everyone if here.rank == 0 else None)
    return [span for spans in everyone for span in spans]


def _numbers_sent(program: Program, step: Step, sizes: AttentionShape) -> int:
    return sum(program.rows_of(t) * sizes.row_bytes(t.payload) for t in step.sends) // 4


def _seconds_alone(here: Session, numbers: int) -> float:
    """Returns how long a message of so many fp32 numbers takes round the ring when nobody computes."""
    if here.world_size == 1:
        return 0.0
    # Every rank takes part in each measurement, with what it sends itself.
    after, before = (here.rank + 1) % here.world_size, (here.rank - 1) % here.world_size
    counts: list[int] = [0] * here.world_size
    dist.all_gather_object(counts, numbers)
    out, into = (torch.zeros(count, device=here.device) for count in (numbers, counts[before]))
    seconds = []
    for _ in range(5):
        dist.barrier()
        start = time.perf_counter()
        ops = [dist.P2POp(dist.irecv, into, before)] if counts[before] else []
        ops += [dist.P2POp(dist.isend, out, after)] if numbers else []
        for work in dist.batch_isend_irecv(ops) if ops else []:
            work.wait()
        if here.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) if numbers else 0.0
