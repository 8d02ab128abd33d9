"""Positions where a model counts its rows by itself, instead of taking position_ids: set right from the layout."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from ringattn.errors import ArgumentError
from ringattn.types import Ints


def rescale_queries(module: nn.Module, q: Tensor, positions: Ints, *, first: int = 0) -> Tensor:
    """Returns the queries with the temperature of their positions, where a layer has just counted its rows.

    Llama 4 scales queries by their position in its layers without rotary embedding.

    Args:
        module: the layer's attention module.
        q: (B, rows, heads, head_dim), as the layer has scaled them.
        positions: of the rows.
        first: what the layer has taken for the position of the first row.
    """
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return q
    taken = torch.arange(first, first + q.shape[1], device=q.device)
    right = torch.as_tensor(positions, device=q.device)
    ratio = _temperature(module, right) / _temperature(module, taken)
    return q * ratio.to(q.dtype).view(1, -1, 1, 1)


def _temperature(module: Any, positions: Tensor) -> Tensor:
    steps = torch.floor((positions.double() + 1) / module.floor_scale)
    temperature: Tensor = torch.log1p(steps) * module.attn_scale + 1
    return temperature


def counting_embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the modules that embed positions they count themselves, as BART's do: they are told them instead."""
    if not model.config.is_encoder_decoder:
        return []
    return [module for module in model.modules() if type(module).__name__.endswith("LearnedPositionalEmbedding")]


def dynamic_rotaries(model: nn.Module) -> list[nn.Module]:
    """Returns the rotary embeddings whose frequencies follow the largest position of the rows they are given."""
    return [
        module for module in model.modules() if any("dynamic" in kind or kind == "longrope" for kind in _kinds(module))
    ]


def _kinds(module: nn.Module) -> list[str]:
    """The kind of rotary embedding, or those of each kind of layer."""
    found = getattr(module, "rope_type", None)
    kinds = found.values() if isinstance(found, dict) else [found]
    return [kind for kind in kinds if isinstance(kind, str)]


def append_max_position(
    last: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns a rotary embedding's arguments (x, position_ids, ...) with one more row, at the last position of all."""
    named = "position_ids" in kwargs
    positions = kwargs["position_ids"] if named else args[1]
    more = last.to(positions).expand(*positions.shape[:-1], 1)
    positions = torch.cat([positions, more], -1)
    return (args, kwargs | {"position_ids": positions}) if named else ((args[0], positions, *args[2:]), kwargs)


def drop_max_position(output: Any) -> Any:
    """Returns what a rotary embedding gives, (..., rows, dim) each, without the last row."""
    return tree_map_only(Tensor, lambda x: x[..., :-1, :], output)


def check_positions(model: PreTrainedModel) -> None:
    """Checks that a model can be told positions.

    Raises:
        ArgumentError: when it counts its rows, which are a shard here.
    """
    if model.config.is_encoder_decoder:
        told = len(counting_embeddings(model)) >= 2
    else:
        told = "position_ids" in inspect.signature(type(model).forward).parameters
    if not told:
        raise ArgumentError(
            f"{type(model).__name__} counts its own rows for positions, or has a bias for their distance, and its rows "
            "are a shard here. Decoders and encoders that take position_ids can be patched, and encoder-decoders with "
            "learned positions, such as BART; run this one unpatched"
        )


def positions_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Returns the function that a model has for the position_ids of tokens when none are given."""
    for module in model.modules():
        counted: Any = getattr(module, "create_position_ids_from_input_ids", None)
        if counted is not None and hasattr(module, "padding_idx"):
            return partial(_from_ids, counted, int(cast(int, module.padding_idx)))
    return _from_zero


def _from_zero(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device)[None]


def _from_ids(counted: Callable[[Tensor, int], Tensor], padding_idx: int, tokens: Tensor) -> Tensor:
    """As RoBERTa does: padding is not counted, nor are embeddings known to be padding."""
    if tokens.ndim > 2:
        return _from_zero(tokens) + padding_idx + 1
    return counted(tokens, padding_idx)
