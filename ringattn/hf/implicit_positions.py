"""Corrects positions that a model derives from the number of its rows, which are a shard here."""

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


def rescale_queries(module: nn.Module, q: Tensor, positions: Ints, *, first_position: int = 0) -> Tensor:
    """Returns the queries with the attention temperature of their global positions.

    Llama 4 scales queries by their position in its layers without rotary embedding, and counts the local rows.

    Args:
        module: the attention module; queries of other modules are returned unchanged.
        q: (B, rows, heads, head_dim), as scaled by the layer.
        positions: global position of each row.
        first_position: the position that the layer assumed for the first row.
    """
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return q
    assumed = torch.arange(first_position, first_position + q.shape[1], device=q.device)
    actual = torch.as_tensor(positions, device=q.device)
    ratio = _temperature(module, actual) / _temperature(module, assumed)
    return q * ratio.to(q.dtype).view(1, -1, 1, 1)


def _temperature(module: Any, positions: Tensor) -> Tensor:
    steps = torch.floor((positions.double() + 1) / module.floor_scale)
    temperature: Tensor = torch.log1p(steps) * module.attn_scale + 1
    return temperature


def learned_position_embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the position embeddings of an encoder-decoder that count rows unless they get position_ids (BART)."""
    if not model.config.is_encoder_decoder:
        return []
    return [module for module in model.modules() if type(module).__name__.endswith("LearnedPositionalEmbedding")]


def dynamic_rotary_embeddings(model: nn.Module) -> list[nn.Module]:
    """Returns the rotary embeddings whose frequencies depend on the largest position of their input."""
    return [
        module
        for module in model.modules()
        if any("dynamic" in rope_type or rope_type == "longrope" for rope_type in _rope_types(module))
    ]


def _rope_types(module: nn.Module) -> list[str]:
    """Returns the rope type of a module, or one per layer type; [] if it is no rotary embedding."""
    rope_type = getattr(module, "rope_type", None)
    rope_types = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return [name for name in rope_types if isinstance(name, str)]


def append_max_position(
    max_position: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments (x, position_ids, ...) of a rotary embedding with `max_position` as an additional row."""
    by_keyword = "position_ids" in kwargs
    positions = kwargs["position_ids"] if by_keyword else args[1]
    appended = max_position.to(positions).expand(*positions.shape[:-1], 1)
    positions = torch.cat([positions, appended], -1)
    return (args, kwargs | {"position_ids": positions}) if by_keyword else ((args[0], positions, *args[2:]), kwargs)


def drop_max_position(output: Any) -> Any:
    """Returns the output of a rotary embedding, tensors (..., rows, dim), without the row of `max_position`."""
    return tree_map_only(Tensor, lambda x: x[..., :-1, :], output)


def check_positions(model: PreTrainedModel) -> None:
    """Checks that a model takes positions as an argument, or that its position embeddings do.

    Raises:
        ArgumentError: when it counts its rows, which are a shard here.
    """
    if model.config.is_encoder_decoder:
        takes_positions = len(learned_position_embeddings(model)) >= 2
    else:
        takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters
    if not takes_positions:
        raise ArgumentError(
            f"model={type(model).__name__}: derives positions from the number of its rows, or has a bias for their "
            "distance, but its rows are a shard here. Supported are models that take position_ids, and "
            "encoder-decoders with learned positions, such as BART; run this one unpatched"
        )


def default_position_ids(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Returns the function by which a model makes position_ids (B, S) or (1, S) of ids (B, S) or embeddings."""
    for module in model.modules():
        create: Any = getattr(module, "create_position_ids_from_input_ids", None)
        if create is not None and hasattr(module, "padding_idx"):
            return partial(_position_ids_after_padding_idx, create, int(cast(int, module.padding_idx)))
    return _consecutive_position_ids


def _consecutive_position_ids(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device)[None]


def _position_ids_after_padding_idx(
    create: Callable[[Tensor, int], Tensor], padding_idx: int, tokens: Tensor
) -> Tensor:
    """Counts from padding_idx + 1, as RoBERTa does; padding ids are not counted, embeddings all are."""
    if tokens.ndim > 2:
        return _consecutive_position_ids(tokens) + padding_idx + 1
    return create(tokens, padding_idx)
