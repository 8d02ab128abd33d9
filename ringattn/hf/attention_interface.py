"""The attention and mask functions that transformers calls: what a layer asks for, as one Call, given to the batch."""

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

NAME = "ringattn"


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
    """Returns the attention output (B, rows, heads, v_dim), as transformers' attention functions do.

    Args:
        module: the attention module that calls.
        query, key, value: (B, heads, rows, head_dim).
        attention_mask: what `mask` has returned, or None.
        dropout: must be 0.
        scaling: softmax scale.
        ringattn: the batch that comes with the model's other arguments.
        options: what else the model passes; see `requests`.
    Raises:
        ArgumentError: when the model asks for something that cannot be done.
    """
    found = read_options(module, query, attention_mask, dropout, options)
    if ringattn is None:
        raise ArgumentError(
            f"{type(module).__name__} was called without a batch: pass the model what handle.shard(batch) returns, "
            "where handle = ringattn.hf.patch(model, group); or, to generate, past_key_values=ringattn.hf.RingCache("
            "handle, num_pages=...)"
        )
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    call = LayerCall(module, q, k, v, found.pattern, found.padding, scaling, found.softcap, found.sink)
    return ringattn.attend(call), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **hints: Any,
) -> MaskSpec:
    """Returns what a layer asks for, as transformers' mask functions return a mask.

    Args are transformers'; `hints` say how other implementations may save work.
    """
    padding = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.to(torch.bool)
    return MaskSpec(CAUSAL if mask_function is None else read_pattern(mask_function), padding)


def register() -> None:
    """Makes "ringattn" an attention implementation of transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
