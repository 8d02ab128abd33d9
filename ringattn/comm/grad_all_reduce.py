"""The identity in the forward, an all-reduce of the gradient in the backward: for values that all ranks share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_gradients(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns x; the gradient of x is the sum of the gradients of all ranks of the group.

    Args:
        x: the same on all ranks of the group, which run the backward together.
        group: the ranks.
    Communication: in the backward, one all-reduce of the size of x.
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
