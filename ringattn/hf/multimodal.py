"""Models that merge images or sound into their text: the whole sequence is merged on every rank, then sharded.

Such a model embeds the tokens, replaces placeholders by the features of its towers, computes positions, and calls its
text model. Every rank does this for the whole sequence; the input of the text model is then sharded.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ringattn.errors import ArgumentError
from ringattn.hf.attention_call import MaskSpec
from ringattn.hf.batch_sharding import CONTEXT_KEY, BatchSharder, sequence_dim
from ringattn.hf.sequence_batch import ShardingContext

# Arguments that BatchSharder.shard has sharded already: the head of the whole model needs them.
_ALREADY_SHARDED = {"labels", "shift_labels", "num_items_in_batch", CONTEXT_KEY}
# Qwen3-VL adds features to the hidden states of its first layers, at the rows where the mask is True.
_VISUAL_MASK, _DEEPSTACK_FEATURES = "visual_pos_masks", "deepstack_visual_embeds"


def find_text_model(model: PreTrainedModel) -> PreTrainedModel | None:
    """Returns the part of a model that runs on the merged sequence; None if the model merges nothing into its text.

    Raises:
        ArgumentError: when the model merges, but has no such part, or several.
    """
    if model.config.is_encoder_decoder or not _is_multimodal(model):
        return None
    candidates = list(_text_models(model))
    if len(candidates) != 1:
        raise ArgumentError(
            f"model={type(model).__name__}: reads {', '.join(model.input_modalities)}, and must have one text model "
            f"inside, which gets the merged sequence; found {[type(part).__name__ for part in candidates]}. Run it "
            "unpatched"
        )
    return candidates[0]


def _is_multimodal(model: PreTrainedModel) -> bool:
    """Returns whether a model merges other inputs into its text.

    Its modalities are not enough: older versions of transformers list images for some text models, too.
    """
    config, parameters = model.config, inspect.signature(type(model).forward).parameters
    return _lists_modalities_besides_text(model) and (
        config.get_text_config() is not config or "pixel_values" in parameters
    )


def _lists_modalities_besides_text(model: PreTrainedModel) -> bool:
    modalities = model.input_modalities
    return not isinstance(modalities, str) and set(modalities) > {"text"}


def _text_models(module: nn.Module) -> Iterator[PreTrainedModel]:
    """Yields the outermost models inside a module that read text only."""
    for child in module.children():
        if not isinstance(child, PreTrainedModel) or _lists_modalities_besides_text(child):
            yield from _text_models(child)
        elif "text" in child.input_modalities:
            yield child


def shard_text_inputs(
    text_model: PreTrainedModel,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    sharder: BatchSharder,
    context: ShardingContext,
) -> dict[str, Any]:
    """Returns this rank's part of the arguments of a text model.

    Args:
        text_model: the text model.
        args, kwargs: the arguments of its forward, for the whole sequence.
        sharder: the sharder of the patched model.
        context: of the batch.
    Returns:
        Keyword arguments of the text model.
    Raises:
        ArgumentError: when the merged sequence has another length than the input ids, or an argument holds tensors
            whose sequence dim is unknown.
    """
    parameters = inspect.signature(type(text_model).forward).parameters
    inputs = {**dict(zip(parameters, (text_model, *args), strict=False)), **kwargs}
    inputs.pop("self", None)
    embeddings = inputs.get("inputs_embeds")
    if embeddings is None:
        raise ArgumentError(
            f"inputs_embeds=None: {type(text_model).__name__} gets none, so its model does not merge images into the "
            "text, but combines both later; this is not supported: run it unpatched"
        )
    if embeddings.shape[1] != context.num_tokens:
        raise ArgumentError(
            f"inputs_embeds: {type(text_model).__name__} gets {embeddings.shape[1]} rows for a sequence of "
            f"{context.num_tokens}; input_ids must have as many placeholders as there are features, as the model's "
            "processor makes them"
        )
    if inputs.get("position_ids") is None:
        inputs["position_ids"] = sharder.facts.default_position_ids(embeddings)
    local = {name: inputs[name] for name in _ALREADY_SHARDED & inputs.keys()}
    local["attention_mask"] = _drop_padding(inputs.pop("attention_mask", None))
    if inputs.get(_DEEPSTACK_FEATURES) is not None:
        features = inputs.pop(_DEEPSTACK_FEATURES)
        local[_DEEPSTACK_FEATURES] = _shard_features(features, inputs[_VISUAL_MASK], sharder, context)
    inputs.pop("cache_position", None)  # of older versions; the text model derives it
    for name in inputs.keys() - local.keys():
        value = inputs[name]
        if isinstance(value, Tensor) and sequence_dim(name, value, embeddings.shape) is not None:
            local[name] = sharder.shard_tensor(name, value, embeddings.shape, context.rows.layout)
        elif any(isinstance(leaf, Tensor) and leaf.ndim for leaf in tree_leaves(value)):
            _raise_unknown_rows(text_model, name, value)
        else:
            local[name] = value
    max_position = inputs["position_ids"].max()
    local[CONTEXT_KEY] = replace(context, shards_in_text_model=False, max_position=max_position)
    return local


def _drop_padding(mask: Any) -> Any:
    """Returns an attention mask, or a dict of masks by layer type, without padding: the context has it."""
    if isinstance(mask, Mapping):
        return {layer_type: _drop_padding(value) for layer_type, value in mask.items()}
    if isinstance(mask, MaskSpec):
        return replace(mask, padding=None)
    return None if isinstance(mask, Tensor) and mask.ndim == 2 else mask


def _shard_features(
    features: Any, visual_mask: Tensor, sharder: BatchSharder, context: ShardingContext
) -> list[Tensor]:
    """Returns the features of this rank's rows.

    Args:
        features: one tensor (num_visual, dim) per layer, for the rows where `visual_mask` is True.
        visual_mask: (B, S).
        sharder, context: as in `shard_text_inputs`.
    """
    index = torch.cumsum(visual_mask.flatten(), 0).view_as(visual_mask) * visual_mask  # from 1; 0 where there is none
    local_index = sharder.shard_tensor(_VISUAL_MASK, index, visual_mask.shape, context.rows.layout)
    return [layer[local_index[local_index > 0] - 1] for layer in features]


def _raise_unknown_rows(text_model: PreTrainedModel, name: str, value: Any) -> NoReturn:
    what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__} of tensors"
    raise ArgumentError(
        f"{name}: {type(text_model).__name__} gets {what} beside the merged sequence, and which of its rows belong to "
        "this rank is unknown; run this model, or this batch, unpatched"
    )
