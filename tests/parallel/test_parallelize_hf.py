"""Hugging Face models on a mesh match one process: losses, gradient norms, weights; unsupported axes raise."""

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
from ringattn.parallel import all_reduce_loss, clip_gradients, context_mesh, data_parallel_rank, parallelize_hf
from tests.harness.ranks import RankPool
from tests.hf.exact import Exact
from tests.parallel.test_parallelize import compare
from tests.parallel.training import IGNORED, LEARNING_RATE, MAX_NORM, TrainingRun, batches, full_tensor, mesh_of

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
    """Returns a model with the same weights on every rank. Qwen has query/key norms and a tied head."""
    torch.manual_seed(0)
    model: PreTrainedModel
    if name == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True))
    elif name == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    return model.double()


def train_single_process(name: str) -> TrainingRun:
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
    return TrainingRun(losses, norms, {name: p.detach() for name, p in model.named_parameters()})


def train_on_mesh(group: dist.ProcessGroup, name: str, sizes: Sizes, zero: int) -> TrainingRun:
    mesh = mesh_of(sizes)
    model = parallelize_hf(make_model(name), mesh, zero=zero)
    handle = rhf.patch(model, context_mesh(mesh))
    dp_rank, dp_size = data_parallel_rank(mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, foreach=False)
    losses, norms = [], []
    for batch in batches("causal", LENGTH, VOCABULARY, STEPS):
        local = {name: batch[name].chunk(dp_size)[dp_rank] for name in ("input_ids", "labels")}
        items = (batch["labels"][:, 1:] != IGNORED).sum()  # on all ranks
        with Exact():
            loss = model(**handle.shard({**local, "num_items_in_batch": items})).loss
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        norms.append(float(clip_gradients(model.parameters(), mesh, MAX_NORM)))
        optimizer.step()
        losses.append(float(all_reduce_loss(loss, mesh)))
    return TrainingRun(losses, norms, {name: full_tensor(p) for name, p in model.named_parameters()})


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
def test_matches_single_process(pool: RankPool, name: str, sizes: Sizes, zero: int) -> None:
    expected = train_single_process(name)
    for rank, trained in enumerate(pool.run(train_on_mesh, 4, name, sizes, zero)):
        compare(trained, expected, f"rank {rank}")


def _refused(group: dist.ProcessGroup, name: str, sizes: Sizes, zero: int) -> None:
    parallelize_hf(make_model(name), mesh_of(sizes), zero=zero)


@pytest.mark.parametrize(
    ("name", "sizes", "zero", "message"),
    [
        ("llama", (("pp", 2), ("tp", 2)), 3, "pp=2: pp is not supported for Hugging Face models"),
        ("llama", (("ring", 4), ("ep", 2)), 3, "ep=2: ep is not supported for Hugging Face models"),
        ("mixtral", (("ring", 2), ("tp", 2)), 3, "the plan of MixtralForCausalLM has styles that are not for dense"),
        ("llama", (("ring", 4),), 1, "zero=1: must be 0, 2 or 3"),
    ],
)
def test_unsupported_configs_raise(pool: RankPool, name: str, sizes: Sizes, zero: int, message: str) -> None:
    for error in pool.expect_error(_refused, 4, name, sizes, zero):
        assert "ArgumentError" in error.mro_names
        assert message in error.message
