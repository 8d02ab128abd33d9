"""Errors of a RingCache: raised on every rank, with what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ringattn.hf as rhf
from ringattn.errors import DisagreementError
from ringattn.hf import RingCache
from tests.harness.ranks import RankPool
from tests.hf.generate_cases import build, prompts


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
    """Returns the error of every case, and how many columns stay in the cache; the ranks stay in step after each."""
    raised = []
    for case in CASES:
        model = build("LlamaForCausalLM", num_hidden_layers=1)
        with rhf.patch(model, group) as handle:
            cache = RingCache(handle, num_pages=20, page_size=4, shard_from=5)
            try:
                case(model, cache, group.rank())
            except Exception as error:
                raised.append((type(error).__name__, str(error), cache.get_seq_length()))
            else:
                raised.append(("nothing", "", 0))
    return raised


def test_what_is_refused(pool: RankPool) -> None:
    for raised in pool.run(refuse, 2):
        for case, (error_type, message), found in zip(CASES, CASES.values(), raised, strict=True):
            assert found[0] == error_type, (case.__name__, found)
            assert message in found[1], (case.__name__, found)
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
