"""A patched model in one process without torch.distributed gives what the plain model gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import ringattn.hf as rhf


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not dist.is_initialized()


def llama() -> tuple[Any, Any]:
    """Returns two equal models."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.eval()
    return model, copy.deepcopy(model)


def test_training() -> None:
    model, plain = llama()
    ids = torch.randint(64, (2, 17))
    with rhf.patch(model, layout="zigzag") as handle:
        batch = handle.shard({"input_ids": ids, "labels": ids})
        logits = model(**batch).logits
        loss = handle.loss(logits, batch)
        torch.autograd.backward(loss)
        expected = plain(input_ids=ids, labels=ids)
        expected.loss.backward()
        assert_close([handle.unshard(logits, batch), handle.reduce(loss)], [expected.logits, expected.loss.detach()])
        for own, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert_close(own.grad, other.grad)


def test_generating() -> None:
    model, plain = llama()
    prompt = torch.randint(64, (1, 70))
    expected = plain.generate(prompt, max_new_tokens=6, do_sample=False)
    with rhf.patch(model) as handle:
        cache = rhf.RingCache(handle, num_pages=32, page_size=4)
        assert torch.equal(model.generate(prompt, past_key_values=cache, max_new_tokens=6, do_sample=False), expected)
