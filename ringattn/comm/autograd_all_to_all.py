"""Rows of one tensor, some for each rank of a group: an all-to-all through which gradients go back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_to_all_rows(x: Tensor, leaving: Sequence[int], coming: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Returns what each rank had for this one, in order of rank; differentiable.

    Args:
        x: (sum(leaving), ...): the rows for rank 0, then those for rank 1, and so on.
        leaving: how many rows go to each rank; 0 is allowed.
        coming: how many come from each rank.
        group: all its ranks call this together, and all of them go backward, be it with no row.
    Returns:
        (sum(coming), ...) in x.dtype.
    Communication: one all-to-all, each row once; and one in the backward, of the gradients.
    """
    traded: Tensor = _AllToAllRows.apply(x, list(leaving), list(coming), group)  # type: ignore[no-untyped-call]
    return traded


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, leaving: list[int], coming: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.leaving, ctx.coming, ctx.group = leaving, coming, group
        return _all_to_all(x, leaving, coming, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.coming, ctx.leaving, ctx.group), None, None, None


def _all_to_all(x: Tensor, leaving: list[int], coming: list[int], group: dist.ProcessGroup) -> Tensor:
    came = x.new_empty(sum(coming), *x.shape[1:])
    dist.all_to_all_single(came, x.contiguous(), coming, leaving, group=group)
    return came
