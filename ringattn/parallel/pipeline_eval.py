"""Micro-batches through the stages of a pipeline without a backward: all ranks take their turns at the same ticks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringattn.comm.messages import Message, post
from ringattn.errors import ArgumentError
from ringattn.parallel.pipeline_schedule import PipelineSchedule

_KIND = 0  # the tag of the only kind of message


def forward_only(
    turn: Callable[[int, int, Tensor | None], Tensor],
    course: PipelineSchedule,
    axis: DeviceMesh,
    num_micro_batches: int,
    *,
    like: Tensor,
    device: torch.device,
) -> None:
    """Has each stage of this rank take a turn at each micro-batch, in the order of `Course.tick_of`.

    All ranks of the axis call it together. What stages give at a tick all travels at once, before the next one.

    Args:
        turn: from the stage, the micro-batch, and what the stage before gave of it (None for the first), what it gives.
        course: whose stages are where.
        axis: the mesh of one dim along which the stages lie.
        num_micro_batches: as many as there are, whatever the course says.
        like: of the shape and dtype of what goes from stage to stage.
        device: on which that is.
    Communication: what is like `like`, for each micro-batch from each stage to the next.
    """
    rank, last = axis.get_local_rank(), len(course.layers) - 1
    turns = {
        course.tick_of(stage, index): (stage, index)
        for stage in course.stages_of(rank)
        for index in range(num_micro_batches)
    }
    came: Tensor | None = None
    for tick in range(course.tick_of(last, num_micro_batches - 1) + 1):
        gave, came_before, came = None, came, None
        sends, receives = [], []
        if tick in turns:
            stage, index = turns[tick]
            gave = turn(stage, index, came_before)
            if stage < last:
                check_given(gave, like, stage)
            if stage < last and (target := course.rank_of(stage + 1)) != rank:
                sends = [Message(gave.contiguous(), target, _KIND)]
        if tick + 1 in turns and (before := turns[tick + 1][0] - 1) >= 0:
            if (source := course.rank_of(before)) == rank:
                came = gave
            else:
                came = torch.empty(like.shape, dtype=like.dtype, device=device)
                receives = [Message(came, source, _KIND)]
        left, landed = post(axis.get_group(), sends, receives)
        for flight in (*landed, *left):
            flight.wait()


def check_given(gave: Tensor, like: Tensor, stage: int) -> None:
    """Checks what a stage gives to the next one, which has made room for it by what the pipeline was told.

    Raises:
        ArgumentError: when it is of another shape or dtype.
    """
    if (gave.shape, gave.dtype) != (like.shape, like.dtype):
        raise ArgumentError(
            f"stage {stage} gave {tuple(gave.shape)} in {gave.dtype}, but the next one was told {tuple(like.shape)} in "
            f"{like.dtype}: dim, dtype and row_shards must be those of the model"
        )
