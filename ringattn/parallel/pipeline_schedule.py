"""Pipeline schedules: which torch schedules are supported, and which layers and micro-batches run where and when.

    name                      stages per rank   backward          source
    gpipe                     1                 full              Huang et al. 2019, arXiv:1811.06965
    1f1b                      1                 full              Narayanan et al. 2021, arXiv:2104.04473
    interleaved-1f1b          2 or more         full              the same
    interleaved-zero-bubble   1 or more         split             Qi et al. 2023, arXiv:2401.10241: ZB1P
    zbv-zero-bubble           2, V-shaped       split             the same: ZB-V

A split backward first computes the gradient of a stage's input, which the previous stage waits for, and later, when the
rank would idle, the gradient of its weights. All of this module is integers; it does not know about tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from ringattn.errors import ArgumentError


@dataclass(frozen=True)
class ScheduleSpec:
    """What a torch schedule requires of the stages, and how it computes the backward."""

    torch_class: type
    min_stages: int  # per rank
    max_stages: int | None  # per rank; None for any number
    v_shaped: bool = False  # stages go down the ranks and up again, instead of round-robin
    split_backward: bool = False  # gradients of inputs first, gradients of weights later


SCHEDULES: Mapping[str, ScheduleSpec] = {
    "gpipe": ScheduleSpec(ScheduleGPipe, 1, 1),
    "1f1b": ScheduleSpec(Schedule1F1B, 1, 1),
    "interleaved-1f1b": ScheduleSpec(ScheduleInterleaved1F1B, 2, None),
    "interleaved-zero-bubble": ScheduleSpec(ScheduleInterleavedZeroBubble, 1, None, split_backward=True),
    "zbv-zero-bubble": ScheduleSpec(ScheduleZBVZeroBubble, 2, 2, v_shaped=True, split_backward=True),
}


@dataclass(frozen=True)
class PipelineSchedule:
    """Which layers form which stage, on which rank each stage is, and in what order micro-batches pass.

    Args:
        name: of the schedule, a key of `SCHEDULES`.
        num_ranks: size of the axis "pp".
        num_micro_batches: micro-batches per step.
        stage_layers: the layers of each stage.
    """

    name: str
    num_ranks: int
    num_micro_batches: int
    stage_layers: tuple[range, ...]

    @property
    def spec(self) -> ScheduleSpec:
        """The properties of the torch schedule."""
        return SCHEDULES[self.name]

    @property
    def num_stages(self) -> int:
        """The number of stages on all ranks together."""
        return len(self.stage_layers)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Returns the stages of a rank, in the order of their layers."""
        return tuple(stage for stage in range(self.num_stages) if self.rank_of(stage) == rank)

    def rank_of(self, stage: int) -> int:
        """Returns the rank of a stage."""
        lap, index = divmod(stage, self.num_ranks)
        reverse = self.spec.v_shaped and lap % 2 == 1
        return self.num_ranks - 1 - index if reverse else index

    def tick_of(self, stage: int, micro_batch: int) -> int:
        """Returns the clock tick at which a stage runs a micro-batch, in a forward-only pass of one tick per stage.

        The previous stage runs the micro-batch one tick earlier, and no rank runs two stages at one tick. Round-robin
        stages process num_ranks micro-batches per round; V-shaped stages alternate between a rank's two stages.
        """
        if self.spec.v_shaped:
            return stage + 2 * micro_batch
        round_index, index = divmod(micro_batch, self.num_ranks)
        return round_index * self.num_stages + stage + index


def plan_pipeline(
    schedule: str,
    num_layers: int,
    num_ranks: int,
    num_micro_batches: int,
    *,
    stages_per_rank: int | None = None,
    layer_costs: Sequence[float] | None = None,
) -> PipelineSchedule:
    """Returns the pipeline schedule of a model: its stages, their ranks, and the order of micro-batches.

    Args:
        schedule: "gpipe", "1f1b", "interleaved-1f1b", "interleaved-zero-bubble" or "zbv-zero-bubble".
        num_layers: layers of the whole model.
        num_ranks: size of the axis "pp".
        num_micro_batches: micro-batches per step.
        stages_per_rank: None takes the smallest number that the schedule supports.
        layer_costs: the cost of each layer, in any unit; the cost of the most expensive stage is minimised. None
            divides the number of layers evenly, with one more layer in the first stages where it does not divide.
    Raises:
        ArgumentError: when there is no such schedule, or it does not support these numbers.
    Communication: none.
    """
    spec = SCHEDULES.get(schedule)
    if spec is None:
        raise ArgumentError(f"schedule={schedule!r:.100}: must be one of {', '.join(SCHEDULES)}")
    per_rank = spec.min_stages if stages_per_rank is None else stages_per_rank
    if per_rank < spec.min_stages or (spec.max_stages is not None and per_rank > spec.max_stages):
        allowed = f"{spec.min_stages}" if spec.max_stages == spec.min_stages else f"{spec.min_stages} or more"
        raise ArgumentError(f"stages_per_rank={per_rank}: {schedule} needs {allowed}")
    num_stages = num_ranks * per_rank
    if num_stages > num_layers:
        raise ArgumentError(
            f"pp={num_ranks} x stages_per_rank={per_rank} = {num_stages} stages, but the model has {num_layers} "
            "layers: a stage needs at least one"
        )
    _check_micro_batches(schedule, num_ranks, num_micro_batches)
    if layer_costs is None:
        quotient, remainder = divmod(num_layers, num_stages)
        sizes = [quotient + (stage < remainder) for stage in range(num_stages)]
    else:
        sizes = _balanced_sizes(layer_costs, num_layers, num_stages)
    bounds = [sum(sizes[:stage]) for stage in range(num_stages + 1)]
    return PipelineSchedule(schedule, num_ranks, num_micro_batches, tuple(range(*span) for span in pairwise(bounds)))


def _check_micro_batches(schedule: str, num_ranks: int, num_micro_batches: int) -> None:
    minimum = num_ranks if schedule == "1f1b" else 1
    if num_micro_batches < minimum:
        raise ArgumentError(
            f"num_micro_batches={num_micro_batches}: {schedule} needs at least {minimum} on {num_ranks} ranks"
        )
    rounds = max(1, num_micro_batches // num_ranks)
    if schedule.startswith("interleaved") and num_micro_batches % rounds:
        raise ArgumentError(
            f"num_micro_batches={num_micro_batches}: {schedule} on {num_ranks} ranks runs them in {rounds} rounds, "
            f"which must divide their number; any multiple of {num_ranks} works"
        )


def _balanced_sizes(layer_costs: Sequence[float], num_layers: int, num_stages: int) -> list[int]:
    """Cuts the layers into consecutive stages such that the cost of the most expensive stage is minimal."""
    if len(layer_costs) != num_layers or min(layer_costs) < 0:
        raise ArgumentError(
            f"layer_costs={list(layer_costs)!r:.100}: must be {num_layers} numbers of at least 0, one per layer"
        )
    prefix_sums = [0.0]
    for cost in layer_costs:
        prefix_sums.append(prefix_sums[-1] + cost)
    # best[n]: (cost of the most expensive stage, sizes of the stages) when the stages so far have the first n layers.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for stage in range(1, num_stages + 1):
        ends = range(stage, num_layers - (num_stages - stage) + 1)
        best = {
            end: min(
                (max(max_cost, prefix_sums[end] - prefix_sums[start]), [*sizes, end - start])
                for start, (max_cost, sizes) in best.items()
                if start < end
            )
            for end in ends
        }
    return best[num_layers][1]
