"""generate() on a cache that is spread over ranks: the tokens and the logits of one process."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from tests.harness.compare import assert_within_rule
from tests.harness.ranks import RankPool
from tests.hf.architectures import ROTARIES
from tests.hf.generate_cases import DECODERS, GENERATION_CASES, generate_in_one_process, generate_on_ranks

ALL = list(GENERATION_CASES)
ASKING = [
    "MistralForCausalLM",
    "Gemma2ForCausalLM",
    "GptOssForCausalLM",
    "Llama4ForCausalLM",
    "DeepseekV3ForCausalLM",
    "dynamic",
]


@lru_cache
def expected(name: str, case: str) -> tuple[list[Tensor], list[Tensor]]:
    """What one process gives in fp32, and in float64."""
    plain, exact = (generate_in_one_process(name, case, dtype) for dtype in (torch.float32, torch.float64))
    for a, b in zip(plain, exact, strict=True):
        if not a.is_floating_point():
            assert torch.equal(a, b)  # no two logits are so close that rounding decides
    return plain, exact


def check(pool: RankPool, world_size: int, name: str, cases: list[str], shard_from: int, layout: str) -> None:
    results = pool.run(generate_on_ranks, world_size, name, cases, shard_from, layout)
    for number, case in enumerate(cases):
        plain, exact = expected(name, case)
        for rank, found in enumerate(results):
            assert len(found[number]) == len(plain), f"{case}: {len(found[number])} results"
            for i, x in enumerate(found[number]):
                label = f"{name} {case}, result {i} of rank {rank}"
                assert torch.equal(x, results[0][number][i]), f"{label}: not that of rank 0 to the bit"
                if x.is_floating_point():
                    assert_within_rule(x, exact[i].double(), plain[i], name=label)
                else:
                    assert torch.equal(x, plain[i]), f"{label}: {x.tolist()}, expected {plain[i].tolist()}"


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [(1, ["left_padding", "conversation"]), (2, ALL), (3, ["left_padding", "sampling", "beams", "assisted"])],
    ids=["1", "2", "3"],
)
def test_every_generation_case(pool: RankPool, world_size: int, cases: list[str]) -> None:
    check(pool, world_size, "LlamaForCausalLM", cases, 5, "zigzag")


@pytest.mark.parametrize("name", ASKING)
def test_attention_features(pool: RankPool, name: str) -> None:
    check(pool, 2, name, ["padded_conversation", "in_chunks"], 5, "zigzag")


# Below `shard_from` new tokens every rank computes all of them: from 1 on never, from 1,000 on always, from 8 on both.
@pytest.mark.long
@pytest.mark.parametrize(
    ("world_size", "shard_from", "layout"),
    [
        (1, 8, "contiguous"),
        (2, 1, "striped"),
        (2, 8, "contiguous"),
        (3, 8, "zigzag"),
        (3, 1000, "contiguous"),
        (4, 1, "striped"),
        (4, 1000, "zigzag"),
    ],
)
@pytest.mark.parametrize("name", [*DECODERS, "dynamic"])
def test_every_model(pool: RankPool, world_size: int, name: str, shard_from: int, layout: str) -> None:
    cases = [case for case in ALL if case != "assisted" or name == "LlamaForCausalLM"]
    # Each case by itself where, in one process too, a model remembers the longest sequence of those before.
    for part in [[case] for case in cases] if name in ROTARIES else [cases]:
        check(pool, world_size, name, part, shard_from, layout)
