"""One attention call of a layer, and the context that computes it: a training batch or a KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ringattn.hf.mask_patterns import MaskPattern
from ringattn.score import Score


@dataclass(frozen=True, eq=False)
class MaskSpec:
    """What our mask function returns in place of a mask tensor; our attention function receives it.

    Args:
        pattern: the mask pattern of the layer.
        padding: (B, keys) bool, False for padding, from the attention_mask of the model; None if there is none.
    """

    pattern: MaskPattern
    padding: Tensor | None


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One attention call of a layer, with this rank's rows.

    Args:
        module: the attention module of the layer.
        q, k, v: (B, rows, heads, head_dim), as in `ring_attention`; k and v may have fewer heads, v another head_dim.
        pattern: which keys a query may see, by their distance.
        padding: the padding mask that the model got with this call; None if there is none.
        score: scale, softcap and sink of the layer.
    """

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    pattern: MaskPattern
    padding: Tensor | None
    score: Score


class ForwardContext(Protocol):
    """Computes the attention of a forward pass: a ShardingContext for a batch, a RingCache for generation."""

    def attend(self, call: LayerCall) -> Tensor:
        """Returns the attention output (B, rows, heads, v_dim) of this rank's rows; all ranks call it together."""
        ...
