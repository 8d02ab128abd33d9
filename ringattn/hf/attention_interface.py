"""The attention and mask functions that transformers calls, registered as the implementation "ringattn"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ringattn.errors import ArgumentError
from ringattn.hf.attention_call import ForwardContext, LayerCall, MaskSpec
from ringattn.hf.layer_options import read_options
from ringattn.hf.mask_patterns import CAUSAL, read_pattern

IMPLEMENTATION = "ringattn"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    dropout: float = 0.0,
    scaling: float | None = None,
    ringattn: ForwardContext | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Returns the attention output (B, rows, heads, v_dim) and None, as transformers' attention functions do.

    Args:
        module: the attention module of the layer.
        query, key, value: (B, heads, rows, head_dim).
        attention_mask: what `mask` returned, or None.
        dropout: must be 0.
        scaling: softmax scale; None is head_dim ** -0.5.
        ringattn: the context of the forward pass.
        options: the other arguments that the model passes; `read_options` checks them.
    Raises:
        ArgumentError: when there is no context, or an option is not supported.
    """
    pattern, padding, score = read_options(module, attention_mask, dropout, scaling, options)
    if ringattn is None:
        raise ArgumentError(
            f"{type(module).__name__} was called without a sharded batch or a RingCache: call the model with what "
            "handle.shard(batch) returns, where handle = ringattn.hf.patch(model, group); to generate, pass "
            "past_key_values=ringattn.hf.RingCache(handle, num_pages=...)"
        )
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return ringattn.attend(LayerCall(module, q, k, v, pattern, padding, score)), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> MaskSpec:
    """Returns the mask pattern and the padding of a layer, in place of a mask tensor.

    The arguments are the same as for transformers' mask functions; sizes, offsets and `options` are ignored.
    """
    padding = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.to(torch.bool)
    return MaskSpec(CAUSAL if mask_function is None else read_pattern(mask_function), padding)


def register() -> None:
    """Registers the attention implementation "ringattn" with transformers."""
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, mask)
