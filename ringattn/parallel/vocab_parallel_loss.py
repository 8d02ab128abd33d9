"""The loss: a sum over the valid tokens of all ranks, divided by how many there are.

Each rank has its share of that sum, divided by the global number. So the loss is the sum of the shares, and its
gradient the sum of the ranks' gradients: it does not matter how tokens are spread, or whether a rank has a valid one.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from ringattn.attention.sharding import IGNORED_LABEL
from ringattn.parallel.mesh import axis_mesh, loss_mesh


def count_valid(labels: Tensor, mesh: DeviceMesh) -> Tensor:
    """The number of valid labels on all ranks that see other tokens, () int64.

    Those ranks call it together, once for all micro-batches of a step.

    Args:
        labels: this rank's, of any shape; IGNORED_LABEL (-100) is not valid.
        mesh: from `build_mesh`.
    Communication: an all-reduce of one number.
    """
    return sum_over_token_ranks((labels != IGNORED_LABEL).sum(), mesh)


def sum_over_token_ranks(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of what the ranks that see other tokens have: of their losses, say. Not differentiable.

    Communication: an all-reduce of x.
    """
    total = x.detach().clone()
    along = loss_mesh(mesh)
    if along is not None:
        dist.all_reduce(total, group=along.get_group())
    return total


def cross_entropy(logits: Tensor, labels: Tensor, num_valid: Tensor, mesh: DeviceMesh) -> Tensor:
    """Returns this rank's share of the loss: the sum over its valid tokens, divided by the number of those on all.

    Ranks along "tp" have the same rows, each with its columns of the vocabulary, and call it together; all get the loss
    of those rows.

    Args:
        logits: (B, S, vocab_size / tp).
        labels: (B, S) int64 below vocab_size, or IGNORED_LABEL.
        num_valid: from `count_valid`; 0 makes the loss 0.
        mesh: from `build_mesh`.
    Returns:
        () in fp32, float64 for float64 logits.
    Communication: over "tp", three numbers a row.
    """
    rows = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    flat = labels.flatten()
    along = axis_mesh(mesh, "tp")
    if along is None:
        losses = F.cross_entropy(rows, flat, reduction="sum", ignore_index=IGNORED_LABEL)
    else:
        losses = cast(Tensor, _VocabParallelCrossEntropy.apply(rows, flat, along)).sum()  # type: ignore[no-untyped-call]
    return losses / num_valid.clamp(min=1)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """The loss of each row, (rows,), of logits whose columns lie on several ranks. Rows with no label lose 0."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, along: DeviceMesh) -> Tensor:
        group, width = along.get_group(), logits.shape[1]
        column = labels - along.get_local_rank() * width
        here = (column >= 0) & (column < width)
        column = column.clamp(0, width - 1)[:, None]
        largest = logits.amax(1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        weights = (logits - largest[:, None]).exp_()
        hit = torch.where(here, logits.gather(1, column)[:, 0] - largest, 0.0)
        sums = torch.stack([weights.sum(1), hit])
        dist.all_reduce(sums, group=group)
        total, target = sums
        valid = labels != IGNORED_LABEL
        ctx.save_for_backward(weights.div_(total[:, None]), column, here, valid)
        losses = torch.where(valid, total.log() - target, 0.0)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weights, column, here, valid = ctx.saved_tensors
        ones = here[:, None].to(weights.dtype)
        return weights.scatter_add(1, column, -ones) * (grad * valid)[:, None], None, None
