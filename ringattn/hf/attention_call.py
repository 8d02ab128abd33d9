"""What passes between a model's attention layers and the batch, or the cache, that a forward pass is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ringattn.hf.mask_patterns import MaskPattern


@dataclass(frozen=True, eq=False)
class MaskSpec:
    """What stands in the place of a mask between transformers' mask function and its attention function.

    Args:
        pattern: what the layer asks for.
        padding: (B, keys) bool, False for padding, as the model was given it; None if there is none.
    """

    pattern: MaskPattern
    padding: Tensor | None


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One attention call of a layer.

    Args:
        module: the layer's attention module.
        q, k, v: (B, rows, heads, head_dim), as in `ring_attention`; of this rank's rows.
        pattern: which keys a query may see.
        padding: the padding that the model was given with this call; None if there is none.
        scale: softmax scale; None is head_dim ** -0.5.
        softcap: None, or what scores are capped at.
        sink: None, or (heads,) logits.
    """

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    pattern: MaskPattern
    padding: Tensor | None
    scale: float | None
    softcap: float | None
    sink: Tensor | None


class ForwardContext(Protocol):
    """What a forward pass is about, which tells how its attention is computed: a batch for training, or a cache."""

    def attend(self, call: LayerCall) -> Tensor:
        """Returns (B, rows, heads, v_dim), on all ranks together."""
        ...
