"""Forward-only pipelining for evaluation: all ranks run one stage per clock tick, then exchange activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringattn.comm.messages import Message, post
from ringattn.errors import ArgumentError
from ringattn.parallel.pipeline_schedule import PipelineSchedule

_TAG = 0  # there is one kind of message


def run_forward(
    run_stage: Callable[[int, int, Tensor | None], Tensor],
    schedule: PipelineSchedule,
    pp_mesh: DeviceMesh,
    num_micro_batches: int,
    *,
    activation: Tensor,
    device: torch.device,
) -> None:
    """Runs every stage of this rank on every micro-batch, at the ticks of `PipelineSchedule.tick_of`.

    Collective over pp_mesh. All activations of a tick are sent together, before the next tick.

    Args:
        run_stage: (stage, micro_batch, input) -> output; the input is the previous stage's output, None in the first.
        schedule: the ranks and ticks of the stages.
        pp_mesh: the one-dimensional mesh of the axis "pp".
        num_micro_batches: any number, independent of schedule.num_micro_batches.
        activation: a tensor, on any device, with the shape and dtype of the activations between stages.
        device: the device of the activations.
    Raises:
        ArgumentError: when a stage's output does not have the shape and dtype of `activation`.
    Communication: one activation per micro-batch from each stage to the next.
    """
    rank, last_stage = pp_mesh.get_local_rank(), schedule.num_stages - 1
    work = {
        schedule.tick_of(stage, micro_batch): (stage, micro_batch)
        for stage in schedule.stages_of(rank)
        for micro_batch in range(num_micro_batches)
    }
    next_input: Tensor | None = None
    for tick in range(schedule.tick_of(last_stage, num_micro_batches - 1) + 1):
        output, stage_input, next_input = None, next_input, None
        sends, receives = [], []
        if tick in work:
            stage, micro_batch = work[tick]
            output = run_stage(stage, micro_batch, stage_input)
            if stage < last_stage:
                check_activation(output, activation, stage)
            if stage < last_stage and (target := schedule.rank_of(stage + 1)) != rank:
                sends = [Message(output.contiguous(), target, _TAG)]
        if tick + 1 in work and (previous_stage := work[tick + 1][0] - 1) >= 0:
            if (source := schedule.rank_of(previous_stage)) == rank:
                next_input = output
            else:
                next_input = torch.empty(activation.shape, dtype=activation.dtype, device=device)
                receives = [Message(next_input, source, _TAG)]
        pending_sends, pending_receives = post(pp_mesh.get_group(), sends, receives)
        for pending in (*pending_receives, *pending_sends):
            pending.wait()


def check_activation(output: Tensor, activation: Tensor, stage: int) -> None:
    """Checks a stage's output against the shape and dtype for which the next stage has allocated its buffer.

    Raises:
        ArgumentError: when shape or dtype differ.
    """
    if (output.shape, output.dtype) != (activation.shape, activation.dtype):
        raise ArgumentError(
            f"stage {stage} returned {tuple(output.shape)} in {output.dtype}, but the next stage expects "
            f"{tuple(activation.shape)} in {activation.dtype}: dim, dtype and tp_size must match the model"
        )
