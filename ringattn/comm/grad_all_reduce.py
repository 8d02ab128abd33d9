"""What all ranks of a group have alike, and use for different rows: gradients are summed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_gradients(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns x; its gradient is the sum of what the ranks of the group find.

    Args:
        x: the same on all ranks of the group, which go backward together.
        group: the ranks.
    Communication: in the backward, an all-reduce of x's size.
    """
    shared: Tensor = _SumGradients.apply(x, group)  # type: ignore[no-untyped-call]
    return shared


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
