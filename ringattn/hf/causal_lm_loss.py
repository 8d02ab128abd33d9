"""The loss over the valid tokens of the whole batch, of which each rank has some, or none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ringattn.attention.sharding import IGNORED_LABEL


def num_valid(labels: Tensor) -> Tensor:
    """Returns how many labels count, at least 1, so that a batch without any has a loss of 0."""
    return (labels != IGNORED_LABEL).sum().clamp(min=1)


def causal_lm_loss(logits: Tensor, labels: Tensor, num_items: Tensor) -> Tensor:
    """Returns this rank's share of the mean cross-entropy: its sum, divided by the labels that count on all ranks.

    Args:
        logits: (B, S_local, vocabulary); computed with in fp32, float64 stays.
        labels: (B, S_local), -100 for none; already shifted, where the model predicts the next token.
        num_items: of all ranks.
    """
    flat = logits.flatten(0, -2)
    exact = flat if flat.dtype is torch.float64 else flat.float()
    return F.cross_entropy(exact, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum") / num_items
