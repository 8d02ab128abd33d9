"""A differentiable all-to-all of the rows of one tensor, with a different number of rows for each rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_to_all_rows(
    x: Tensor, input_splits: Sequence[int], output_splits: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Returns the rows that all ranks sent to this rank, in order of rank; differentiable.

    Args:
        x: (sum(input_splits), ...): the rows for rank 0, then the rows for rank 1, and so on.
        input_splits: how many rows this rank sends to each rank; may be 0.
        output_splits: how many rows this rank receives from each rank.
        group: the ranks; all call this together, and all run the backward, also with no rows.
    Returns:
        (sum(output_splits), ...) in x.dtype.
    Communication: one all-to-all in the forward, and one of the gradients in the backward; each row once.
    """
    received: Tensor = _AllToAllRows.apply(  # type: ignore[no-untyped-call]
        x, list(input_splits), list(output_splits), group
    )
    return received


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, input_splits: list[int], output_splits: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.input_splits, ctx.output_splits, ctx.group = input_splits, output_splits, group
        return _all_to_all(x, input_splits, output_splits, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.output_splits, ctx.input_splits, ctx.group), None, None, None


def _all_to_all(x: Tensor, input_splits: list[int], output_splits: list[int], group: dist.ProcessGroup) -> Tensor:
    received = x.new_empty(sum(output_splits), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), output_splits, input_splits, group=group)
    return received
