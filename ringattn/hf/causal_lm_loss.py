"""The cross-entropy of this rank's tokens, normalised by the number of labels on all ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ringattn.attention.sharding import IGNORED_LABEL


def num_valid(labels: Tensor) -> Tensor:
    """Returns the number of labels that are not -100; at least 1, so that a batch without labels has a loss of 0."""
    return (labels != IGNORED_LABEL).sum().clamp(min=1)


def causal_lm_loss(logits: Tensor, labels: Tensor, num_items: Tensor) -> Tensor:
    """Returns this rank's part of the mean cross-entropy: the sum over its labels, divided by `num_items`.

    Args:
        logits: (B, S_local, vocabulary); the loss is computed in fp32, of float64 logits in float64.
        labels: (B, S_local), already shifted; -100 is ignored.
        num_items: number of valid labels on all ranks.
    Communication: none.
    """
    flat = logits.flatten(0, -2)
    exact = flat if flat.dtype is torch.float64 else flat.float()
    return F.cross_entropy(exact, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum") / num_items
