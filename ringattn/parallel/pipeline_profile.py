"""Pipeline timelines and bubbles: measured, simulated from an order of operations, and by formula."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from ringattn.errors import ArgumentError
from ringattn.parallel.pipeline_eval import check_activation


class PipelineOp(NamedTuple):
    """One operation of a rank. Kinds: F forward, B backward, or a split backward: I input and W weight gradients."""

    kind: str
    stage: int
    micro_batch: int


class TimedOp(NamedTuple):
    """An operation, or the loss of a micro-batch (kind L), with its start and stop in seconds on one rank's clock."""

    op: PipelineOp
    start_s: float
    stop_s: float


class PipelineTimer:
    """Records when operations start and stop. On a GPU it records CUDA events, not the time of enqueueing."""

    def __init__(self, device: torch.device) -> None:
        self._origin_event = _timing_event() if device.type == "cuda" else None
        self._origin_s = time.perf_counter()
        self._records: list[tuple[PipelineOp, Any, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Drops all records, and sets the time to 0."""
        self._records.clear()
        if self._origin_event is not None:
            self._origin_event.record()
        self._origin_s = time.perf_counter()

    @contextmanager
    def record(self, kind: str, stage: int, micro_batch: int) -> Iterator[None]:
        """Records its body as one operation."""
        start = self._now()
        yield
        self._records.append((PipelineOp(kind, stage, micro_batch), start, self._now()))

    def timeline(self) -> list[TimedOp]:
        """Returns the recorded operations, in the order in which they stopped. Synchronises with a GPU."""
        return [TimedOp(op, self._seconds(start), self._seconds(stop)) for op, start, stop in self._records]

    def _now(self) -> Any:
        if self._origin_event is None:
            return time.perf_counter() - self._origin_s
        event = _timing_event()
        event.record()
        return event

    def _seconds(self, instant: Any) -> float:
        if self._origin_event is None:
            return float(instant)
        instant.synchronize()
        return float(self._origin_event.elapsed_time(instant)) / 1e3


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class TimedStage(PipelineStage):
    """torch's PipelineStage, with its operations recorded by a timer and its output's shape and dtype checked."""

    def __init__(
        self,
        module: nn.Module,
        index: int,
        num_stages: int,
        timer: PipelineTimer,
        *,
        device: torch.device,
        input_like: Tensor,
        output_like: Tensor,
        group: dist.ProcessGroup,
    ) -> None:
        """Creates the stage; input_like and output_like, on any device, give its activations' shapes and dtypes."""
        super().__init__(module, index, num_stages, device, input_args=input_like, output_args=output_like, group=group)
        self._timer, self._output_like = timer, output_like

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        with self._timer.record("F", self.stage_index, fwd_chunk_id):
            output = super().forward_one_chunk(fwd_chunk_id, args, kwargs, save_forward_output)
        if not self.is_last:
            check_activation(output, self._output_like, self.stage_index)
        return output

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        with self._timer.record("B" if full_backward else "I", self.stage_index, bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        with self._timer.record("W", self.stage_index, bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)


def bubble_fraction(timeline: Sequence[TimedOp], step_s: float) -> float:
    """Returns the fraction of a step in which a rank computed nothing.

    Args:
        timeline: of one rank, with operations that do not overlap.
        step_s: duration of the step on the slowest rank, in seconds.
    """
    return 1.0 - sum(timed.stop_s - timed.start_s for timed in timeline) / step_s


def bubble_formula(
    num_ranks: int, num_micro_batches: int, stages_per_rank: int = 1, *, fill_fraction: float = 1.0
) -> float:
    """Returns w (p - 1) / (v m + w (p - 1)): the bubble fraction of a schedule when communication takes no time.

    `simulated_bubble` gives the same for each schedule of `SCHEDULES`, given enough micro-batches to fill the pipeline:
    m >= p, or m >= 2 p - 1 for ZB-V. With fewer, ranks may idle longer.

    Args:
        num_ranks: p.
        num_micro_batches: m.
        stages_per_rank: v; all stages take the same time.
        fill_fraction: w, the fraction of a stage's work on a micro-batch that the next rank waits for, at both ends of
            a step: 1 with a full backward; 1/3 with a split backward in which F, I and W take the same time.
    Source: Narayanan et al. 2021, arXiv:2104.04473, which gives it as a fraction of the ideal time, while this is the
        fraction of the whole; Qi et al. 2023, arXiv:2401.10241, with w = (F + I - W) / (F + I + W) for ZB1P.
    """
    idle = fill_fraction * (num_ranks - 1)
    return idle / (stages_per_rank * num_micro_batches + idle)


def simulated_bubble(order: Mapping[int, Sequence[PipelineOp]], num_stages: int) -> float:
    """Returns the mean bubble fraction of an order of operations, limited by dependencies alone.

    F, I and W take one unit of time in every stage, B takes two, and communication takes none.

    Args:
        order: the operations of each rank, in order.
        num_stages: number of stages of the whole pipeline.
    Raises:
        ArgumentError: as `simulate_timeline`.
    """
    timelines = simulate_timeline(order, lambda op: 2.0 if op.kind == "B" else 1.0, num_stages)
    step_s = max(timeline[-1].stop_s for timeline in timelines.values())
    return statistics.mean(bubble_fraction(timeline, step_s) for timeline in timelines.values())


def simulate_timeline(
    order: Mapping[int, Sequence[PipelineOp]], duration_s: Callable[[PipelineOp], float], num_stages: int
) -> dict[int, list[TimedOp]]:
    """Returns the timeline of each rank, if communication took no time.

    Args:
        order: the operations of each rank, in order.
        duration_s: the duration of an operation.
        num_stages: number of stages of the whole pipeline.
    Raises:
        ArgumentError: when the order deadlocks.
    """
    finished: dict[PipelineOp, float] = {}
    timelines: dict[int, list[TimedOp]] = {rank: [] for rank in order}
    while any(len(timelines[rank]) < len(ops) for rank, ops in order.items()):
        num_finished = len(finished)
        for rank, ops in order.items():
            for op in ops[len(timelines[rank]) :]:
                ready = [_finish_time(finished, *dependency) for dependency in _dependencies(op, num_stages)]
                if None in ready:
                    break
                idle_since = timelines[rank][-1].stop_s if timelines[rank] else 0.0
                start = max([idle_since, *(at for at in ready if at is not None)])
                finished[op] = start + duration_s(op)
                timelines[rank].append(TimedOp(op, start, finished[op]))
        if len(finished) == num_finished:
            raise ArgumentError("order: deadlock, the ranks wait for each other")
    return timelines


def _dependencies(op: PipelineOp, num_stages: int) -> Iterator[tuple[str, int, int]]:
    """Yields the operations that must finish before: (any of these kinds, stage, micro-batch)."""
    kind, stage, micro_batch = op
    if kind == "F" and stage > 0:
        yield "F", stage - 1, micro_batch
    if kind in "BI":
        yield "F", stage, micro_batch
        if stage < num_stages - 1:
            yield "BI", stage + 1, micro_batch
    if kind == "W":
        yield "I", stage, micro_batch


def _finish_time(finished: Mapping[PipelineOp, float], kinds: str, stage: int, micro_batch: int) -> float | None:
    times = (finished.get(PipelineOp(kind, stage, micro_batch)) for kind in kinds)
    return next((at for at in times if at is not None), None)
