"""Hugging Face models on a mesh: losses, gradient norms and weights of one process; what is not for them is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import ringattn.hf as rhf
from ringattn.parallel.grad_norm import clip_gradients
from ringattn.parallel.mesh import context_mesh, data_parallel_rank
from ringattn.parallel.parallelize_hf_model import parallelize_hf
from ringattn.parallel.vocab_parallel_loss import sum_over_token_ranks
from tests.harness.ranks import RankPool
from tests.hf.exact import Exact
from tests.parallel.test_parallelize import compare
from tests.parallel.training import IGNORED, LEARNING_RATE, MAX_NORM, Trained, batches, mesh_of, whole

VOCABULARY, LENGTH, STEPS = 36, 32, 3
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
Sizes = tuple[tuple[str, int], ...]


def make_model(name: str) -> PreTrainedModel:
    """The same weights everywhere. Norms of heads, and a tied head, are Qwen's."""
    torch.manual_seed(0)
    model: PreTrainedModel
    if name == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True))
    elif name == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    return model.double()


def train_alone(name: str) -> Trained:
    model = make_model(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses, norms = [], []
    for batch in batches("causal", LENGTH, VOCABULARY, STEPS):
        with Exact():
            loss = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return Trained(losses, norms, {name: p.detach() for name, p in model.named_parameters()})


def train_together(group: dist.ProcessGroup, name: str, sizes: Sizes, zero: int) -> Trained:
    mesh = mesh_of(sizes)
    model = parallelize_hf(make_model(name), mesh, zero=zero)
    handle = rhf.patch(model, context_mesh(mesh))
    place, count = data_parallel_rank(mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, foreach=False)
    losses, norms = [], []
    for batch in batches("causal", LENGTH, VOCABULARY, STEPS):
        mine = {name: batch[name].chunk(count)[place] for name in ("input_ids", "labels")}
        items = (batch["labels"][:, 1:] != IGNORED).sum()  # of all ranks' sequences
        with Exact():
            loss = model(**handle.shard({**mine, "num_items_in_batch": items})).loss
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        norms.append(float(clip_gradients(model.parameters(), mesh, MAX_NORM)))
        optimizer.step()
        losses.append(float(sum_over_token_ranks(loss, mesh)))
    return Trained(losses, norms, {name: whole(p) for name, p in model.named_parameters()})


@pytest.mark.parametrize(
    ("name", "sizes", "zero"),
    [
        ("qwen3", (("ring", 2), ("tp", 2)), 3),
        pytest.param("llama", (("tp", 4),), 3, marks=pytest.mark.long),
        pytest.param("llama", (("dp_shard", 2), ("ulysses", 2)), 2, marks=pytest.mark.long),
        pytest.param("llama", (("dp_replicate", 2), ("tp", 2)), 0, marks=pytest.mark.long),
        pytest.param("qwen3", (("tp", 4),), 3, marks=pytest.mark.long),
    ],
)
def test_a_model_trains_as_in_one_process(pool: RankPool, name: str, sizes: Sizes, zero: int) -> None:
    expected = train_alone(name)
    for rank, trained in enumerate(pool.run(train_together, 4, name, sizes, zero)):
        compare(trained, expected, f"rank {rank}")


def _refused(group: dist.ProcessGroup, name: str, sizes: Sizes, zero: int) -> None:
    parallelize_hf(make_model(name), mesh_of(sizes), zero=zero)


@pytest.mark.parametrize(
    ("name", "sizes", "zero", "told"),
    [
        ("llama", (("pp", 2), ("tp", 2)), 3, "pp=2: Hugging Face models are not spread over pp here"),
        ("llama", (("ring", 4), ("ep", 2)), 3, "ep=2: Hugging Face models are not spread over ep here"),
        ("mixtral", (("ring", 2), ("tp", 2)), 3, "the plan of MixtralForCausalLM has styles that are not for dense"),
        ("llama", (("ring", 4),), 1, "zero=1: must be 0, 2 or 3"),
    ],
)
def test_what_is_not_for_them_is_refused(pool: RankPool, name: str, sizes: Sizes, zero: int, told: str) -> None:
    for error in pool.expect_error(_refused, 4, name, sizes, zero):
        assert "ArgumentError" in error.mro_names
        assert told in error.message
