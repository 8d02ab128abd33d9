"""Pipeline parallelism: stages of layers on different ranks, run by torch's schedules over micro-batches.

This module adds to torch's engine: how layers are cut into stages, what a micro-batch is, and that a micro-batch's
positions and mask reach every stage as arguments. Evaluation is forward-only (`pipeline_eval`).
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
from ringattn.parallel.moe import MixtureOfExperts
from ringattn.parallel.pipeline_eval import run_forward
from ringattn.parallel.pipeline_profile import PipelineTimer, TimedOp, TimedStage
from ringattn.parallel.pipeline_schedule import PipelineSchedule


def cut_stages(model: Decoder, schedule: PipelineSchedule, rank: int) -> list[Decoder]:
    """Returns the stages of a rank: decoders that share layers and parameter names with the model.

    Args:
        model: the whole decoder; on the meta device if it is too large to be created on each rank.
        schedule: from `plan_pipeline`.
        rank: along the axis "pp".
    Raises:
        ArgumentError: when the schedule is for another number of layers, or the experts balance their load over another
            number of micro-batches than the schedule's; on every rank.
    """
    num_layers = sum(map(len, schedule.stage_layers))
    if len(model.layers) != num_layers:
        raise ArgumentError(f"the model has {len(model.layers)} layers, the schedule {num_layers}")
    for module in model.modules():
        if not isinstance(module, MixtureOfExperts) or module.aux_loss_weight == 0:
            continue
        if module.num_micro_batches != schedule.num_micro_batches:
            raise ArgumentError(
                f"the experts were made for num_micro_batches={module.num_micro_batches}, but the schedule has "
                f"{schedule.num_micro_batches}, and each micro-batch balances its own load: make them with "
                f"partial(make_moe, num_micro_batches={schedule.num_micro_batches})"
            )
    stages = []
    for index in schedule.stages_of(rank):
        with torch.device("meta"):
            stage = Decoder(replace(model.config, num_layers=0, moe=None))
        stage.config = model.config
        stage.layers = nn.ModuleDict({str(layer): model.layers[str(layer)] for layer in schedule.stage_layers[index]})
        stage.embed = model.embed if index == 0 else None
        is_last = index == schedule.num_stages - 1
        stage.norm, stage.head = (model.norm, model.head) if is_last else (None, None)
        stages.append(stage)
    return stages


@dataclass(frozen=True)
class MicroBatch:
    """One part of a step's batch, local to this rank. All ranks along "pp" hold the same.

    Args:
        tokens: (B, S) int64, the input of the first stage.
        arguments: keyword arguments of every stage: positions, mask, attention_fn.
        target: second argument of the loss function.
    """

    tokens: Tensor
    arguments: Mapping[str, Any]
    target: object


class Pipeline:
    """The stages of one rank, and the schedule that runs them."""

    def __init__(
        self,
        stages: Sequence[nn.Module],
        schedule: PipelineSchedule,
        pp_mesh: DeviceMesh,
        *,
        loss_fn: Callable[[Tensor, Any], Tensor],
        dim: int,
        dtype: torch.dtype,
        tp_size: int = 1,
    ) -> None:
        """Creates the pipeline. Sends nothing before the first step.

        Args:
            stages: this rank's, from `cut_stages`, after `parallelize`. With a split backward, FSDP keeps their weights
                gathered from the first forward of a step to its last backward, as with ZeRO-2.
            schedule: from `plan_pipeline`, the same on all ranks.
            pp_mesh: the one-dimensional mesh of the axis "pp".
            loss_fn: (output of the last stage, target of a micro-batch) -> the micro-batch's share of the loss, a
                scalar. Shares are summed, not averaged.
            dim: width of the activations between stages.
            dtype: dtype of the activations between stages.
            tp_size: size of the axis "tp", over which the rows of activations between stages are sharded.
        Raises:
            ArgumentError: when the stages do not match the schedule, or the schedule cannot run them.
        """
        self._indices = schedule.stages_of(pp_mesh.get_local_rank())
        if schedule.num_ranks != pp_mesh.size() or len(stages) != len(self._indices):
            raise ArgumentError(
                f"the schedule is for {schedule.num_ranks} ranks with {len(self._indices)} stages each, but there are "
                f"{pp_mesh.size()} ranks with {len(stages)}"
            )
        if schedule.spec.split_backward:
            if any(isinstance(stage, DistributedDataParallel) for stage in stages):
                raise ArgumentError(
                    f"schedule {schedule.name!r} computes weight gradients in a separate backward, whose hooks "
                    "DistributedDataParallel does not run: use fully_shard or replicate"
                )
            _disable_reshard_after_forward(stages)
        self.stages, self.schedule, self.pp_mesh = list(stages), schedule, pp_mesh
        self._loss_fn, self._dim, self._dtype, self._tp_size = loss_fn, dim, dtype, tp_size
        self._shape: torch.Size | None = None
        self._timer = PipelineTimer(torch.device(pp_mesh.device_type))
        self._torch_stages: list[TimedStage] = []
        self._torch_schedule: Any = None

    def step(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Runs all micro-batches forward and backward, and accumulates gradients. Collective over the whole mesh.

        Args:
            micro_batches: schedule.num_micro_batches of them, all of one shape.
        Returns:
            The sum of the losses, a scalar, on every rank of "pp": the share of this rank's tokens.
        Raises:
            ArgumentError: when their number or shapes are wrong.
            DisagreementError: when ranks along "pp" pass different ones.
        Communication: along "pp", (B, S, dim) per micro-batch from each stage to the next, and its gradient back; and
            the loss. Within stages, the communication of their layers. The first step of a shape compares the ranks'
            arguments.
        """
        self._check(micro_batches, self.schedule.num_micro_batches)
        if micro_batches[0].tokens.shape != self._shape:
            self._build_torch_schedule(micro_batches[0].tokens)
        for torch_stage in self._torch_stages:
            torch_stage.has_backward = True
            torch_stage.clear_runtime_states()
        self._timer.reset()
        losses: list[Tensor] = []
        # This is what `step` of torch's schedules does, except that `step` splits one batch into micro-batches itself.
        self._torch_schedule._step_microbatches(
            [(micro_batch.tokens,) for micro_batch in micro_batches],
            [dict(micro_batch.arguments) for micro_batch in micro_batches],
            [micro_batch.target for micro_batch in micro_batches],
            losses,
            return_outputs=False,
        )
        for stage in self.stages:
            _reduce_partial_gradients(stage)
        return self._broadcast_loss(losses, micro_batches[0].tokens.device)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Runs micro-batches forward only. Collective over the whole mesh.

        Gradients are neither computed nor changed, and activations are freed once used. The caller sets `eval` mode.

        Args:
            micro_batches: any number of them, all of one shape, which may differ from the shape in `step`.
        Returns:
            The sum of the losses, a scalar, on every rank of "pp": the share of this rank's tokens.
        Raises:
            ArgumentError, DisagreementError: as `step`.
        Communication: along "pp", (B, S, dim) per micro-batch from each stage to the next, all ranks at the same ticks
            (`PipelineSchedule.tick_of`); and the loss. Within stages, the communication of their layers.
        """
        self._check(micro_batches, None)
        stages, losses = dict(zip(self._indices, self.stages, strict=True)), []

        def run_stage(stage: int, index: int, stage_input: Tensor | None) -> Tensor:
            micro_batch = micro_batches[index]
            x = micro_batch.tokens if stage_input is None else stage_input
            output: Tensor = stages[stage](x, **micro_batch.arguments)
            if stage == self.schedule.num_stages - 1:
                losses.append(self._loss_fn(output, micro_batch.target))
            return output

        tokens = micro_batches[0].tokens
        activation, count = self._activation_like(tokens), len(micro_batches)
        run_forward(run_stage, self.schedule, self.pp_mesh, count, activation=activation, device=tokens.device)
        for module in (module for stage in self.stages for module in stage.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()  # as after a backward: gathered weights would be stale after the next optimizer step
        return self._broadcast_loss(losses, tokens.device)

    def timeline(self) -> list[TimedOp]:
        """Returns what this rank computed in the last step, with times in seconds since its start."""
        return self._timer.timeline()

    def _check(self, micro_batches: Sequence[MicroBatch], count: int | None) -> None:
        """Checks the micro-batches, whose number must be `count` (None for any), and that all ranks of "pp" agree."""
        shapes = tuple(tuple(micro_batch.tokens.shape) for micro_batch in micro_batches)
        arguments = (self.schedule, self._dim, self._dtype, self._tp_size, count is None, shapes)

        def prepare() -> tuple[Mapping[str, str], None]:
            if not shapes or count not in (None, len(shapes)):
                expected = "at least one is needed" if count is None else f"the schedule is for {count}"
                raise ArgumentError(f"{len(shapes)} micro-batches: {expected}")
            if len(set(shapes)) > 1:
                raise ArgumentError(f"micro-batches of shapes {sorted(set(shapes))}: all must have the same shape")
            if shapes[0][-1] % self._tp_size:
                raise ArgumentError(f"tp_size={self._tp_size}: must divide the {shapes[0][-1]} rows of a micro-batch")
            names = ("the schedule", "dim", "dtype", "tp_size", "step or evaluate", "the shapes of micro-batches")
            return dict(zip(names, map(str, arguments), strict=True)), None

        agree(rank_mesh(self.pp_mesh), ("pipeline", *arguments), prepare)

    def _broadcast_loss(self, losses: Sequence[Tensor], device: torch.device) -> Tensor:
        """Broadcasts the sum of the last stage's losses to every rank of "pp"."""
        total = torch.zeros((), dtype=torch.float64, device=device)
        for loss in losses:
            total += loss.detach()
        last_rank = self.schedule.rank_of(self.schedule.num_stages - 1)
        dist.broadcast(total, group=self.pp_mesh.get_group(), group_src=last_rank)
        return total

    def _build_torch_schedule(self, tokens: Tensor) -> None:
        """Builds torch's stages with explicit shapes.

        torch would infer the shapes by running the stages one after the other, and the collectives within them would
        be out of order with other ranks.
        """
        self._shape = tokens.shape
        activation = self._activation_like(tokens)
        self._torch_stages = [
            TimedStage(
                stage,
                index,
                self.schedule.num_stages,
                self._timer,
                device=tokens.device,
                input_like=tokens.to("meta") if index == 0 else activation,
                output_like=activation,
                group=self.pp_mesh.get_group(),
            )
            for stage, index in zip(self.stages, self._indices, strict=True)
        ]
        spec = self.schedule.spec
        self._torch_schedule = spec.torch_class(
            self._torch_stages[0] if spec.max_stages == 1 else self._torch_stages,
            self.schedule.num_micro_batches,
            loss_fn=self._timed_loss,
            scale_grads=False,
        )

    def _timed_loss(self, output: Tensor, target: object) -> Tensor:
        with self._timer.record("L", self.schedule.num_stages - 1, 0):
            return self._loss_fn(output, target)

    def _activation_like(self, tokens: Tensor) -> Tensor:
        """Returns a meta tensor with the shape and dtype of the activations between stages."""
        shape = (*tokens.shape[:-1], tokens.shape[-1] // self._tp_size, self._dim)
        return torch.empty(shape, dtype=self._dtype, device="meta", requires_grad=True)


def _disable_reshard_after_forward(stages: Sequence[nn.Module]) -> None:
    """Keeps weights gathered from forward to backward: torch's split backward looks up the forward's weight tensors."""
    for stage in stages:
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(False, recurse=False)


def _reduce_partial_gradients(stage: nn.Module) -> None:
    """Sums gradients that are partial over "tp": a separate backward for weights does not run the hooks that do."""
    for parameter in stage.parameters():
        grad = parameter.grad
        if isinstance(parameter, DTensor) and isinstance(grad, DTensor) and grad.placements != parameter.placements:
            parameter.grad = grad.redistribute(placements=parameter.placements)
