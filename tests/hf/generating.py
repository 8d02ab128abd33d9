"""What is generated: tiny models, and ways to generate that are the same for one process and for many ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import ringattn.hf as rhf
from ringattn.hf import RingCache

_SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
PAGE_SIZE = 4
NEW = 6


@dataclass(frozen=True)
class Model:
    """A tiny random model, by its class's prefix, and what is special to it."""

    prefix: str
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, dtype: torch.dtype, *, layers: int = 2) -> Any:
        """Returns the model with weights that depend on nothing but this entry."""
        config = getattr(transformers, f"{self.prefix}Config")(
            **(_SIZES | self.options | {"num_hidden_layers": layers})
        )
        config._experts_implementation = "eager"  # that of transformers' choice knows no float64
        torch.manual_seed(0)
        model = getattr(transformers, f"{self.prefix}ForCausalLM")(config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                # Larger than at the start of a training, so that attention is far from uniform.
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return model.to(dtype).eval()


_ALTERNATING = ["sliding_attention", "full_attention"]
MODELS: dict[str, Model] = {
    "llama": Model("Llama"),
    "mistral": Model("Mistral", {"sliding_window": 5}),
    "gemma2": Model("Gemma2", {"sliding_window": 6, "attn_logit_softcapping": 3.0, "layer_types": _ALTERNATING}),
    "gpt_oss": Model(
        "GptOss",
        {"sliding_window": 6, "layer_types": _ALTERNATING, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "qwen3": Model("Qwen3"),
    # Rotary embeddings that depend on the longest position of a forward pass.
    "dynamic": Model(
        "Llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        },
    ),
}


def _dense(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as it is defined, in the dtype of its inputs; transformers' own is not exact in float64."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~attention_mask, -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1).nan_to_num(nan=0.0)[..., : k.shape[2]]  # padding sees nothing
    return (weights @ v).transpose(1, 2), None


def _dense_mask(**arguments: Any) -> Tensor:
    mask = sdpa_mask(**arguments | {"allow_is_causal_skip": False})
    assert mask is not None
    return mask


def _prepare_oracle() -> None:
    AttentionInterface.register("dense", _dense)
    AttentionMaskInterface.register("dense", _dense_mask)


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
    draft = MODELS["llama"].build(model.dtype)
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


WAYS: dict[str, Callable[[Any, Cache], list[Tensor]]] = {
    way.__name__: way
    for way in (
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


def alone(name: str, way: str, dtype: torch.dtype) -> list[Tensor]:
    """What one process gives, with transformers' own cache and attention."""
    model = MODELS[name].build(dtype)
    _prepare_oracle()
    model.set_attn_implementation("dense" if dtype is torch.float64 else "eager")
    return WAYS[way](model, DynamicCache(config=model.config))


def together(group: dist.ProcessGroup, name: str, ways: list[str], shard_from: int, layout: str) -> list[list[Tensor]]:
    """What the ranks of a group give, for each way, with a cache for all of them."""
    model = MODELS[name].build(torch.float32)
    found = []
    with rhf.patch(model, group, layout=layout) as handle:
        cache = RingCache(handle, num_pages=120, page_size=PAGE_SIZE, shard_from=shard_from)
        for way in ways:
            found.append(WAYS[way](model, cache))
            cache.reset()
    return found
