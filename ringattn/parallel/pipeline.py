"""Pipeline parallelism: stages of layers on different ranks, and micro-batches that follow each other through them.

The schedules are torch's. What is ours: how layers are cut into stages, what a micro-batch is, and that everything that
describes one, its positions and its mask, travels with it as arguments. Evaluation goes forward only, and needs no
schedule: all ranks take their turns at the same ticks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ringattn.comm.agreement import agree
from ringattn.comm.topology import rank_mesh
from ringattn.errors import ArgumentError
from ringattn.parallel.decoder import Decoder
from ringattn.parallel.expert_parallel import MixtureOfExperts
from ringattn.parallel.pipeline_eval import forward_only
from ringattn.parallel.pipeline_profile import PipelineTimer, TimedOp, TimedStage
from ringattn.parallel.pipeline_schedule import SCHEDULES, PipelineSchedule


def cut_stages(model: Decoder, course: PipelineSchedule, rank: int) -> list[Decoder]:
    """Returns a rank's stages: decoders that share their layers, and the names of their parameters, with the model.

    Args:
        model: whole; on the meta device if it is too large to be made on each rank.
        course: from `plan_course`.
        rank: along the axis "pp".
    Raises:
        ArgumentError: when the model has another number of layers, or its experts balance their load in other
            micro-batches than those of the course; on every rank alike.
    """
    if len(model.layers) != sum(map(len, course.layers)):
        raise ArgumentError(f"the model has {len(model.layers)} layers, the course {sum(map(len, course.layers))}")
    for module in model.modules():
        if not isinstance(module, MixtureOfExperts) or module.balance_weight == 0:
            continue
        if module.num_micro_batches != course.num_micro_batches:
            raise ArgumentError(
                f"the experts were made for num_micro_batches={module.num_micro_batches}, but the course has "
                f"{course.num_micro_batches}, and each balances its load by itself: make them by "
                f"partial(mixture, num_micro_batches={course.num_micro_batches})"
            )
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
        course: PipelineSchedule,
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
        kind = SCHEDULES[course.schedule]
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
        self._watch = PipelineTimer(torch.device(axis.device_type))
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
            DisagreementError: when ranks along the axis have others.
        Communication: along the axis, (B, S, dim) for each micro-batch from each stage to the next, and as much back;
            and the loss. Within stages, what their layers communicate. The first step with micro-batches of a shape
            compares notes.
        """
        self._check(batches, self.course.num_micro_batches)
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
        return self._told_by_last(losses, batches[0].tokens.device)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Runs micro-batches forward only, and returns the sum of their losses, on every rank of the axis.

        No gradient is made, none is touched, and nothing is kept of a micro-batch that has gone through. Whether
        modules are in `eval` mode is the caller's business. All ranks of the mesh call it together.

        Args:
            batches: any number of them, all of one shape, which need not be that of a step's.
        Returns:
            A scalar: this rank's share, for it has some of the tokens only.
        Raises:
            ArgumentError, DisagreementError: as `step`.
        Communication: along the axis, (B, S, dim) for each micro-batch from each stage to the next; and the loss.
            Within stages, what their layers communicate. At each tick of `Course.tick_of` all ranks pass on what they
            have made.
        """
        self._check(batches, None)
        stages, losses = dict(zip(self._indices, self.stages, strict=True)), []

        def turn(stage: int, index: int, came: Tensor | None) -> Tensor:
            batch = batches[index]
            out: Tensor = stages[stage](batch.tokens if came is None else came, **batch.arguments)
            if stage == len(self.course.layers) - 1:
                losses.append(self._loss(out, batch.target))
            return out

        tokens = batches[0].tokens
        forward_only(turn, self.course, self.axis, len(batches), like=self._between(tokens), device=tokens.device)
        for module in (module for stage in self.stages for module in stage.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()  # as after a backward: what stayed whole would be old after the next optimizer step
        return self._told_by_last(losses, tokens.device)

    def actions(self) -> list[TimedOp]:
        """Returns what this rank computed in the last step, and when, in seconds since its start."""
        return self._watch.actions()

    def _check(self, batches: Sequence[MicroBatch], count: int | None) -> None:
        """Checks micro-batches, of which there are to be so many, or any number; all ranks of the axis do so."""
        shapes = tuple(tuple(batch.tokens.shape) for batch in batches)
        told = (self.course, self._dim, self._dtype, self._row_shards, count is None, shapes)

        def prepare() -> tuple[Mapping[str, str], None]:
            if not shapes or count not in (None, len(shapes)):
                wanted = "at least one is needed" if count is None else f"the course is for {count}"
                raise ArgumentError(f"{len(shapes)} micro-batches: {wanted}")
            if len(set(shapes)) > 1:
                raise ArgumentError(f"micro-batches of shapes {sorted(set(shapes))}: all must have the same shape")
            if shapes[0][-1] % self._row_shards:
                raise ArgumentError(
                    f"row_shards={self._row_shards}: must divide the {shapes[0][-1]} rows of a micro-batch"
                )
            names = ("the course", "dim", "dtype", "row_shards", "what is run", "the shapes of micro-batches")
            return dict(zip(names, map(str, told), strict=True)), None

        agree(rank_mesh(self.axis), ("pipeline", *told), prepare)

    def _told_by_last(self, losses: Sequence[Tensor], device: torch.device) -> Tensor:
        """Returns the sum of the losses that the last stage has, on every rank of the axis."""
        total = torch.zeros((), dtype=torch.float64, device=device)
        for each in losses:
            total += each.detach()
        last = self.course.rank_of(len(self.course.layers) - 1)
        dist.broadcast(total, group=self.axis.get_group(), group_src=last)
        return total

    def _prepare(self, tokens: Tensor) -> None:
        """Tells torch what goes from stage to stage: to find out, it would run them, out of step with other ranks."""
        self._shape = tokens.shape
        hidden = self._between(tokens)
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
        kind = SCHEDULES[self.course.schedule]
        self._schedule = kind.schedule(
            self._runners[0] if kind.most == 1 else self._runners,
            self.course.num_micro_batches,
            loss_fn=self._timed_loss,
            scale_grads=False,
        )

    def _timed_loss(self, output: Tensor, target: object) -> Tensor:
        with self._watch.timing("L", len(self.course.layers) - 1, 0):
            return self._loss(output, target)

    def _between(self, tokens: Tensor) -> Tensor:
        """What goes from stage to stage: its shape and dtype."""
        shape = (*tokens.shape[:-1], tokens.shape[-1] // self._row_shards, self._dim)
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
