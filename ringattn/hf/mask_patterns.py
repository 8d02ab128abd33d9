"""Patterns: which keys a layer wants its queries to see, whatever the batch; read from transformers' mask functions.

A model of transformers says which mask a layer needs by a function of (batch, head, query, key) indices, put together
from a few parts: causal, a sliding window, chunks. The parts are recognised here by their names, and one that is not
known is refused: nothing that a model asks for is dropped.
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
    """The keys that a query may see, by their distance and by chunks that begin with each document.

    Args:
        left: how many keys before its own position; None is all.
        right: how many after it; 0 is causal, None is all.
        chunk: it sees only keys of its own chunk of so many positions, counted from its document's first.
    """

    left: int | None = None
    right: int | None = None
    chunk: int | None = None

    def within(self, cu_seqlens: tuple[int, ...] | None) -> Mask:
        """Returns the mask of a sequence of these documents; None is a sequence that is one document."""
        mask = full()
        if self.left is not None:
            mask = sliding_window(self.left, self.right)
        elif self.right is not None:
            mask = sliding_window(None, self.right) if self.right else causal()
        if cu_seqlens is None:
            return mask if self.chunk is None else mask & chunked(self.chunk)
        return mask & documents(cu_seqlens if self.chunk is None else _cut(cu_seqlens, self.chunk))


CAUSAL = MaskPattern(right=0)
BIDIRECTIONAL = MaskPattern()


def _cut(cu_seqlens: tuple[int, ...], chunk: int) -> tuple[int, ...]:
    """The documents' chunks, as documents."""
    starts = [start for a, b in pairwise(cu_seqlens) for start in range(a, b, chunk)]
    return (*(starts or [0]), cu_seqlens[-1])


def read_pattern(mask_function: Callable[..., Any]) -> MaskPattern:
    """Returns what a mask function of transformers asks for.

    What it says of padding and of packed documents is left out: it was made from this rank's rows alone, and the batch
    knows of the whole sequence.

    Raises:
        MaskError: when a part of it is none that is known.
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
            found = BIDIRECTIONAL
            for part in inner["mask_functions"]:
                found = _intersection(found, read_pattern(part))
            return found
        case "remap_positions_for_packed_sequence":
            return read_pattern(inner["mask_function"])
        case "packed_sequence_mask_function" | "padding_mask_function":
            return BIDIRECTIONAL
    raise MaskError(
        f"the model asks for attention by the mask function {name!r}, which has no counterpart here; causal, "
        "bidirectional, sliding windows and chunks have one, and unions (images whose tokens see each other both ways) "
        "have none. Run this model, or this batch, unpatched"
    )


def _intersection(a: MaskPattern, b: MaskPattern) -> MaskPattern:
    """What both allow."""
    if a.chunk is not None and b.chunk is not None and a.chunk != b.chunk:
        raise MaskError(f"the model asks for chunks of {a.chunk} and of {b.chunk} positions in one layer")
    return MaskPattern(_nearer(a.left, b.left), _nearer(a.right, b.right), b.chunk if a.chunk is None else a.chunk)


def _nearer(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def with_window(pattern: MaskPattern, window: int) -> MaskPattern:
    """The pattern with a window of so many keys, the query's own included; to both sides unless it is causal."""
    right = 0 if pattern.right == 0 else window - 1
    return _intersection(pattern, replace(BIDIRECTIONAL, left=window - 1, right=right))
