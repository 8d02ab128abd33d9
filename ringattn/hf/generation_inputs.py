"""Reads and checks the arguments of a model's forward pass on a RingCache."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringattn.errors import ArgumentError
from ringattn.types import Ints

# Supported arguments. All others must be None or False.
_SUPPORTED_ARGUMENTS = {
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "return_dict",
    "output_hidden_states",
    "cache_position",  # of older versions; follows from the cache
}


@dataclass(frozen=True)
class PastTokens:
    """The tokens that a cache holds, counted as transformers counts them: in columns of a padded batch.

    Args:
        num_columns: columns of the batch, left padding included.
        left_padding: number of padding columns at the start of each row; () if there are no rows yet.
    """

    num_columns: int
    left_padding: tuple[int, ...]


@dataclass(frozen=True)
class GenerationInputs:
    """The new tokens of a batch, equal on every rank; B rows of T columns.

    Args:
        name: "input_ids" or "inputs_embeds".
        values: ids (B, T), or embeddings (B, T, hidden).
        position_ids: (B, T).
        left_padding: number of padding columns at the start of each row, out of T.
        logit_columns: the columns whose logits are needed.
    """

    name: str
    values: Tensor
    position_ids: Tensor
    left_padding: tuple[int, ...]
    logit_columns: Ints

    @property
    def num_rows(self) -> int:
        """B."""
        return self.values.shape[0]

    @property
    def num_columns(self) -> int:
        """T."""
        return self.values.shape[1]

    @property
    def num_tokens(self) -> tuple[int, ...]:
        """Number of tokens in each row, without padding."""
        return tuple(self.num_columns - padding for padding in self.left_padding)

    @property
    def digest(self) -> str:
        """A hash of ids and padding, which must be equal on all ranks; of embeddings, only their shape is hashed."""
        content = f"{self.name} {tuple(self.values.shape)} {self.left_padding}".encode()
        if self.name == "input_ids":
            content += self.values.detach().cpu().contiguous().numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def first_equal_rows(self) -> tuple[int, ...]:
        """Returns for each row the first row with the same ids. Beams and samples of one prompt have the same ids."""
        if self.name != "input_ids":
            return tuple(range(self.num_rows))
        first: dict[tuple[int, bytes], int] = {}
        rows = self.values.detach().cpu().contiguous().numpy()
        return tuple(
            first.setdefault((padding, ids[padding:].tobytes()), row)
            for row, (padding, ids) in enumerate(zip(self.left_padding, rows, strict=True))
        )


def read_inputs(arguments: Mapping[str, Any], past: PastTokens) -> GenerationInputs:
    """Returns the new tokens in the arguments of a model's forward.

    Args:
        arguments: by name.
        past: what the cache holds.
    Raises:
        ArgumentError: when an argument is not supported with a RingCache, or does not fit what the cache holds.
    """
    _check_supported(arguments)
    name = "input_ids" if arguments.get("input_ids") is not None else "inputs_embeds"
    values = arguments.get(name)
    if not isinstance(values, Tensor) or values.ndim != (2 if name == "input_ids" else 3) or not values.numel():
        shape = tuple(values.shape) if isinstance(values, Tensor) else values
        raise ArgumentError(f"{name}={shape}: must be ids (batch, tokens), or embeddings (batch, tokens, hidden)")
    batch, num_columns = values.shape[:2]
    if past.left_padding and batch != len(past.left_padding):
        raise ArgumentError(
            f"{name} has {batch} rows, but the cache holds {len(past.left_padding)}: call cache.reset() for another "
            "batch, or cache.batch_repeat_interleave(n) to continue each row n times"
        )
    left_padding = _read_padding(arguments.get("attention_mask"), past, batch, num_columns)
    position_ids = _read_position_ids(arguments.get("position_ids"), past, left_padding, values)
    logit_columns = _read_logit_columns(arguments.get("logits_to_keep", 0), num_columns)
    return GenerationInputs(name, values, position_ids, left_padding, logit_columns)


def _check_supported(arguments: Mapping[str, Any]) -> None:
    unsupported = [
        name
        for name, value in arguments.items()
        if name not in _SUPPORTED_ARGUMENTS and value is not None and value is not False
    ]
    if unsupported:
        raise ArgumentError(
            f"{', '.join(unsupported)}: not supported with a RingCache, which takes token ids or embeddings, a 2-D "
            "attention_mask, position_ids and logits_to_keep; leave these out, or generate with a cache of transformers"
        )
    if arguments.get("use_cache") is False:
        raise ArgumentError("use_cache=False: must be True or None with a RingCache; leave past_key_values out")
    if arguments.get("return_dict") is False:
        raise ArgumentError("return_dict=False: must be True or None with a RingCache")
    if arguments.get("input_ids") is not None and arguments.get("inputs_embeds") is not None:
        raise ArgumentError("input_ids and inputs_embeds: give one of them, not both")


def _read_padding(mask: object, past: PastTokens, batch: int, num_columns: int) -> tuple[int, ...]:
    """Returns how many of the new columns of each row are padding."""
    if mask is None:
        return (0,) * batch
    total = past.num_columns + num_columns
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != total or mask.shape[0] not in (1, batch):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ArgumentError(
            f"attention_mask={shape}: must be ({batch}, {total}), 0 for padding: {past.num_columns} columns of the "
            f"cache and {num_columns} new ones"
        )
    is_token = (mask.detach() != 0).expand(batch, total).cpu().numpy()
    if (is_token[:, 1:] < is_token[:, :-1]).any():
        raise ArgumentError(
            "attention_mask: a row has padding after its first token; pad on the left. If no attention_mask is given, "
            "generate takes every pad_token_id for padding; give a mask of ones if these ids are tokens"
        )
    given = np.where(is_token.any(axis=1), is_token.argmax(axis=1), total).tolist()
    stored = past.left_padding or (0,) * batch
    if any(min(a, past.num_columns) != b for a, b in zip(given, stored, strict=True)):
        raise ArgumentError(
            f"attention_mask: its rows begin with {given} columns of padding, but the cache was filled with "
            f"{list(stored)}. Stored tokens cannot be masked later, nor padding be replaced by tokens: call "
            "cache.reset(), and start again"
        )
    return tuple(max(padding - past.num_columns, 0) for padding in given)


def _read_position_ids(given: object, past: PastTokens, left_padding: tuple[int, ...], values: Tensor) -> Tensor:
    """Returns position_ids (B, T); by default, positions are counted from the first token of each row."""
    batch, num_columns = values.shape[:2]
    if given is None:
        stored = past.left_padding or (0,) * batch
        offsets = [past.num_columns - old - new for old, new in zip(stored, left_padding, strict=True)]
        offset = torch.tensor(offsets, device=values.device)[:, None]
        return (offset + torch.arange(num_columns, device=values.device)).clamp_(min=0)
    shape = tuple(given.shape) if isinstance(given, Tensor) else given
    if not isinstance(given, Tensor) or shape not in ((1, num_columns), (batch, num_columns)):
        raise ArgumentError(f"position_ids={shape}: must be ({batch}, {num_columns}), one position for each new token")
    return given.expand(batch, num_columns)


def _read_logit_columns(logits_to_keep: object, num_columns: int) -> Ints:
    """Returns the columns whose logits are needed: the last n, all if n is 0, or those listed in a tensor."""
    columns = np.arange(num_columns, dtype=np.int64)
    if isinstance(logits_to_keep, int) and logits_to_keep >= 0:
        return columns[-logits_to_keep:]
    if isinstance(logits_to_keep, Tensor) and logits_to_keep.ndim == 1 and not logits_to_keep.is_floating_point():
        listed: Ints = columns[logits_to_keep.cpu().numpy()]
        return listed
    raise ArgumentError(
        f"logits_to_keep={logits_to_keep!r:.100}: must be the number of last columns, 0 for all, or a 1-D tensor"
    )
