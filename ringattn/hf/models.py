"""The parts of a model that work on the sequence, and why a model cannot be patched."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ringattn.errors import ArgumentError, ArgumentTypeError
from ringattn.hf.patterns import BIDIRECTIONAL, CAUSAL, Pattern

_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class Facts:
    """What sharding a batch must know of a model.

    Args:
        predicts_next: its labels are those of the next token.
        counts_items: its loss is a sum divided by `num_items_in_batch`, if that is given.
        pattern: what most of its layers ask for.
    """

    predicts_next: bool
    counts_items: bool
    pattern: Pattern


def facts_of(model: PreTrainedModel) -> Facts:
    """Returns what sharding must know of a model."""
    causal = any(getattr(module, "is_causal", False) is True for module in model.modules())
    predicts_next = model.loss_type in ("ForCausalLM", "ForConditionalGeneration", None)
    source = inspect.getsource(type(model).forward)
    counts = re.search(r"self\.loss_function\([^\n]*(\n[^\n]*){0,8}?\*\*kwargs", source) is not None
    return Facts(predicts_next and not model.config.is_encoder_decoder, counts, CAUSAL if causal else BIDIRECTIONAL)


def pretrained(model: nn.Module) -> PreTrainedModel:
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
    for module in text_modules(model):
        if not isinstance(module, PreTrainedModel):
            continue
        kind = type(module).__name__
        if module._is_stateful:
            raise ArgumentError(f"{name}: {kind} carries a state along the sequence, which is not attention alone")
        if not module._can_set_attn_implementation():
            raise ArgumentError(f"{name}: {kind} computes attention by itself; it takes no attention implementation")
        unknown = sorted(set(getattr(module.config, "layer_types", None) or ()) - _LAYERS)
        if unknown:
            raise ArgumentError(f"{name}: layers of the kinds {unknown} mix tokens by other means than attention")


def own_configs(model: nn.Module) -> None:
    """Gives a model configs of its own: another model may have been made from the same ones."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = copy.deepcopy(module.config, memo)
