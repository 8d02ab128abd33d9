"""The parts of a model that work on the sequence, and why a model cannot be patched."""

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
from ringattn.hf.implicit_positions import check_positions, positions_of
from ringattn.hf.mask_patterns import BIDIRECTIONAL, CAUSAL, MaskPattern

_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_NEXT_TOKEN = ("ForCausalLM", "ForConditionalGeneration", None)
# Heads that look at one row, or at all of them, to make one result: a rank has but its own.
_POOLING = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction", "ForQuestionAnswering")


@dataclass(frozen=True)
class ModelFacts:
    """What sharding a batch must know of a model.

    Args:
        predicts_next: its labels are those of the next token.
        counts_items: its loss is a sum divided by `num_items_in_batch`, if that is given.
        pattern: what most of its layers ask for.
        positions: the position_ids of tokens for which none are given.
        decoder_ids: makes the decoder's tokens of labels; None if it is no encoder-decoder.
        merges: it merges more than text into its sequence, and so must see all of it.
    """

    predicts_next: bool
    counts_items: bool
    pattern: MaskPattern
    positions: Callable[[Tensor], Tensor]
    decoder_ids: Callable[[Tensor], Tensor] | None
    merges: bool = False


def model_facts(model: PreTrainedModel, *, merges: bool = False) -> ModelFacts:
    """Returns what sharding must know of a model."""
    causal = any(getattr(module, "is_causal", False) is True for module in model.modules())
    source = inspect.getsource(type(model).forward)
    counts = re.search(r"self\.loss_function\([^\n]*(\n[^\n]*){0,8}?\*\*kwargs", source) is not None
    decoder_ids = None
    if model.config.is_encoder_decoder:
        decoder_ids = getattr(model, "prepare_decoder_input_ids_from_labels", _no_decoder_ids)
    return ModelFacts(
        predicts_next=decoder_ids is None and model.loss_type in _NEXT_TOKEN,
        counts_items=counts,
        pattern=CAUSAL if causal else BIDIRECTIONAL,
        positions=positions_of(model),
        decoder_ids=decoder_ids,
        merges=merges,
    )


def _no_decoder_ids(labels: Tensor) -> Tensor:
    raise ArgumentError("batch has labels but no decoder_input_ids, and the model does not make them: give both")


def unwrap_model(model: nn.Module) -> PreTrainedModel:
    """Returns the transformers model in what may be wrapped by peft or DDP.

    Raises:
        ArgumentTypeError: when there is none.
    """
    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                return module
    raise ArgumentTypeError(
        f"model={type(model).__name__}: must be a transformers PreTrainedModel, or have one inside (peft, DDP)"
    )


def text_modules(model: nn.Module) -> Iterator[nn.Module]:
    """All modules, but for towers that read images or sound: those keep the attention that they have."""
    if isinstance(model, PreTrainedModel) and "text" not in model.input_modalities:
        return
    yield model
    for child in model.children():
        yield from text_modules(child)


def check_model(model: PreTrainedModel) -> None:
    """Checks that all that mixes tokens in a model is attention which can be replaced.

    Raises:
        ArgumentError: when it is not.
    """
    name = type(model).__name__
    if name.endswith(_POOLING):
        raise ArgumentError(
            f"{name} makes one result of a whole sequence, and each rank has a part of it: patch its "
            f"{model.base_model_prefix!r}, and apply the head to what handle.unshard returns"
        )
    for module in text_modules(model):
        kind = type(module).__name__
        if kind.endswith("Pooler"):
            raise ArgumentError(
                f"{name}: {kind} takes the first row of a sequence; make it with add_pooling_layer=False"
            )
        if isinstance(module, PreTrainedModel):
            _check_part(name, module)
    check_positions(model)


def _check_part(name: str, part: PreTrainedModel) -> None:
    kind, config = type(part).__name__, part.config
    if part._is_stateful:
        raise ArgumentError(
            f"{name}: {kind} carries a state along the sequence, which is not attention; run it unpatched"
        )
    if not part._can_set_attn_implementation():
        raise ArgumentError(f"{name}: {kind} has its own way of attention, which cannot be replaced; run it unpatched")
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYERS)
    if unknown:
        raise ArgumentError(
            f"{name}: its layers of the kinds {unknown} mix tokens by other means than attention over all of them; "
            "run it unpatched"
        )


def copy_configs(model: nn.Module) -> None:
    """Gives a model configs of its own: another model may have been made from the same ones."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = copy.deepcopy(module.config, memo)
