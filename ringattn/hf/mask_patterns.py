"""Mask patterns: which keys a layer's queries may see, read from the mask functions of transformers.

transformers describes the mask of a layer by a function of (batch, head, query, key) indices, composed of a few parts:
causal, sliding window, chunks. `read_pattern` recognises the parts by their names, and refuses unknown ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from ringattn.errors import MaskError
from ringattn.geometry.masks import Mask, causal, chunked, documents, full, sliding_window


@dataclass(frozen=True)
class MaskPattern:
    """The keys that a query may see, by their distance and by chunks, independent of length, documents and padding.

    Args:
        left: number of keys before the query's position; None is all.
        right: number of keys after the query's position; 0 is causal, None is all.
        chunk: if set, a query sees only keys of its own chunk of this many positions; chunks are counted from the start
            of each document.
    """

    left: int | None = None
    right: int | None = None
    chunk: int | None = None

    def to_mask(self, cu_seqlens: tuple[int, ...] | None) -> Mask:
        """Returns the mask of a sequence with these packed documents; None is a single document."""
        mask = full()
        if self.left is not None:
            mask = sliding_window(self.left, self.right)
        elif self.right is not None:
            mask = sliding_window(None, self.right) if self.right else causal()
        if cu_seqlens is None:
            return mask if self.chunk is None else mask & chunked(self.chunk)
        return mask & documents(cu_seqlens if self.chunk is None else _chunk_boundaries(cu_seqlens, self.chunk))


CAUSAL = MaskPattern(right=0)
BIDIRECTIONAL = MaskPattern()


def _chunk_boundaries(cu_seqlens: tuple[int, ...], chunk: int) -> tuple[int, ...]:
    """Returns the chunks of all documents as cumulative lengths."""
    starts = [start for a, b in pairwise(cu_seqlens) for start in range(a, b, chunk)]
    return (*(starts or [0]), cu_seqlens[-1])


def read_pattern(mask_function: Callable[..., Any]) -> MaskPattern:
    """Returns the pattern of a mask function of transformers.

    Parts for padding and packed documents are ignored: transformers makes them from this rank's rows, while the
    ShardingContext has them for the whole sequence.

    Raises:
        MaskError: when a part is unknown.
    """
    name = mask_function.__qualname__
    inner = inspect.getclosurevars(mask_function).nonlocals
    match name.removesuffix(".<locals>.inner_mask"):
        case "causal_mask_function":
            return CAUSAL
        case "bidirectional_mask_function":
            return BIDIRECTIONAL
        case "sliding_window_overlay":
            return MaskPattern(left=int(inner["sliding_window"]) - 1)
        case "sliding_window_bidirectional_overlay":
            return MaskPattern(left=int(inner["sliding_window"]), right=int(inner["sliding_window"]))
        case "chunked_overlay":
            return MaskPattern(chunk=int(inner["chunk_size"]))
        case "and_masks.<locals>.and_mask":
            pattern = BIDIRECTIONAL
            for part in inner["mask_functions"]:
                pattern = _intersection(pattern, read_pattern(part))
            return pattern
        case "remap_positions_for_packed_sequence":
            return read_pattern(inner["mask_function"])
        case "packed_sequence_mask_function" | "padding_mask_function":
            return BIDIRECTIONAL
    raise MaskError(
        f"the model asks for the mask function {name!r}, which is not supported; causal, bidirectional, sliding-window "
        "and chunked masks are, unions (images whose tokens see each other both ways) are not. Run this model, or this "
        "batch, unpatched"
    )


def _intersection(a: MaskPattern, b: MaskPattern) -> MaskPattern:
    if a.chunk is not None and b.chunk is not None and a.chunk != b.chunk:
        raise MaskError(
            f"the model asks for chunks of {a.chunk} and of {b.chunk} positions in one layer; only one chunk size per "
            "layer is supported. Run this model unpatched"
        )
    chunk = b.chunk if a.chunk is None else a.chunk
    return MaskPattern(_min_bound(a.left, b.left), _min_bound(a.right, b.right), chunk)


def _min_bound(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def with_window(pattern: MaskPattern, window: int) -> MaskPattern:
    """Returns the pattern with a sliding window of this many keys, counting the query's own position.

    The window extends to the left of a causal pattern, and to both sides of any other.
    """
    right = 0 if pattern.right == 0 else window - 1
    return _intersection(pattern, replace(BIDIRECTIONAL, left=window - 1, right=right))
