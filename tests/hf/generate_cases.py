"""Tiny models, and cases of generation that run in one process and over ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Cache, DynamicCache

import ringattn.hf as rhf
from ringattn.hf import RingCache
from tests.hf.architectures import ARCHITECTURES, architecture
from tests.hf.exact import Exact

PAGE_SIZE = 4
NEW = 6

DECODERS = [entry.model for entry in ARCHITECTURES if entry.model.endswith(("ForCausalLM", "LMHeadModel"))]


def build(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A tiny model that does not end by itself."""
    entry = architecture(name)
    model = replace(entry, options=entry.options | options).build(dtype)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    return model


def prompts(rows: int, width: int, seed: int = 5) -> Tensor:
    """Ids of prompts, none of them padding."""
    return torch.randint(3, 37, (rows, width), generator=torch.Generator().manual_seed(seed))


def padded(lengths: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Prompts of these lengths with padding on the left, and their mask."""
    real = torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]
    return prompts(len(lengths), width).where(real, 0), real.long()


def _generate(model: Any, cache: Cache, ids: Tensor | None, **options: Any) -> list[Tensor]:
    """Returns the sequences, and the logits of each step."""
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    if ids is not None:
        options.setdefault("attention_mask", torch.ones_like(ids))
    torch.manual_seed(11)
    found = model.generate(ids, past_key_values=cache, output_logits=True, return_dict_in_generate=True, **options)
    assert found.past_key_values is cache
    return [found.sequences, *found.logits]


def greedy(model: Any, cache: Cache) -> list[Tensor]:
    return _generate(model, cache, prompts(2, 17))


def left_padding(model: Any, cache: Cache) -> list[Tensor]:
    ids, mask = padded([13, 4, 1, 13], 13)
    ids[3] = ids[0]  # the same row again, which is computed once
    return _generate(model, cache, ids, attention_mask=mask)


def ends_early(model: Any, cache: Cache) -> list[Tensor]:
    """One row ends before the other, and is filled up with padding."""
    ids = prompts(2, 9)
    second = _generate(model, copy.deepcopy(cache), ids)[0][0, 10]
    return _generate(model, cache, ids, eos_token_id=int(second), pad_token_id=0)


def sampling(model: Any, cache: Cache) -> list[Tensor]:
    ids, mask = padded([11, 6], 11)
    return _generate(model, cache, ids, attention_mask=mask, do_sample=True, num_return_sequences=2, top_k=20)


def beams(model: Any, cache: Cache) -> list[Tensor]:
    ids, mask = padded([11, 6], 11)
    return _generate(model, cache, ids, attention_mask=mask, num_beams=3, num_return_sequences=2)


def assisted(model: Any, cache: Cache) -> list[Tensor]:
    """The draft agrees now and then: it is the model itself, a little off."""
    draft = build("LlamaForCausalLM", model.dtype)
    draft.generation_config.num_assistant_tokens = 4
    draft.generation_config.assistant_confidence_threshold = 0.0
    with torch.no_grad():
        for mine, its in zip(model.parameters(), draft.parameters(), strict=True):
            its.copy_(mine).mul_(1.02)
        draft.lm_head.weight[:9] *= 0.9
    return _generate(model, cache, prompts(1, 15), assistant_model=draft, max_new_tokens=12)


def prompt_lookup(model: Any, cache: Cache) -> list[Tensor]:
    ids = prompts(1, 6).repeat(1, 3)
    return _generate(model, cache, ids, prompt_lookup_num_tokens=3, max_new_tokens=9)


def conversation(model: Any, cache: Cache) -> list[Tensor]:
    """Three turns: a long question, a short one, and a long one again."""
    first = _generate(model, cache, prompts(1, 12))
    second = _generate(model, cache, torch.cat([first[0], prompts(1, 2, 6)], 1))
    third = _generate(model, cache, torch.cat([second[0], prompts(1, 9, 7)], 1))
    return [third[0], *first[1:], *second[1:], *third[1:]]


def first_turn(model: Any, cache: Cache) -> list[Tensor]:
    ids, mask = padded([11, 6], 11)
    return _generate(model, cache, ids, attention_mask=mask)


def second_turn(model: Any, cache: Cache, first: Tensor) -> list[Tensor]:
    ids, (_, mask) = torch.cat([first, prompts(2, 9, 7)], 1), padded([11, 6], 11)
    mask = torch.cat([mask, torch.ones(2, ids.shape[1] - mask.shape[1], dtype=torch.long)], 1)
    return _generate(model, cache, ids, attention_mask=mask)


def padded_conversation(model: Any, cache: Cache) -> list[Tensor]:
    first = first_turn(model, cache)
    second = second_turn(model, cache, first[0])
    return [second[0], *first[1:], *second[1:]]


def in_chunks(model: Any, cache: Cache) -> list[Tensor]:
    ids, mask = padded([17, 3], 17)
    return _generate(model, cache, ids, attention_mask=mask, prefill_chunk_size=7)


def embeddings(model: Any, cache: Cache) -> list[Tensor]:
    return _generate(model, cache, None, inputs_embeds=model.get_input_embeddings()(prompts(2, 11)).detach())


def one_token(model: Any, cache: Cache) -> list[Tensor]:
    return _generate(model, cache, prompts(1, 1))


def common_prefix(model: Any, cache: Cache) -> list[Tensor]:
    """Two questions about the same text, which is computed once."""
    text = prompts(1, 13)
    with torch.no_grad():
        found = [model(text, past_key_values=cache, use_cache=True).logits]
    for seed in (1, 2):
        ids = torch.cat([text, prompts(1, 3, seed)], 1)
        found += _generate(model, copy.deepcopy(cache), ids)
    return found


GENERATION_CASES: dict[str, Callable[[Any, Cache], list[Tensor]]] = {
    case.__name__: case
    for case in (
        greedy,
        left_padding,
        ends_early,
        sampling,
        beams,
        assisted,
        prompt_lookup,
        conversation,
        padded_conversation,
        in_chunks,
        embeddings,
        one_token,
        common_prefix,
    )
}  # fmt: skip


def generate_in_one_process(name: str, case: str, dtype: torch.dtype) -> list[Tensor]:
    """Returns the results of one process, with transformers' cache and attention; float64 throughout if dtype is."""
    model = build(name, dtype)
    model.set_attn_implementation("eager")
    with Exact() if dtype is torch.float64 else nullcontext():
        return GENERATION_CASES[case](model, DynamicCache(config=model.config))


def generate_on_ranks(
    group: dist.ProcessGroup, name: str, cases: list[str], shard_from: int, layout: str
) -> list[list[Tensor]]:
    """Returns the results of each case over the ranks of a group; all cases use one cache."""
    model = build(name)
    found = []
    with rhf.patch(model, group, layout=layout) as handle:
        cache = RingCache(handle, num_pages=120, page_size=PAGE_SIZE, shard_from=shard_from)
        for case in cases:
            found.append(GENERATION_CASES[case](model, cache))
            cache.reset()
    return found
