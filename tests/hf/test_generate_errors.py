"""What a RingCache refuses: on every rank, and in words that help."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ringattn.hf as rhf
from ringattn.errors import ArgumentError, DisagreementError
from ringattn.hf import RingCache
from ringattn.hf.generation_inputs import PastTokens, read_inputs
from tests.harness.ranks import RankPool
from tests.hf.generating import build, padded, prompts

EMPTY = PastTokens(0, ())
HELD = PastTokens(7, (2, 0))
IDS = prompts(2, 5)


@pytest.mark.parametrize(
    ("arguments", "past", "told"),
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
def test_arguments(arguments: dict[str, Any], past: PastTokens, told: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        read_inputs({"input_ids": IDS} | arguments, past)
    assert told in str(raised.value)


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


def other_seeds(model: Any, cache: RingCache, rank: int) -> None:
    torch.manual_seed(rank)
    model.generate(prompts(2, 9), past_key_values=cache, do_sample=True, max_new_tokens=9)


def other_prompts(model: Any, cache: RingCache, rank: int) -> None:
    model.generate(prompts(2, 9, rank), past_key_values=cache)


def other_short_prompts(model: Any, cache: RingCache, rank: int) -> None:
    model.generate(prompts(2, 3, rank), past_key_values=cache)


def another_model(model: Any, cache: RingCache, rank: int) -> None:
    other = build("LlamaForCausalLM")
    with rhf.patch(other, cache.handle.group):
        other.generate(prompts(1, 9), past_key_values=cache)


def unpatched(model: Any, cache: RingCache, rank: int) -> None:
    cache.handle.unpatch()
    model.generate(prompts(1, 9), past_key_values=cache)


def a_part_of_the_model(model: Any, cache: RingCache, rank: int) -> None:
    model.model(prompts(1, 9), past_key_values=cache)


def gradients(model: Any, cache: RingCache, rank: int) -> None:
    model(prompts(1, 9), past_key_values=cache)


def hidden_states(model: Any, cache: RingCache, rank: int) -> None:
    model.generate(prompts(1, 9), past_key_values=cache, output_hidden_states=True, return_dict_in_generate=True)


def static(model: Any, cache: RingCache, rank: int) -> None:
    model.generate(prompts(1, 9), past_key_values=cache, cache_implementation="static")


def no_cache(model: Any, cache: RingCache, rank: int) -> None:
    model.generate(prompts(1, 9), past_key_values=cache, use_cache=False)


def crop_too_much(model: Any, cache: RingCache, rank: int) -> None:
    cache.crop(-1)


def save_nothing(model: Any, cache: RingCache, rank: int) -> None:
    cache.save("nowhere")


def a_state(model: Any, cache: RingCache, rank: int) -> None:
    cache.update_conv_state(torch.ones(1), 0)


def no_pages(model: Any, cache: RingCache, rank: int) -> None:
    RingCache(cache.handle, num_pages=0)


CASES: dict[Callable[..., None], tuple[str, str]] = {
    other_seeds: ("DisagreementError", "torch.manual_seed"),
    other_prompts: ("DisagreementError", "the same ids"),
    other_short_prompts: ("DisagreementError", "the same ids"),
    another_model: ("ArgumentError", "handle of another model"),
    unpatched: ("ArgumentError", "while that is patched"),
    a_part_of_the_model: ("ArgumentError", "called as a whole"),
    gradients: ("ArgumentError", "torch.no_grad()"),
    hidden_states: ("ArgumentError", "output_hidden_states"),
    static: ("ValueError", "cache_implementation"),
    no_cache: ("ArgumentError", "use_cache=False"),
    crop_too_much: ("ArgumentError", "only 0 columns"),
    save_nothing: ("ArgumentError", "the cache is empty"),
    a_state: ("ArgumentError", "a state besides keys and values"),
    no_pages: ("ArgumentError", "num_pages=0"),
}  # fmt: skip


def refuse(group: dist.ProcessGroup) -> list[tuple[str, str, int]]:
    """What every case raises here, and how much of it stays in the cache; the ranks go on together after each."""
    told = []
    for case in CASES:
        model = build("LlamaForCausalLM", num_hidden_layers=1)
        with rhf.patch(model, group) as handle:
            cache = RingCache(handle, num_pages=20, page_size=4, shard_from=5)
            try:
                case(model, cache, group.rank())
            except Exception as error:
                told.append((type(error).__name__, str(error), cache.get_seq_length()))
            else:
                told.append(("nothing", "", 0))
    return told


def test_what_is_refused(pool: RankPool) -> None:
    for told in pool.run(refuse, 2):
        for case, (kind, words), found in zip(CASES, CASES.values(), told, strict=True):
            assert found[0] == kind, (case.__name__, found)
            assert words in found[1], (case.__name__, found)
            assert found[2] == 0 or case is other_seeds, (case.__name__, found)


def a_second_try(group: dist.ProcessGroup) -> bool:
    """After a disagreement, and a reset, ranks that agree go on."""
    model = build("LlamaForCausalLM", num_hidden_layers=1)
    with rhf.patch(model, group) as handle:
        cache = RingCache(handle, num_pages=20, page_size=4, shard_from=5)
        with pytest.raises(DisagreementError):
            other_seeds(model, cache, group.rank())
        cache.reset()
        torch.manual_seed(0)
        found = model.generate(prompts(2, 9), past_key_values=cache, do_sample=True, max_new_tokens=9)
        return tuple(found.shape) == (2, 18)


def test_ranks_that_agree_again(pool: RankPool) -> None:
    assert all(pool.run(a_second_try, 2))


def an_encoder(group: dist.ProcessGroup) -> None:
    import transformers

    config = transformers.BartConfig(
        vocab_size=37, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=32,
    )  # fmt: skip
    with rhf.patch(transformers.BartForConditionalGeneration(config), group) as handle:
        RingCache(handle, num_pages=4)


def test_a_model_with_an_encoder(pool: RankPool) -> None:
    for error in pool.expect_error(an_encoder, 1):
        assert error.type_name == "ArgumentError"
        assert "BartForConditionalGeneration: has an encoder" in error.message
