"""What one forward pass on a cache is asked for: reading and checking the arguments of a model's forward."""

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

# What a pass on a cache may be given. Of everything else, None and False say nothing, and the rest is refused.
_KNOWN = {
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
    """What a cache holds, as a model's forward counts it.

    Args:
        length: columns of the batch so far, padding included.
        pads: of each row, how many of them are padding, all in front; () if there are no rows yet.
    """

    length: int
    pads: tuple[int, ...]


@dataclass(frozen=True)
class GenerationInputs:
    """New tokens of a batch, the same on every rank.

    Args:
        name: what they are: "input_ids" or "inputs_embeds".
        values: (B, T), or (B, T, C).
        positions: what the model is told of their positions, (B, T).
        pads: of each row, how many of the T columns are padding, all in front.
        columns: those whose logits are wanted.
    """

    name: str
    values: Tensor
    positions: Tensor
    pads: tuple[int, ...]
    columns: Ints

    @property
    def num_rows(self) -> int:
        """B."""
        return self.values.shape[0]

    @property
    def width(self) -> int:
        """T."""
        return self.values.shape[1]

    @property
    def counts(self) -> tuple[int, ...]:
        """How many tokens each row has, padding left out."""
        return tuple(self.width - pad for pad in self.pads)

    @property
    def digest(self) -> str:
        """Tells apart what ranks might be given: ids and padding; of embeddings, their shape."""
        content = f"{self.name} {tuple(self.values.shape)} {self.pads}".encode()
        if self.name == "input_ids":
            content += self.values.detach().cpu().contiguous().numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def same(self) -> tuple[int, ...]:
        """Returns for each row the first one that is given the same ids, as beams and samples of one prompt are."""
        if self.name != "input_ids":
            return tuple(range(self.num_rows))
        first: dict[tuple[int, bytes], int] = {}
        rows = self.values.detach().cpu().contiguous().numpy()
        return tuple(
            first.setdefault((pad, ids[pad:].tobytes()), row)
            for row, (pad, ids) in enumerate(zip(self.pads, rows, strict=True))
        )


def read_inputs(arguments: Mapping[str, Any], past: PastTokens) -> GenerationInputs:
    """Returns the new tokens that a model's forward is asked for, by the names of its arguments.

    Raises:
        ArgumentError: when something is asked for that a pass on a sharded cache cannot do.
    """
    _refuse_others(arguments)
    name = "input_ids" if arguments.get("input_ids") is not None else "inputs_embeds"
    values = arguments.get(name)
    if not isinstance(values, Tensor) or values.ndim != (2 if name == "input_ids" else 3) or not values.numel():
        shape = tuple(values.shape) if isinstance(values, Tensor) else values
        raise ArgumentError(f"{name}={shape}: must be ids (batch, tokens), or embeddings (batch, tokens, dim)")
    batch, width = values.shape[:2]
    if past.pads and batch != len(past.pads):
        raise ArgumentError(
            f"{name} has {batch} rows, but the cache holds {len(past.pads)}: call cache.reset() for another batch, or "
            "cache.batch_repeat_interleave(n) to go on n times from what it holds"
        )
    pads = _new_pads(arguments.get("attention_mask"), past, batch, width)
    positions = _positions(arguments.get("position_ids"), past, pads, values)
    return GenerationInputs(name, values, positions, pads, _columns(arguments.get("logits_to_keep", 0), width))


def _refuse_others(arguments: Mapping[str, Any]) -> None:
    others = [
        name for name, value in arguments.items() if name not in _KNOWN and value is not None and value is not False
    ]
    if others:
        raise ArgumentError(
            f"{', '.join(others)}: a pass on a RingCache takes token ids or embeddings, a 2-D attention_mask, "
            "position_ids and logits_to_keep; leave these out, or generate with a cache of transformers"
        )
    if arguments.get("use_cache") is False:
        raise ArgumentError("use_cache=False: given together with a RingCache, which is there to be used")
    if arguments.get("return_dict") is False:
        raise ArgumentError("return_dict=False: a pass on a RingCache returns its output by names")
    for given, other in (("input_ids", "inputs_embeds"), ("inputs_embeds", "input_ids")):
        if arguments.get(given) is not None and arguments.get(other) is not None:
            raise ArgumentError(f"{given} and {other}: give one of them")


def _new_pads(mask: object, past: PastTokens, batch: int, width: int) -> tuple[int, ...]:
    """Returns how many of the new columns of each row are padding."""
    if mask is None:
        return (0,) * batch
    total = past.length + width
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != total or mask.shape[0] not in (1, batch):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ArgumentError(
            f"attention_mask={shape}: must be ({batch}, {total}), 0 for padding: the {past.length} columns that the "
            f"cache has seen and {width} new ones"
        )
    real = (mask.detach() != 0).expand(batch, total).cpu().numpy()
    if (real[:, 1:] < real[:, :-1]).any():
        raise ArgumentError(
            "attention_mask: a row has padding after its first token: pad on the left, before it. If none is given, "
            "generate takes all ids that are pad_token_id for padding; give a mask of ones if they are tokens"
        )
    found = np.where(real.any(axis=1), real.argmax(axis=1), total).tolist()
    held = past.pads or (0,) * batch
    if any(min(pad, past.length) != pads for pad, pads in zip(found, held, strict=True)):
        raise ArgumentError(
            f"attention_mask: says that the rows begin with {found} columns of padding, but they were stored with "
            f"{list(held)}; what is stored cannot be masked afterwards, nor padding be filled in: cache.reset()"
        )
    return tuple(max(pad - past.length, 0) for pad in found)


def _positions(given: object, past: PastTokens, pads: tuple[int, ...], values: Tensor) -> Tensor:
    batch, width = values.shape[:2]
    if given is None:
        held = past.pads or (0,) * batch
        shift = torch.tensor(
            [past.length - old - new for old, new in zip(held, pads, strict=True)], device=values.device
        )
        return (shift[:, None] + torch.arange(width, device=values.device)).clamp_(min=0)
    if not isinstance(given, Tensor) or given.ndim != 2 or given.shape[1] != width or given.shape[0] not in (1, batch):
        shape = tuple(given.shape) if isinstance(given, Tensor) else given
        raise ArgumentError(f"position_ids={shape}: must be ({batch}, {width}), a position for each new token")
    return given.expand(batch, width)


def _columns(keep: object, width: int) -> Ints:
    """Returns the columns whose logits are wanted: the last `keep`, all if it is 0, or those that it lists."""
    every = np.arange(width, dtype=np.int64)
    if isinstance(keep, int) and keep >= 0:
        return every[-keep:]
    if isinstance(keep, Tensor) and keep.ndim == 1 and not keep.is_floating_point():
        chosen: Ints = every[keep.cpu().numpy()]
        return chosen
    raise ArgumentError(f"logits_to_keep={keep!r:.100}: must be a number of last tokens, or a tensor of their columns")
