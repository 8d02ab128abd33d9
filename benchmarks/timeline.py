"""What each rank does when in one ring attention: computing, transfers in flight, waiting."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple, cast

import torch
import torch.distributed as dist

import ringattn
from benchmarks.inputs import Shape, with_gradients
from benchmarks.internals import Start, replaced_start
from benchmarks.runner import Session
from ringattn.comm.messages import Operation, PendingMessage


class Span(NamedTuple):
    """A time span on one rank, in seconds from the start; `kind` is compute, transfer, flight or wait."""

    rank: int
    kind: str
    start: float
    stop: float
    label: str = ""


@dataclass
class _Step:
    """The messages of a step, in seconds since the epoch."""

    posted: float
    sent_bytes: int
    waits: list[tuple[float, float]] = field(default_factory=list)


class _TimedMessage:
    def __init__(self, pending: PendingMessage, step: _Step) -> None:
        self._pending, self._step = pending, step

    def wait(self) -> None:
        start = time.time()
        self._pending.wait()
        self._step.waits.append((start, time.time()))


def record(here: Session, layout: ringattn.Layout, shape: Shape) -> list[Span]:
    """Runs a causal forward and backward under the profiler; returns all ranks' spans on rank 0, else an empty list.

    A transfer starts when it is posted. Its end cannot be seen from outside the process group; it is only known to have
    ended when the wait for it returns. So each transfer has two spans: as long as the same bytes take alone (transfer),
    and up to the end of the wait (flight).
    """
    mask, tensors = ringattn.causal(), shape.random(layout.num_tokens(here.rank), here.device, seed=here.rank)
    once = with_gradients(lambda q, k, v: ringattn.ring_attention(q, k, v, mask=mask, layout=layout), tensors, True)
    once()
    steps: list[_Step] = []

    def timing(original: Start) -> Start:
        def start(group: dist.ProcessGroup, operations: Sequence[Operation]) -> list[PendingMessage]:
            steps.append(_Step(time.time(), sum(message.tensor.nbytes for is_send, message in operations if is_send)))
            return [cast(PendingMessage, _TimedMessage(pending, steps[-1])) for pending in original(group, operations)]

        return start

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile, replaced_start(timing):
        dist.barrier()
        zero = time.time()
        once()
    spans = []
    for event in profile.profiler.kineto_results.events():
        if event.name().startswith("ringattn: "):
            start = event.start_ns() / 1e9 - zero
            label = event.name().removeprefix("ringattn: ")
            spans.append(Span(here.rank, "compute", start, start + event.duration_ns() / 1e9, label))
    for step, alone in zip(steps, _seconds_alone(here, [step.sent_bytes for step in steps]), strict=True):
        posted, landed = step.posted - zero, max([step.posted, *(stop for _, stop in step.waits)]) - zero
        if step.sent_bytes:
            spans.append(Span(here.rank, "flight", posted, landed))
            spans.append(Span(here.rank, "transfer", posted, min(posted + alone, landed)))
        spans += [Span(here.rank, "wait", start - zero, stop - zero) for start, stop in step.waits]
    of_ranks: list[list[Span]] = [[] for _ in range(here.world_size)]
    dist.gather_object(spans, of_ranks if here.is_main else None)
    return [span for of_rank in of_ranks for span in of_rank]


def _seconds_alone(here: Session, sent_bytes: list[int]) -> list[float]:
    """Returns the seconds of messages to the next rank while nobody computes; a collective."""
    of_ranks = [sent_bytes] * here.world_size
    dist.all_gather_object(of_ranks, sent_bytes)
    after, before = (here.rank + 1) % here.world_size, (here.rank - 1) % here.world_size
    found = []
    for step in range(max(map(len, of_ranks))):
        sizes = [of_rank[step] if step < len(of_rank) else 0 for of_rank in of_ranks]
        out, into = (torch.zeros(sizes[rank], dtype=torch.uint8, device=here.device) for rank in (here.rank, before))
        seconds = []
        for _ in range(5):
            dist.barrier()
            start = time.perf_counter()
            ops = [dist.P2POp(dist.irecv, into, before)] if sizes[before] else []
            ops += [dist.P2POp(dist.isend, out, after)] if sizes[here.rank] else []
            for work in dist.batch_isend_irecv(ops) if ops else []:
                work.wait()
            if here.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        found.append(median(seconds))
    return found[: len(sent_bytes)]
