"""Models that merge images, or sound, into their text: all of it happens as ever, and then the sequence is cut.

Such a model embeds the tokens, puts features where its placeholders are, counts positions by what it sees, and hands
that to its text model. It does so with the whole sequence on every rank; the text model is given this rank's rows.
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
from ringattn.hf.batch_sharding import BATCH, BatchSharder, dim_of_rows
from ringattn.hf.sequence_batch import ShardingContext

# Of this rank's rows already: the model's head looks at them.
_CUT_BEFORE = {"labels", "shift_labels", "num_items_in_batch", BATCH}
# Features that layers of Qwen3-VL add to the rows where this mask is True, one after the other.
_SEEN, _ADDED = "visual_pos_masks", "deepstack_visual_embeds"


def text_model(model: PreTrainedModel) -> PreTrainedModel | None:
    """Returns the part that works on the merged sequence; None for a model that merges nothing into its text.

    Raises:
        ArgumentError: when a model merges, and has no such part.
    """
    if model.config.is_encoder_decoder or not _merges(model):
        return None
    found = list(_text_models(model))
    if len(found) != 1:
        raise ArgumentError(
            f"{type(model).__name__} reads {', '.join(model.input_modalities)}, and must have one text model inside, "
            f"which is given the merged sequence; found {[type(part).__name__ for part in found]}. Run it unpatched"
        )
    return found[0]


def _merges(model: PreTrainedModel) -> bool:
    """Older versions say of some text models that they read images, as the family they are of does."""
    config, parameters = model.config, inspect.signature(type(model).forward).parameters
    return _reads_more(model) and (config.get_text_config() is not config or "pixel_values" in parameters)


def _reads_more(model: PreTrainedModel) -> bool:
    modalities = model.input_modalities
    return not isinstance(modalities, str) and set(modalities) > {"text"}


def _text_models(module: nn.Module) -> Iterator[PreTrainedModel]:
    """The outermost models inside that read text alone."""
    for child in module.children():
        if not isinstance(child, PreTrainedModel) or _reads_more(child):
            yield from _text_models(child)
        elif "text" in child.input_modalities:
            yield child


def own_rows(
    text: PreTrainedModel,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    sharding: BatchSharder,
    told: ShardingContext,
) -> dict[str, Any]:
    """Returns what a text model is given on this rank, of what it would be given of the whole sequence.

    Args:
        text: the text model.
        args, kwargs: of its forward.
        sharding: the rank's.
        told: the batch.
    Raises:
        ArgumentError: when the model has made a sequence of another length, or gives its text model something that
            cannot be cut.
    """
    given = {**dict(zip(inspect.signature(type(text).forward).parameters, (text, *args), strict=False)), **kwargs}
    given.pop("self", None)
    tokens = given.get("inputs_embeds")
    if tokens is None:
        raise ArgumentError(
            f"{type(text).__name__} is given no inputs_embeds: the model merges nothing into its text, and what it "
            "does with both would be done with one rank's rows; run it unpatched"
        )
    if tokens.shape[1] != told.num_tokens:
        raise ArgumentError(
            f"{type(text).__name__} is given {tokens.shape[1]} rows for a sequence of {told.num_tokens}: put as many "
            "placeholders into input_ids as there are features, as the model's processor does"
        )
    if given.get("position_ids") is None:
        given["position_ids"] = sharding.facts.positions(tokens)
    own = {name: given[name] for name in _CUT_BEFORE & given.keys()}
    own["attention_mask"] = _without_padding(given.pop("attention_mask", None))
    if given.get(_ADDED) is not None:
        own[_ADDED] = _added(given.pop(_ADDED), given[_SEEN], sharding, told)
    given.pop("cache_position", None)  # of older versions; follows from the rows
    for name in given.keys() - own.keys():
        value = given[name]
        if isinstance(value, Tensor) and dim_of_rows(name, value, tokens.shape) is not None:
            own[name] = sharding.cut(name, value, tokens.shape, told.rows.layout)
        elif any(isinstance(leaf, Tensor) and leaf.ndim for leaf in tree_leaves(value)):
            _refuse(text, name, value)
        else:
            own[name] = value
    own[BATCH] = replace(told, merges=False, last=given["position_ids"].max())
    return own


def _without_padding(mask: Any) -> Any:
    """What is asked for in the place of masks, which may stand in a dict by the kind of layer; the batch knows of
    padding.
    """
    if isinstance(mask, Mapping):
        return {kind: _without_padding(asked) for kind, asked in mask.items()}
    if isinstance(mask, MaskSpec):
        return replace(mask, padding=None)
    return None if isinstance(mask, Tensor) and mask.ndim == 2 else mask


def _added(features: Any, seen: Tensor, sharding: BatchSharder, told: ShardingContext) -> list[Tensor]:
    """Of features for the rows where `seen` is True, (num_seen, dim) each, those for this rank's rows."""
    order = torch.cumsum(seen.flatten(), 0).view_as(seen) * seen
    mine = sharding.cut(_SEEN, order, seen.shape, told.rows.layout)
    return [layer[mine[mine > 0] - 1] for layer in features]


def _refuse(text: PreTrainedModel, name: str, value: Any) -> NoReturn:
    what = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__} of tensors"
    raise ArgumentError(
        f"{type(text).__name__} is given {name}, {what}, beside the merged sequence: it is not known which of it "
        "belongs to this rank's rows; run this model, or this batch, unpatched"
    )
