"""What sharding depends on in a model, and the checks whether a model can be patched."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ringattn.errors import ArgumentError, ArgumentTypeError
from ringattn.hf.implicit_positions import check_positions, default_position_ids
from ringattn.hf.mask_patterns import BIDIRECTIONAL, CAUSAL, MaskPattern

_SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
_NEXT_TOKEN_LOSSES = ("ForCausalLM", "ForConditionalGeneration", None)
# Heads that reduce a whole sequence to one result.
_POOLING_HEADS = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction", "ForQuestionAnswering")


@dataclass(frozen=True)
class ModelFacts:
    """The properties of a model that sharding a batch depends on.

    Args:
        shifts_labels: whether labels are the input ids, and the loss shifts them by one.
        takes_num_items: whether its loss is a sum divided by `num_items_in_batch`, if that is given.
        mask_pattern: the pattern of most of its layers; the "balanced" layout is made for it.
        default_position_ids: makes the position_ids of ids or embeddings for which none are given.
        make_decoder_ids: makes decoder_input_ids of labels; None if the model is no encoder-decoder.
        is_multimodal: whether it merges images or sound into its text, and so needs the whole sequence.
    """

    shifts_labels: bool
    takes_num_items: bool
    mask_pattern: MaskPattern
    default_position_ids: Callable[[Tensor], Tensor]
    make_decoder_ids: Callable[[Tensor], Tensor] | None
    is_multimodal: bool = False


def model_facts(model: PreTrainedModel, *, is_multimodal: bool = False) -> ModelFacts:
    """Returns the facts of a model, read from its config, its modules and the source of its forward."""
    causal = any(getattr(module, "is_causal", False) is True for module in model.modules())
    source = inspect.getsource(type(model).forward)
    takes_num_items = re.search(r"self\.loss_function\([^\n]*(\n[^\n]*){0,8}?\*\*kwargs", source) is not None
    make_decoder_ids = None
    if model.config.is_encoder_decoder:
        make_decoder_ids = getattr(model, "prepare_decoder_input_ids_from_labels", _require_decoder_ids)
    return ModelFacts(
        shifts_labels=make_decoder_ids is None and model.loss_type in _NEXT_TOKEN_LOSSES,
        takes_num_items=takes_num_items,
        mask_pattern=CAUSAL if causal else BIDIRECTIONAL,
        default_position_ids=default_position_ids(model),
        make_decoder_ids=make_decoder_ids,
        is_multimodal=is_multimodal,
    )


def _require_decoder_ids(labels: Tensor) -> Tensor:
    raise ArgumentError(
        "batch has labels but no decoder_input_ids: this model does not make them of labels, so add decoder_input_ids"
    )


def unwrap_model(model: nn.Module) -> PreTrainedModel:
    """Returns the transformers model inside a peft or DDP wrapper, or the model itself.

    Raises:
        ArgumentTypeError: when there is none.
    """
    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                return module
    raise ArgumentTypeError(
        f"model={type(model).__name__}: must be a transformers PreTrainedModel, or a wrapper of one (peft, DDP)"
    )


def text_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yields all modules except vision and audio towers, which keep their attention."""
    if isinstance(model, PreTrainedModel) and "text" not in model.input_modalities:
        return
    yield model
    for child in model.children():
        yield from text_modules(child)


def check_model(model: PreTrainedModel) -> None:
    """Checks that a model mixes tokens only by attention that can be replaced.

    Raises:
        ArgumentError: when it does not.
    """
    name = type(model).__name__
    if name.endswith(_POOLING_HEADS):
        raise ArgumentError(
            f"model={name}: its head pools a whole sequence, but each rank has a part of it; patch its "
            f"{model.base_model_prefix!r}, and apply the head to what handle.unshard returns"
        )
    for module in text_modules(model):
        module_name = type(module).__name__
        if module_name.endswith("Pooler"):
            raise ArgumentError(
                f"model={name}: {module_name} takes the first row of a sequence, which one rank has; make the model "
                "with add_pooling_layer=False"
            )
        if isinstance(module, PreTrainedModel):
            _check_submodel(name, module)
    check_positions(model)


def _check_submodel(name: str, submodel: PreTrainedModel) -> None:
    submodel_name, config = type(submodel).__name__, submodel.config
    if submodel._is_stateful:
        raise ArgumentError(
            f"model={name}: {submodel_name} carries a recurrent state along the sequence; run it unpatched"
        )
    if not submodel._can_set_attn_implementation():
        raise ArgumentError(
            f"model={name}: {submodel_name} does not take an attention implementation; run it unpatched"
        )
    unsupported = sorted(set(getattr(config, "layer_types", None) or ()) - _SUPPORTED_LAYER_TYPES)
    if unsupported:
        raise ArgumentError(
            f"model={name}: has layers of types {unsupported}; supported are {sorted(_SUPPORTED_LAYER_TYPES)}; run it "
            "unpatched"
        )


def num_decoder_layers(model: PreTrainedModel) -> int:
    """Returns the number of layers with a KV cache.

    Raises:
        ArgumentError: when the model has an encoder, or its config lacks num_hidden_layers.
    """
    config, name = model.config, type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ArgumentError(f"model={name}: has an encoder, but a RingCache supports decoder-only models")
    num_layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if not isinstance(num_layers, int) or num_layers < 1:
        raise ArgumentError(f"model={name}: num_hidden_layers={num_layers!r} in its config: must be 1 or more")
    return num_layers


def copy_configs(model: nn.Module) -> None:
    """Replaces the configs of a model by copies, since other models may share them."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = copy.deepcopy(module.config, memo)
