"""Cross-entropy over a vocabulary sharded along "tp", normalised by the number of valid tokens on all ranks.

Each rank's loss is the sum over its own valid tokens, divided by the global number of valid tokens. The loss of a step
is the sum of the ranks' losses, and its gradient the sum of their gradients. The result does not depend on how tokens
are sharded, and a rank without a valid token contributes 0.

Source: the vocabulary-parallel form, Shoeybi et al. 2019, arXiv:1909.08053.
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
    """Returns the number of valid labels over all ranks with different tokens, () int64.

    Collective over `loss_mesh(mesh)`. Call it once per step, for the labels of all micro-batches.

    Args:
        labels: this rank's labels, of any shape; IGNORED_LABEL (-100) is not valid.
        mesh: from `build_mesh`.
    Communication: an all-reduce of one number.
    """
    return all_reduce_loss((labels != IGNORED_LABEL).sum(), mesh)


def all_reduce_loss(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Returns the sum of x over all ranks with different tokens, for example of their losses. Not differentiable.

    Args:
        x: a tensor of the same shape and dtype on all ranks.
        mesh: from `build_mesh`.
    Communication: an all-reduce of x over `loss_mesh(mesh)`.
    """
    total = x.detach().clone()
    ranks = loss_mesh(mesh)
    if ranks is not None:
        dist.all_reduce(total, group=ranks.get_group())
    return total


def cross_entropy(logits: Tensor, labels: Tensor, num_valid: Tensor, mesh: DeviceMesh) -> Tensor:
    """Returns this rank's share of the loss: the sum over its valid tokens, divided by `num_valid`.

    Ranks along "tp" hold the same rows and different vocabulary shards. They call it together, and all receive the loss
    of those rows.

    Args:
        logits: (B, S, vocab_size / tp).
        labels: (B, S) int64 in [0, vocab_size), or IGNORED_LABEL (-100).
        num_valid: from `count_valid`; with 0 the loss is 0.
        mesh: from `build_mesh`.
    Returns:
        () in fp32, or float64 for float64 logits.
    Communication: over "tp", three numbers per row.
    """
    rows = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    flat_labels = labels.flatten()
    tp_mesh = axis_mesh(mesh, "tp")
    if tp_mesh is None:
        loss_sum = F.cross_entropy(rows, flat_labels, reduction="sum", ignore_index=IGNORED_LABEL)
    else:
        losses = _VocabParallelCrossEntropy.apply(rows, flat_labels, tp_mesh)  # type: ignore[no-untyped-call]
        loss_sum = cast(Tensor, losses).sum()
    return loss_sum / num_valid.clamp(min=1)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """The loss of each row, (rows,), from vocabulary shards of logits. Rows with an ignored label have loss 0."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, tp_mesh: DeviceMesh) -> Tensor:
        group, shard_size = tp_mesh.get_group(), logits.shape[1]
        local_label = labels - tp_mesh.get_local_rank() * shard_size
        in_shard = (local_label >= 0) & (local_label < shard_size)
        local_label = local_label.clamp(0, shard_size - 1)[:, None]
        max_logit = logits.amax(1)
        dist.all_reduce(max_logit, dist.ReduceOp.MAX, group=group)
        exp_logits = (logits - max_logit[:, None]).exp_()
        target_logit = torch.where(in_shard, logits.gather(1, local_label)[:, 0] - max_logit, 0.0)
        sums = torch.stack([exp_logits.sum(1), target_logit])
        dist.all_reduce(sums, group=group)
        sum_exp, target_logit = sums
        valid = labels != IGNORED_LABEL
        softmax = exp_logits.div_(sum_exp[:, None])
        ctx.save_for_backward(softmax, local_label, in_shard, valid)
        return torch.where(valid, sum_exp.log() - target_logit, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        softmax, local_label, in_shard, valid = ctx.saved_tensors
        one_hot = in_shard[:, None].to(softmax.dtype)
        return softmax.scatter_add(1, local_label, -one_hot) * (grad * valid)[:, None], None, None
