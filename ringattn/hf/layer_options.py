"""What an attention layer asks for besides its tensors: taken as it is meant, or refused with what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from torch import Tensor, nn
from transformers import PreTrainedModel

from ringattn.errors import ArgumentError
from ringattn.hf.attention_call import MaskSpec
from ringattn.hf.mask_patterns import BIDIRECTIONAL, CAUSAL, MaskPattern, with_window

# What models pass down to their attention although it changes nothing there, or the batch has seen to it.
_HARMLESS = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "deterministic",
        "labels",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "shift_labels",
        "token_type_ids",
        "use_cache",
    }
)
# What must not be dropped, and what helps.
_REFUSED = {
    "output_attentions": "attention weights are never held as a whole; ask for them from the unpatched model",
    "head_mask": "multiply the rows of the output projection instead",
    "position_bias": "a bias that is added to the scores has no counterpart here; run this model unpatched",
}


# What a model takes for itself, and would answer from this rank's rows alone.
_REFUSED_OF_MODELS = {
    "output_attentions": _REFUSED["output_attentions"],
    "output_router_logits": "its loss of the load on the experts is no sum over tokens, and a rank has but its own",
    "head_mask": _REFUSED["head_mask"],
}


def check_arguments(module: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
    """Checks what a model is called with, and what its config adds to that.

    Raises:
        ArgumentError: when it cannot be done.
    """
    for name, remedy in _REFUSED_OF_MODELS.items():
        value = arguments.get(name)
        if value is None:
            value = getattr(module.config, name, None)
        if value is not None and value is not False:
            _refuse(module, name, remedy)


class LayerOptions(NamedTuple):
    """What a layer asks for."""

    pattern: MaskPattern
    padding: Tensor | None
    softcap: float | None
    sink: Tensor | None


def read_options(
    module: nn.Module, query: Tensor, attention_mask: object, dropout: float, options: Mapping[str, Any]
) -> LayerOptions:
    """Returns what a layer asks for.

    Raises:
        ArgumentError: when that cannot be done; the message names it, and says what to do instead.
    """
    if dropout:
        _refuse(module, f"attention dropout of {dropout}", "set the config's attention dropout to 0, or model.eval()")
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    sliding_window = given.pop("sliding_window", None)
    softcap, sink = given.pop("softcap", None), given.pop("s_aux", None)
    is_causal = options.get("is_causal")
    given.pop("is_causal", None)
    for name, value in given.items():
        if name in _REFUSED:
            _refuse(module, name, _REFUSED[name])
        if name not in _HARMLESS:
            _refuse(module, f"{name}={value!r:.80}", "it is not known what that means here; run it unpatched")
    padding = None
    if isinstance(attention_mask, MaskSpec):
        pattern, padding = attention_mask.pattern, attention_mask.padding
        if sliding_window is not None and pattern.left is None:
            _refuse(
                module,
                f"sliding_window={sliding_window} with a mask that has no window",
                "they contradict each other; run this model unpatched",
            )
    elif attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        pattern = CAUSAL if causal else BIDIRECTIONAL
        if sliding_window is not None:
            pattern = with_window(pattern, int(sliding_window))
    else:
        shape = tuple(getattr(attention_mask, "shape", ()))
        _refuse(
            module,
            f"a {type(attention_mask).__name__} of shape {shape} as its mask",
            "give padding as a 2-D attention_mask and packed documents as position_ids that restart, both to "
            "handle.shard(batch); a bias or a dense mask needs the unpatched model",
        )
    return LayerOptions(pattern, padding, None if softcap is None else float(softcap), sink)


def _refuse(module: nn.Module, what: str, remedy: str) -> NoReturn:
    raise ArgumentError(f"{type(module).__name__} asks for {what}, which cannot be done across ranks: {remedy}")
