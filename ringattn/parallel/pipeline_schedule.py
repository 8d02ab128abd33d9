"""The courses of micro-batches through the stages of a pipeline: which torch schedules run, and who does what when.

    name                      stages per rank   backward        source
    gpipe                     1                 whole           Huang et al. 2019, arXiv:1811.06965
    1f1b                      1                 whole           Narayanan et al. 2021, arXiv:2104.04473
    interleaved-1f1b          2 or more         whole           the same
    interleaved-zero-bubble   1 or more         in two parts    Qi et al. 2023, arXiv:2401.10241: ZB1P
    zbv-zero-bubble           2, folded         in two parts    the same: ZB-V

In two parts: first the gradient of a stage's input, for which the stage before waits; that of its weights later, when
the rank would have nothing to do.
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
    """What a schedule asks of its stages."""

    schedule: type
    fewest: int  # stages per rank
    most: int | None
    folded: bool = False  # stages go down the ranks and up again, and not round and round
    in_parts: bool = False  # gradients of inputs first, those of weights later


SCHEDULES: Mapping[str, ScheduleSpec] = {
    "gpipe": ScheduleSpec(ScheduleGPipe, 1, 1),
    "1f1b": ScheduleSpec(Schedule1F1B, 1, 1),
    "interleaved-1f1b": ScheduleSpec(ScheduleInterleaved1F1B, 2, None),
    "interleaved-zero-bubble": ScheduleSpec(ScheduleInterleavedZeroBubble, 1, None, in_parts=True),
    "zbv-zero-bubble": ScheduleSpec(ScheduleZBVZeroBubble, 2, 2, folded=True, in_parts=True),
}


@dataclass(frozen=True)
class PipelineSchedule:
    """Which layers form which stage, on which rank, and in what order micro-batches pass. Nothing of tensors."""

    schedule: str
    num_ranks: int
    num_micro_batches: int
    layers: tuple[range, ...]  # of each stage

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Returns the stages of a rank, the first layers first."""
        ranks = range(len(self.layers))
        return tuple(stage for stage in ranks if self.rank_of(stage) == rank)

    def rank_of(self, stage: int) -> int:
        """Returns whose stage it is."""
        turn, place = divmod(stage, self.num_ranks)
        back = SCHEDULES[self.schedule].folded and turn % 2 == 1
        return self.num_ranks - 1 - place if back else place

    def tick_of(self, stage: int, micro_batch: int) -> int:
        """Returns when a stage has its turn at a micro-batch, if all only go forward and each turn takes one tick.

        The stage before has had its turn one tick earlier, and no rank has two turns at once. Where stages go round,
        as many micro-batches as there are ranks go round together; where they are folded, a rank takes turns.
        """
        if SCHEDULES[self.schedule].folded:
            return stage + 2 * micro_batch
        rounds, place = divmod(micro_batch, self.num_ranks)
        return rounds * len(self.layers) + stage + place


def plan_pipeline(
    schedule: str,
    num_layers: int,
    num_ranks: int,
    num_micro_batches: int,
    *,
    stages_per_rank: int | None = None,
    costs: Sequence[float] | None = None,
) -> PipelineSchedule:
    """Returns how layers and micro-batches go through a pipeline. Nothing is sent.

    Args:
        schedule: a name out of `SCHEDULES`.
        num_layers: of the whole model.
        num_ranks: along the axis "pp".
        num_micro_batches: in a step.
        stages_per_rank: the fewest that the schedule can have if None.
        costs: what each layer costs, in any unit; the dearest stage is made as cheap as it can be. None cuts by
            numbers of layers, the first stages having one more where they do not divide.
    Raises:
        ArgumentError: when there is no such schedule, or it cannot run these numbers.
    """
    kind = SCHEDULES.get(schedule)
    if kind is None:
        raise ArgumentError(f"schedule={schedule!r:.100}: must be one of {', '.join(SCHEDULES)}")
    per_rank = kind.fewest if stages_per_rank is None else stages_per_rank
    if per_rank < kind.fewest or (kind.most is not None and per_rank > kind.most):
        allowed = f"{kind.fewest}" if kind.most == kind.fewest else f"{kind.fewest} or more"
        raise ArgumentError(f"stages_per_rank={per_rank}: {schedule} needs {allowed}")
    num_stages = num_ranks * per_rank
    if num_stages > num_layers:
        raise ArgumentError(
            f"pp={num_ranks} x stages_per_rank={per_rank} = {num_stages} stages, but the model has {num_layers} "
            "layers: a stage has at least one"
        )
    _check_micro_batches(schedule, num_ranks, num_micro_batches)
    if costs is None:
        each, more = divmod(num_layers, num_stages)
        sizes = [each + (stage < more) for stage in range(num_stages)]
    else:
        sizes = _even_sizes(costs, num_layers, num_stages)
    ends = [sum(sizes[:stage]) for stage in range(num_stages + 1)]
    return PipelineSchedule(schedule, num_ranks, num_micro_batches, tuple(range(*span) for span in pairwise(ends)))


def _check_micro_batches(schedule: str, num_ranks: int, count: int) -> None:
    fewest = num_ranks if schedule == "1f1b" else 1
    if count < fewest:
        raise ArgumentError(f"num_micro_batches={count}: {schedule} needs at least {fewest} on {num_ranks} ranks")
    rounds = max(1, count // num_ranks)
    if schedule.startswith("interleaved") and count % rounds:
        raise ArgumentError(
            f"num_micro_batches={count}: {schedule} on {num_ranks} ranks deals them in {rounds} rounds, which must "
            f"divide their number; a multiple of {num_ranks} always will do"
        )


def _even_sizes(costs: Sequence[float], num_layers: int, num_stages: int) -> list[int]:
    """Cuts a row of layers so that the dearest stage is as cheap as can be."""
    if len(costs) != num_layers or min(costs) < 0:
        raise ArgumentError(
            f"costs={list(costs)!r:.100}: must be {num_layers} numbers of at least 0, one for each layer"
        )
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[n]: (the dearest of the stages so far, their sizes), when they have the first n layers.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for stage in range(1, num_stages + 1):
        ends = range(stage, num_layers - (num_stages - stage) + 1)
        best = {
            end: min(
                (max(dearest, sums[end] - sums[start]), [*sizes, end - start])
                for start, (dearest, sizes) in best.items()
                if start < end
            )
            for end in ends
        }
    return best[num_layers][1]
