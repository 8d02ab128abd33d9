"""What each rank does when, in one ring attention: computing, transfers under way, waiting."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
import torch.distributed as dist

import ringattn
from benchmarks.model import Size
from benchmarks.session import Session


class Span(NamedTuple):
    """A stretch of time on one rank; seconds since the start. `kind` is compute, transfer or wait."""

    rank: int
    kind: str
    start: float
    stop: float
    label: str


def record(here: Session, context: int, layout: ringattn.Layout, size: Size) -> list[Span]:
    """Runs one causal forward and backward under the profiler; returns all ranks' spans on rank 0, else none.

    A transfer begins when it is posted. When it ends cannot be seen from outside the process group, only that it had
    ended when the wait for it returned; so it is drawn up to there.
    """
    rows = layout.num_tokens(here.rank)
    shapes = [(1, rows, heads, size.head_dim) for heads in (size.heads, size.kv_heads, size.kv_heads)]
    q, k, v = (torch.randn(shape, device=here.device, requires_grad=True) for shape in shapes)

    def once() -> None:
        out = ringattn.ring_attention(q, k, v, mask=ringattn.causal(), layout=layout)
        torch.autograd.grad(out.sum(), [q, k, v])

    once()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        dist.barrier()
        zero = time.time_ns()
        once()
    events = profile.profiler.kineto_results.events()
    marks = sorted(
        (e.start_ns() - zero, e.start_ns() + e.duration_ns() - zero, e.name())
        for e in events
        if e.name().startswith("ringattn: ")
    )
    spans = []
    posted = 0
    for start, stop, name in marks:
        label = name.removeprefix("ringattn: ")
        if label == "post":
            posted = start
        elif label == "wait":
            spans.append(Span(here.rank, "transfer", posted / 1e9, stop / 1e9, ""))
            spans.append(Span(here.rank, "wait", start / 1e9, stop / 1e9, ""))
        else:
            spans.append(Span(here.rank, "compute", start / 1e9, stop / 1e9, label))
    everyone: list[list[Span]] = [[] for _ in range(here.world_size)]
    dist.gather_object(spans, everyone if here.rank == 0 else None)
    return [span for spans in everyone for span in spans]
