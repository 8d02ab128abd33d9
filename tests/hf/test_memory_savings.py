"""Tiled MLPs and chunked losses in transformers models: the same numbers, and a complete undo."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

import ringattn.hf as rhf
from ringattn.errors import ArgumentError
from ringattn.hf.memory_savings import MemorySavings
from tests.harness.compare import assert_close
from tests.harness.ranks import RankPool
from tests.hf.architectures import architecture
from tests.hf.comparison import UNEVEN_LABELS, one_process, sharded
from tests.hf.exact import Exact
from tests.hf.training import VOCABULARY

ATOL = 1e-10
# Logits with a softcap, and a gated MLP; an MLP of Conv1D; a masked loss, and a head with a bias.
MODELS = ("Gemma2ForCausalLM", "GPT2LMHeadModel", "ModernBertForMaskedLM", "Qwen2ForCausalLM")


def build(name: str) -> PreTrainedModel:
    model = architecture(name).build()
    if name.startswith("Gemma2"):
        model.config.final_logit_softcapping = 0.5
    return model


def loss_and_gradients(model: PreTrainedModel, **batch: Tensor) -> dict[str, Tensor]:
    with Exact():
        loss = model(**batch, use_cache=False).loss
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss * 1.5, list(named.values()), allow_unused=True)
    given = {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}
    return {"loss": loss.detach(), **given}


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_model(name: str) -> None:
    model = build(name)
    batch = UNEVEN_LABELS.batch()
    forwards = {module: dict(vars(module)) for module in model.modules()}
    expected = loss_and_gradients(model, **batch)
    savings = MemorySavings(model, tile_mlp=3, chunk_loss=5)
    savings.apply()
    found = loss_and_gradients(model, **batch)
    output = model(**batch)
    assert "logits" not in output
    assert isinstance(output.loss, Tensor)
    assert len(model(**batch, return_dict=False)) == len(output)
    assert model(input_ids=batch["input_ids"]).logits.shape == (2, 13, VOCABULARY)
    savings.undo()
    savings.undo()
    assert found.keys() == expected.keys()
    for key in expected:
        assert_close(found[key], expected[key], atol=ATOL, name=key)
    for module, attributes in forwards.items():
        assert vars(module).keys() == attributes.keys()
    assert "logits" in model(**batch)


def test_scaled_logits_and_num_items() -> None:
    """Granite divides its logits; Trainer gives the number of labels of all batches."""
    model = build("Qwen2ForCausalLM")
    batch = UNEVEN_LABELS.batch()
    head = model.lm_head.forward
    model.lm_head.register_forward_hook(lambda module, args, out: out / 4)
    expected = loss_and_gradients(model, **batch, num_items_in_batch=torch.tensor(11))
    savings = MemorySavings(model, chunk_loss=4)
    savings.apply()
    found = loss_and_gradients(model, **batch, num_items_in_batch=torch.tensor(11))
    savings.undo()
    assert model.lm_head.forward == head
    for key in expected:
        assert_close(found[key], expected[key], atol=ATOL, name=key)


def patched(group: dist.ProcessGroup, name: str) -> None:
    model = build(name)
    batch = UNEVEN_LABELS.batch()
    _, loss, gradients = one_process(model, batch)
    with rhf.patch(model, group, tile_mlp=2, chunk_loss=3) as handle, Exact():
        local_batch = handle.shard(batch)
        ours = model(**local_batch).loss
    torch.autograd.backward(ours)
    assert_close(handle.reduce(ours), loss, atol=ATOL, name="loss")
    for key, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient, group=group)
        assert_close(gradient, gradients.get(key, torch.zeros_like(gradient)), atol=ATOL, name=key)
    model.zero_grad(set_to_none=True)
    with rhf.patch(model, group) as handle:
        assert sharded(model, handle, batch, group)[0].shape == (2, 13, VOCABULARY)


def test_patch(pool: RankPool) -> None:
    pool.run(patched, 2, "Gemma2ForCausalLM")


class ClampLogits(nn.Module):
    """A hook on the output head that clamps the logits."""

    def forward(self, module: nn.Module, args: object, out: Tensor) -> Tensor:
        return out.clamp(-1, 1)


def test_errors() -> None:
    with pytest.raises(ArgumentError, match="GptOssForCausalLM has no MLP made of linear layers alone"):
        MemorySavings(build("GptOssForCausalLM"), tile_mlp=2)
    model = build("Qwen2ForCausalLM")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ArgumentError, match="output head of Qwen2ForCausalLM is Sequential"):
        MemorySavings(model, chunk_loss=2)
    model = build("Qwen2ForCausalLM")
    model.lm_head.register_forward_hook(ClampLogits())
    savings = MemorySavings(model, chunk_loss=2)
    savings.apply()
    with pytest.raises(ArgumentError, match="asks its logits for clamp"):
        model(**UNEVEN_LABELS.batch())
    savings.undo()
    model.loss_function = lambda *args, **kwargs: None
    with pytest.raises(ArgumentError, match="does not take its loss"):
        MemorySavings(model, chunk_loss=2)
