"""The arguments of a forward pass on a RingCache: what is read from them, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ringattn.errors import ArgumentError
from ringattn.hf.generation_inputs import PastTokens, read_inputs
from tests.hf.generate_cases import padded, prompts

EMPTY = PastTokens(0, ())
HELD = PastTokens(7, (2, 0))
IDS = prompts(2, 5)


@pytest.mark.parametrize(
    ("arguments", "past", "message"),
    [
        ({"pixel_values": torch.ones(1)}, EMPTY, "pixel_values: not supported with a RingCache, which takes token ids"),
        ({"labels": IDS}, EMPTY, "labels: not supported"),
        ({"output_attentions": True}, EMPTY, "output_attentions: not supported"),
        ({"use_cache": False}, EMPTY, "use_cache=False"),
        ({"return_dict": False}, EMPTY, "return_dict=False"),
        ({"inputs_embeds": torch.ones(2, 5, 3)}, EMPTY, "give one of them"),
        ({"input_ids": None}, EMPTY, "inputs_embeds=None: must be"),
        ({"input_ids": prompts(2, 0)}, EMPTY, "must be ids"),
        ({"input_ids": prompts(3, 5)}, HELD, "3 rows, but the cache holds 2"),
        ({"attention_mask": torch.ones(2, 5)}, HELD, "must be (2, 12)"),
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, EMPTY, "must be (2, 5)"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0, 0]] * 2)}, EMPTY, "pad on the left"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1]] * 2)}, EMPTY, "pad on the left"),
        ({"attention_mask": torch.ones(2, 12)}, HELD, "begin with [0, 0] columns of padding"),
        ({"position_ids": torch.ones(3, 2, 5)}, EMPTY, "must be (2, 5)"),
        ({"logits_to_keep": -1}, EMPTY, "logits_to_keep=-1"),
    ],
)
def test_arguments(arguments: dict[str, Any], past: PastTokens, message: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        read_inputs({"input_ids": IDS} | arguments, past)
    assert message in str(raised.value)


def test_padding_is_read_from_the_mask() -> None:
    _, mask = padded([5, 2, 0], 5)
    found = read_inputs({"input_ids": prompts(3, 5), "attention_mask": mask}, EMPTY)
    assert found.left_padding == (0, 3, 5)
    assert found.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    mask = torch.cat([mask, torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 1]])], 1)
    found = read_inputs(
        {"input_ids": prompts(3, 3), "attention_mask": mask, "logits_to_keep": 2}, PastTokens(5, found.left_padding)
    )
    assert found.left_padding == (0, 0, 2)
    assert found.position_ids.tolist() == [[5, 6, 7], [2, 3, 4], [0, 0, 0]]
    assert found.logit_columns.tolist() == [1, 2]


def test_rows_of_the_same_ids_are_one() -> None:
    ids, mask = padded([3, 2, 3, 2], 3)
    ids[2], ids[3] = ids[0], ids[1]
    assert read_inputs({"input_ids": ids, "attention_mask": mask}, EMPTY).first_equal_rows() == (0, 1, 0, 1)
    assert read_inputs({"input_ids": ids}, EMPTY).first_equal_rows() == (0, 1, 0, 1)
    ids[3, 0] = 9  # padding for one mask, a token for the other
    assert read_inputs({"input_ids": ids, "attention_mask": mask}, EMPTY).first_equal_rows() == (0, 1, 0, 1)
    assert read_inputs({"input_ids": ids}, EMPTY).first_equal_rows() == (0, 1, 0, 3)
