"""Reads the options of an attention layer; options that are not supported raise an error that says what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from torch import Tensor, nn
from transformers import PreTrainedModel

from ringattn.errors import ArgumentError
from ringattn.hf.attention_call import MaskSpec
from ringattn.hf.mask_patterns import BIDIRECTIONAL, CAUSAL, MaskPattern, with_window
from ringattn.score import Score

# Arguments that models pass on to their attention functions, and that do not change the attention.
_IGNORED_OPTIONS = frozenset(
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
# Options of layers that are not supported, and what to do instead.
_UNSUPPORTED_OPTIONS = {
    "output_attentions": "attention weights are never held as a whole; get them from the unpatched model",
    "head_mask": "multiply the rows of the output projection instead",
    "position_bias": "a bias added to the scores is not supported; run this model unpatched",
}
# Options of models, as arguments or in the config, that would be computed from this rank's rows alone.
_UNSUPPORTED_MODEL_OPTIONS = {
    "output_attentions": _UNSUPPORTED_OPTIONS["output_attentions"],
    "output_router_logits": "the load-balancing loss is not a sum over tokens, and each rank has only its own tokens",
    "head_mask": _UNSUPPORTED_OPTIONS["head_mask"],
}


def check_model_options(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> None:
    """Checks the arguments of a model's forward, and the defaults that its config has for them.

    Raises:
        ArgumentError: when an option is set that is not supported.
    """
    for name, remedy in _UNSUPPORTED_MODEL_OPTIONS.items():
        value = kwargs.get(name)
        if value is None:
            value = getattr(model.config, name, None)
        if value is not None and value is not False:
            _raise_unsupported(model, name, remedy)


class LayerOptions(NamedTuple):
    """The options of one attention call: its mask pattern, its padding mask if any, and its score."""

    pattern: MaskPattern
    padding: Tensor | None
    score: Score


def read_options(
    module: nn.Module, attention_mask: object, dropout: float, scale: float | None, options: Mapping[str, Any]
) -> LayerOptions:
    """Returns the options of an attention call.

    Args:
        module: the attention module.
        attention_mask: what our mask function returned, or None.
        dropout: attention dropout; must be 0.
        scale: softmax scale; None is head_dim ** -0.5.
        options: the other keyword arguments of transformers' attention functions, such as sliding_window, softcap and
            s_aux.
    Raises:
        ArgumentError: when an option is not supported; the message names it and says what to do instead.
    """
    if dropout:
        _raise_unsupported(module, f"attention dropout of {dropout}", "set it to 0 in the config, or call model.eval()")
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    sliding_window = given.pop("sliding_window", None)
    softcap, sink = given.pop("softcap", None), given.pop("s_aux", None)
    given.pop("is_causal", None)
    for name, value in given.items():
        if name in _UNSUPPORTED_OPTIONS:
            _raise_unsupported(module, name, _UNSUPPORTED_OPTIONS[name])
        if name not in _IGNORED_OPTIONS:
            _raise_unsupported(module, f"{name}={value!r:.80}", "this argument is unknown; run the model unpatched")
    padding = None
    if isinstance(attention_mask, MaskSpec):
        pattern, padding = attention_mask.pattern, attention_mask.padding
        if sliding_window is not None and pattern.left is None:
            _raise_unsupported(
                module,
                f"sliding_window={sliding_window} with a mask that has no window",
                "the two contradict each other; run this model unpatched",
            )
    elif attention_mask is None:
        is_causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        pattern = CAUSAL if causal else BIDIRECTIONAL
        if sliding_window is not None:
            pattern = with_window(pattern, int(sliding_window))
    else:
        shape = tuple(getattr(attention_mask, "shape", ()))
        _raise_unsupported(
            module,
            f"a {type(attention_mask).__name__} of shape {shape} as its mask",
            "give padding as a 2-D attention_mask and packed documents as position_ids that restart, both to "
            "handle.shard(batch); a bias or a dense mask needs the unpatched model",
        )
    score = Score(scale, None if softcap is None else float(softcap), sink)
    return LayerOptions(pattern, padding, score)


def _raise_unsupported(module: nn.Module, option: str, remedy: str) -> NoReturn:
    raise ArgumentError(f"{type(module).__name__} asks for {option}, which is not supported across ranks: {remedy}")
