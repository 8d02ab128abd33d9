"""Pipeline parallelism: stages of layers on different ranks, and micro-batches that follow each other through them.

The schedules are torch's. What is ours: how layers are cut into stages, what a micro-batch is, and that everything that
describes one, its positions and its mask, travels with it as arguments.

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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ringattn.errors import ArgumentError
from ringattn.parallel.bubble import Action, Stopwatch, TimedStage
from ringattn.parallel.decoder import Decoder


@dataclass(frozen=True)
class Kind:
    """What a schedule asks of its stages."""

    schedule: type
    fewest: int  # stages per rank
    most: int | None
    folded: bool = False  # stages go down the ranks and up again, and not round and round
    in_parts: bool = False  # gradients of inputs first, those of weights later


KINDS: Mapping[str, Kind] = {
    "gpipe": Kind(ScheduleGPipe, 1, 1),
    "1f1b": Kind(Schedule1F1B, 1, 1),
    "interleaved-1f1b": Kind(ScheduleInterleaved1F1B, 2, None),
    "interleaved-zero-bubble": Kind(ScheduleInterleavedZeroBubble, 1, None, in_parts=True),
    "zbv-zero-bubble": Kind(ScheduleZBVZeroBubble, 2, 2, folded=True, in_parts=True),
}


@dataclass(frozen=True)
class Course:
    """Which layers form which stage, on which rank, and in what order micro-batches pass: integers only."""

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
        back = KINDS[self.schedule].folded and turn % 2 == 1
        return self.num_ranks - 1 - place if back else place


def plan_course(
    schedule: str,
    num_layers: int,
    num_ranks: int,
    num_micro_batches: int,
    *,
    stages_per_rank: int | None = None,
    costs: Sequence[float] | None = None,
) -> Course:
    """Returns how layers and micro-batches go through a pipeline. Nothing is sent.

    Args:
        schedule: a name out of `KINDS`.
        num_layers: of the whole model.
        num_ranks: along the axis "pp".
        num_micro_batches: in a step.
        stages_per_rank: the fewest that the schedule can have if None.
        costs: what each layer costs, in any unit; the dearest stage is made as cheap as it can be. None cuts by
            numbers of layers, the first stages having one more where they do not divide.
    Raises:
        ArgumentError: when there is no such schedule, or it cannot run these numbers.
    """
    kind = KINDS.get(schedule)
    if kind is None:
        raise ArgumentError(f"schedule={schedule!r:.100}: must be one of {', '.join(KINDS)}")
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
    return Course(schedule, num_ranks, num_micro_batches, tuple(range(*span) for span in pairwise(ends)))


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


def cut_stages(model: Decoder, course: Course, rank: int) -> list[Decoder]:
    """Returns a rank's stages: decoders that share their layers, and the names of their parameters, with the model.

    Args:
        model: whole; on the meta device if it is too large to be made on each rank.
        course: from `plan_course`.
        rank: along the axis "pp".
    """
    if len(model.layers) != sum(map(len, course.layers)):
        raise ArgumentError(f"the model has {len(model.layers)} layers, the course {sum(map(len, course.layers))}")
    stages = []
    for index in course.stages_of(rank):
        with torch.device("meta"):
            stage = Decoder(replace(model.config, num_layers=0, moe=None))
        stage.config = model.config
        stage.layers = nn.ModuleDict({str(layer): model.layers[str(layer)] for layer in course.layers[index]})
        stage.embed = model.embed if index == 0 else None
        last = index == len(course.layers) - 1
        stage.norm, stage.head = (model.norm, model.head) if last else (None, None)
        stages.append(stage)
    return stages


@dataclass(frozen=True)
class MicroBatch:
    """One part of a step's batch, as this rank has it. All ranks along "pp" have the same.

    Args:
        tokens: (B, S) int64, for the first stage.
        arguments: what every stage is called with beside its input: positions, mask, attend.
        target: what the loss is called with beside the last stage's output.
    """

    tokens: Tensor
    arguments: Mapping[str, Any]
    target: object


class Pipeline:
    """The stages of one rank, and the schedule that runs them."""

    def __init__(
        self,
        stages: Sequence[nn.Module],
        course: Course,
        axis: DeviceMesh,
        *,
        loss: Callable[[Tensor, Any], Tensor],
        dim: int,
        dtype: torch.dtype,
        row_shards: int = 1,
    ) -> None:
        """Makes it; nothing is sent before the first step.

        Args:
            stages: this rank's, from `cut_stages`, whatever has been done to them since. Where the schedule computes
                backward in two parts, what `fully_shard` has shared out stays whole from a step's first forward to its
                last backward, as with ZeRO-2.
            course: from `plan_course`, the same on all ranks.
            axis: the mesh of one dim along which the stages lie.
            loss: from the last stage's output and a micro-batch's target, its share of the loss: a scalar. Shares are
                added up, and not divided by their number.
            dim: width of what goes from stage to stage.
            dtype: of that.
            row_shards: the size of "tp", where each of its ranks has a part of a micro-batch's rows between layers.
        Raises:
            ArgumentError: when these are not the stages of the course, or the schedule cannot run them.
        """
        kind = KINDS[course.schedule]
        self._indices = course.stages_of(axis.get_local_rank())
        if course.num_ranks != axis.size() or len(stages) != len(self._indices):
            raise ArgumentError(
                f"the course is for {course.num_ranks} ranks with {len(self._indices)} stages each, here are "
                f"{axis.size()} with {len(stages)}"
            )
        if kind.in_parts and any(isinstance(stage, DistributedDataParallel) for stage in stages):
            raise ArgumentError(
                f"schedule={course.schedule!r} computes gradients of weights by themselves, which "
                "DistributedDataParallel does not see: use fully_shard or replicate"
            )
        if kind.in_parts:
            _keep_whole(stages)
        self.stages, self.course, self.axis = list(stages), course, axis
        self._loss, self._dim, self._dtype, self._row_shards = loss, dim, dtype, row_shards
        self._shape: torch.Size | None = None
        self._watch = Stopwatch(torch.device(axis.device_type))
        self._runners: list[TimedStage] = []
        self._schedule: Any = None

    def step(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Runs all micro-batches forward and backward, and returns the sum of their losses, on every rank of the axis.

        Gradients are added to those that the parameters have. All ranks of the mesh call it together.

        Args:
            batches: as many as the course says, all of one shape.
        Returns:
            A scalar: this rank's share, for it has some of the tokens only.
        Raises:
            ArgumentError: when there are more or fewer, or shapes differ.
        Communication: along the axis, (B, S, dim) for each micro-batch from each stage to the next, and as much back;
            and the loss. Within stages, what their layers communicate.
        """
        self._check(batches)
        if batches[0].tokens.shape != self._shape:
            self._prepare(batches[0].tokens)
        for runner in self._runners:
            runner.has_backward = True
            runner.clear_runtime_states()
        self._watch.restart()
        losses: list[Tensor] = []
        # What `step` of torch's schedules does, but it would cut one batch into parts of its own.
        self._schedule._step_microbatches(
            [(batch.tokens,) for batch in batches],
            [dict(batch.arguments) for batch in batches],
            [batch.target for batch in batches],
            losses,
            return_outputs=False,
        )
        for stage in self.stages:
            _finish_gradients(stage)
        total = torch.zeros((), dtype=torch.float64, device=batches[0].tokens.device)
        for each in losses:
            total += each.detach()
        last = self.course.rank_of(len(self.course.layers) - 1)
        dist.broadcast(total, group=self.axis.get_group(), group_src=last)
        return total

    def actions(self) -> list[Action]:
        """Returns what this rank computed in the last step, and when, in seconds since its start."""
        return self._watch.actions()

    def _check(self, batches: Sequence[MicroBatch]) -> None:
        if len(batches) != self.course.num_micro_batches:
            raise ArgumentError(f"{len(batches)} micro-batches: the course is for {self.course.num_micro_batches}")
        shapes = {tuple(batch.tokens.shape) for batch in batches}
        if len(shapes) > 1:
            raise ArgumentError(f"micro-batches of shapes {sorted(shapes)}: all of a step must have the same shape")

    def _prepare(self, tokens: Tensor) -> None:
        """Tells torch what goes from stage to stage: to find out, it would run them, out of step with other ranks."""
        self._shape = tokens.shape
        rows = tokens.shape[-1] // self._row_shards
        hidden = self._like((*tokens.shape[:-1], rows, self._dim))
        count = len(self.course.layers)
        self._runners = [
            TimedStage(
                stage,
                index,
                count,
                self._watch,
                device=tokens.device,
                takes=tokens.to("meta") if index == 0 else hidden,
                gives=hidden,
                group=self.axis.get_group(),
            )
            for stage, index in zip(self.stages, self._indices, strict=True)
        ]
        kind = KINDS[self.course.schedule]
        self._schedule = kind.schedule(
            self._runners[0] if kind.most == 1 else self._runners,
            self.course.num_micro_batches,
            loss_fn=self._timed_loss,
            scale_grads=False,
        )

    def _timed_loss(self, output: Tensor, target: object) -> Tensor:
        with self._watch.timing("L", len(self.course.layers) - 1, 0):
            return self._loss(output, target)

    def _like(self, shape: Sequence[int]) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device="meta", requires_grad=True)


def _keep_whole(stages: Sequence[nn.Module]) -> None:
    """Keeps weights whole between forward and backward: torch looks for those that took part in the forward."""
    for stage in stages:
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(False, recurse=False)


def _finish_gradients(stage: nn.Module) -> None:
    """Sums what is a part of a gradient on each rank: gradients of weights by themselves run no hooks."""
    for parameter in stage.parameters():
        grad = parameter.grad
        if isinstance(parameter, DTensor) and isinstance(grad, DTensor) and grad.placements != parameter.placements:
            parameter.grad = grad.redistribute(placements=parameter.placements)
