"""When each stage of a pipeline computes, and what part of the time it does not: the bubble, measured and by theory."""

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
from ringattn.parallel.pipeline_eval import check_given


class PipelineOp(NamedTuple):
    """One thing that a rank does: F, forward; B, backward, or its parts: I down to the input, W weights."""

    kind: str
    stage: int
    micro_batch: int


class TimedOp(NamedTuple):
    """A move, or the loss of one (L), and when it was; seconds by one rank's clock."""

    move: PipelineOp
    start_s: float
    stop_s: float


class PipelineTimer:
    """Notes when moves begin and end; on a GPU, when it gets to them, not when they were queued."""

    def __init__(self, device: torch.device) -> None:
        self._origin = _event() if device.type == "cuda" else None
        self._origin_s = time.perf_counter()
        self._marks: list[tuple[PipelineOp, Any, Any]] = []
        self.restart()

    def restart(self) -> None:
        """Forgets everything, and counts from now on."""
        self._marks.clear()
        if self._origin is not None:
            self._origin.record()
        self._origin_s = time.perf_counter()

    @contextmanager
    def timing(self, kind: str, stage: int, micro_batch: int) -> Iterator[None]:
        """Notes what happens within it as one move."""
        start = self._mark()
        yield
        self._marks.append((PipelineOp(kind, stage, micro_batch), start, self._mark()))

    def actions(self) -> list[TimedOp]:
        """Returns what was noted, in the order in which it ended. Waits for a GPU to have done it."""
        return [TimedOp(move, self._seconds(start), self._seconds(stop)) for move, start, stop in self._marks]

    def _mark(self) -> Any:
        if self._origin is None:
            return time.perf_counter() - self._origin_s
        event = _event()
        event.record()
        return event

    def _seconds(self, mark: Any) -> float:
        if self._origin is None:
            return float(mark)
        mark.synchronize()
        return float(self._origin.elapsed_time(mark)) / 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class TimedStage(PipelineStage):
    """A stage of torch's that tells a stopwatch when it computes."""

    def __init__(
        self,
        module: nn.Module,
        index: int,
        num_stages: int,
        watch: PipelineTimer,
        *,
        device: torch.device,
        takes: Tensor,
        gives: Tensor,
        group: dist.ProcessGroup,
    ) -> None:
        """Makes it; `takes` and `gives` have the shape and dtype of its input and output, on any device."""
        super().__init__(module, index, num_stages, device, input_args=takes, output_args=gives, group=group)
        self._watch, self._gives = watch, gives

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        """Does what torch's does, and checks what is passed on."""
        with self._watch.timing("F", self.stage_index, fwd_chunk_id):
            gave = super().forward_one_chunk(fwd_chunk_id, args, kwargs, save_forward_output)
        if not self.is_last:
            check_given(gave, self._gives, self.stage_index)
        return gave

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Does what torch's does."""
        with self._watch.timing("B" if full_backward else "I", self.stage_index, bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Does what torch's does."""
        with self._watch.timing("W", self.stage_index, bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)


def bubble_fraction(actions: Sequence[TimedOp], window_s: float) -> float:
    """Returns what part of a window a rank did not compute in.

    Args:
        actions: of one rank, one after the other.
        window_s: how long the step took, on the slowest rank.
    """
    return 1.0 - sum(action.stop_s - action.start_s for action in actions) / window_s


def bubble_formula(num_ranks: int, num_micro_batches: int, stages_per_rank: int = 1, *, waited: float = 1.0) -> float:
    """Returns w (p - 1) / (v m + w (p - 1)), what part of the time each rank idles; passing things on takes no time.

    It is what `ideal_bubble` finds for each schedule of `KINDS` once there are enough micro-batches to fill the
    pipeline: m >= p, or 2 p - 1 for ZB-V. With fewer, ranks may idle longer.

    Narayanan et al. 2021, arXiv:2104.04473, give it as a part of the ideal time; this is a part of the whole. Qi et al.
    2023, arXiv:2401.10241, have w = (F + I - W) / (F + I + W) for ZB1P.

    Args:
        num_ranks: p.
        num_micro_batches: m.
        stages_per_rank: v; stages are even.
        waited: w, what part of a stage's work on a micro-batch the next rank waits for, at both ends of a step: all of
            it with whole backwards; a third in two parts, where F, I and W take as long.
    """
    idle = waited * (num_ranks - 1)
    return idle / (stages_per_rank * num_micro_batches + idle)


def ideal_bubble(order: Mapping[int, Sequence[PipelineOp]], num_stages: int) -> float:
    """Returns what part of the time ranks idle in the mean, by what waits for what alone.

    All stages are even, F, I and W take as long, B as two of them, and passing things on takes no time.

    Args: those of `ideal_actions`.
    Raises:
        ArgumentError: as there.
    """
    actions = ideal_actions(order, lambda move: 2.0 if move.kind == "B" else 1.0, num_stages)
    window = max(each[-1].stop_s for each in actions.values())
    return statistics.mean(bubble_fraction(each, window) for each in actions.values())


def ideal_actions(
    order: Mapping[int, Sequence[PipelineOp]], seconds: Callable[[PipelineOp], float], num_stages: int
) -> dict[int, list[TimedOp]]:
    """Returns when each rank would do what, if passing things on took no time.

    Args:
        order: what each rank does, one after the other.
        seconds: how long a move takes.
        num_stages: of the whole pipeline.
    Raises:
        ArgumentError: when ranks wait for each other for ever.
    """
    done: dict[PipelineOp, float] = {}
    actions: dict[int, list[TimedOp]] = {rank: [] for rank in order}
    while any(len(actions[rank]) < len(moves) for rank, moves in order.items()):
        before = len(done)
        for rank, moves in order.items():
            for move in moves[len(actions[rank]) :]:
                needed = [_done_at(done, kinds, *where) for kinds, *where in _needs(move, num_stages)]
                if None in needed:
                    break
                free = actions[rank][-1].stop_s if actions[rank] else 0.0
                start = max([free, *(at for at in needed if at is not None)])
                done[move] = start + seconds(move)
                actions[rank].append(TimedOp(move, start, done[move]))
        if len(done) == before:
            raise ArgumentError("the ranks of this order wait for each other for ever")
    return actions


def _needs(move: PipelineOp, num_stages: int) -> Iterator[tuple[str, int, int]]:
    """What must be over before: (any of these kinds, stage, micro-batch)."""
    kind, stage, batch = move
    if kind == "F" and stage > 0:
        yield "F", stage - 1, batch
    if kind in "BI":
        yield "F", stage, batch
        if stage < num_stages - 1:
            yield "BI", stage + 1, batch
    if kind == "W":
        yield "I", stage, batch


def _done_at(done: Mapping[PipelineOp, float], kinds: str, stage: int, micro_batch: int) -> float | None:
    return next((at for kind in kinds if (at := done.get(PipelineOp(kind, stage, micro_batch))) is not None), None)
