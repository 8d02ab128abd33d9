"""The pattern read from a mask function of transformers allows the same pairs as the function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import masking_utils as theirs

from ringattn.errors import MaskError
from ringattn.hf.mask_patterns import CAUSAL, MaskPattern, read_pattern, with_window
from tests.geometry.brute import slice_counts

LENGTH = 11
NO_PADDING = torch.zeros(1, dtype=torch.long)

FUNCTIONS = {
    "causal": theirs.causal_mask_function,
    "bidirectional": theirs.bidirectional_mask_function,
    "window": theirs.sliding_window_causal_mask_function(4),
    "window_of_one": theirs.sliding_window_causal_mask_function(1),
    "window_to_both_sides": theirs.sliding_window_bidirectional_mask_function(3),
    "chunks": theirs.chunked_causal_mask_function(4, NO_PADDING),
    "window_in_chunks": theirs.and_masks(
        theirs.chunked_causal_mask_function(4, NO_PADDING), theirs.sliding_window_overlay(2)
    ),
}


def seen(function: Callable[..., Any], length: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    q, k = torch.arange(length)[:, None], torch.arange(length)[None, :]
    allowed = function(torch.tensor(0), torch.tensor(0), q, k)
    return np.broadcast_to(allowed.numpy(), (length, length))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_the_mask_function(name: str) -> None:
    mask = read_pattern(FUNCTIONS[name]).to_mask(None)
    np.testing.assert_array_equal(
        slice_counts(mask.slices(LENGTH, LENGTH), LENGTH, LENGTH), seen(FUNCTIONS[name], LENGTH)
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_the_mask_function_in_each_document(name: str) -> None:
    """Chunks, too, are counted from a document's first token."""
    ends = (0, 5, 5, 6, LENGTH)
    counts = slice_counts(read_pattern(FUNCTIONS[name]).to_mask(ends).slices(LENGTH, LENGTH), LENGTH, LENGTH)
    expected = np.zeros((LENGTH, LENGTH), dtype=np.bool_)
    for start, stop in ((0, 5), (5, 6), (6, LENGTH)):
        expected[start:stop, start:stop] = seen(FUNCTIONS[name], stop - start)
    np.testing.assert_array_equal(counts, expected)


def test_ignores_packing_and_padding_of_a_shard() -> None:
    """A shard's positions look packed where they jump, and its padding is not the whole sequence's."""
    positions = torch.tensor([[0, 1, 2, 9, 10, 11]])
    packed = theirs.find_packed_sequence_indices(positions)
    assert packed is not None
    function = theirs.packed_sequence_compatibility_function(theirs.causal_mask_function, positions, packed)
    assert read_pattern(function) == CAUSAL
    padding = theirs.padding_mask_function(torch.ones(1, 6, dtype=torch.bool))
    assert read_pattern(theirs.and_masks(theirs.causal_mask_function, padding)) == CAUSAL


@pytest.mark.parametrize(
    "function",
    [
        theirs.or_masks(theirs.causal_mask_function, theirs.bidirectional_mask_function),
        theirs.and_masks(theirs.causal_mask_function, lambda b, h, q, k: k % 2 == 0),
        theirs.blockwise_overlay(torch.zeros(1, 4)),
    ],
    ids=["or", "own", "blocks"],
)
def test_refuses_unknown_mask_functions(function: Callable[..., Any]) -> None:
    with pytest.raises(MaskError, match="asks for the mask function"):
        read_pattern(function)


def test_windows_given_by_number() -> None:
    assert with_window(CAUSAL, 4) == read_pattern(theirs.sliding_window_causal_mask_function(4))
    assert with_window(MaskPattern(), 4) == MaskPattern(left=3, right=3)
    assert with_window(MaskPattern(left=1, right=0), 4) == MaskPattern(left=1, right=0)


def test_refuses_chunks_of_two_sizes() -> None:
    two = theirs.and_masks(theirs.chunked_overlay(4, NO_PADDING), theirs.chunked_overlay(3, NO_PADDING))
    with pytest.raises(MaskError, match="chunks of 4 and of 3"):
        read_pattern(two)
