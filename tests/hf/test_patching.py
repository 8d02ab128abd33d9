"""patch changes one model, until it is undone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import ringattn.hf as rhf
from ringattn.errors import ArgumentError
from tests.harness.compare import assert_close
from tests.harness.ranks import RankPool
from tests.hf.architectures import architecture
from tests.hf.comparison import PLAIN, gradients, one_process, sharded
from tests.hf.exact import Exact


def _logits(handle: rhf.Handle, batch: dict[str, Tensor]) -> Tensor:
    local_batch = handle.shard(batch)
    with Exact():
        return handle.unshard(handle.model(**local_batch).logits, local_batch)


def _again_with_another_layout(group: dist.ProcessGroup) -> None:
    model = architecture("Gemma2ForCausalLM").build()
    implementation = model.config._attn_implementation
    logits, _, grads = one_process(model, PLAIN.batch())
    for layout in ("zigzag", "striped"):
        handle = rhf.patch(model, group, layout=layout)
        assert model.config._attn_implementation == "ringattn"
        ours = sharded(model, handle, PLAIN.batch(), group)
        assert_close(ours[0], logits, atol=1e-10, name="logits")
        for name, grad in ours[2].items():
            assert_close(grad, grads[name], atol=1e-10, name=name)
        handle.unpatch()
        handle.unpatch()
        assert model.config._attn_implementation == implementation
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert torch.equal(one_process(model, PLAIN.batch())[0], logits)


def test_again_with_another_layout(pool: RankPool) -> None:
    pool.run(_again_with_another_layout, 2)


def _two_models(group: dist.ProcessGroup) -> None:
    """One over all ranks, one over each half, one that is not patched; all of one config, and at work at once."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    half = halves[dist.get_rank() // 2]
    try:
        first = architecture("LlamaForCausalLM").build()
        second, third = (type(first)(first.config).double() for _ in range(2))
        for other in (second, third):
            other.load_state_dict(first.state_dict())
        assert second.config is first.config
        batch = PLAIN.batch()
        ours = {"input_ids": batch["input_ids"] + dist.get_rank() // 2, "labels": batch["labels"]}
        whole, part = one_process(third, batch), one_process(third, ours)
        with rhf.patch(first, group, layout="striped") as a, rhf.patch(second, half, exchange="gather") as b:
            logits = _logits(a, batch), _logits(b, ours)
            assert torch.equal(one_process(third, batch)[0], whole[0])
            for found, expected in zip(logits, (whole[0], part[0]), strict=True):
                assert_close(found.detach(), expected, atol=1e-10, name="logits")
            grads = sharded(first, a, batch, group)[2], sharded(second, b, ours, half)[2]
        for summed, expected_grads in zip(grads, (whole[2], part[2]), strict=True):
            for name, grad in summed.items():
                assert_close(grad, expected_grads[name], atol=1e-10, name=name)
    finally:
        dist.destroy_process_group(half)


def test_two_models_with_different_groups(pool: RankPool) -> None:
    pool.run(_two_models, 4)


def _tower(group: dist.ProcessGroup) -> None:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=36))
    model = model.double()
    pixels = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    batch = {"input_ids": PLAIN.batch()["input_ids"] % 36}
    with Exact():
        plain, logits = model.model.vision_tower(pixels).last_hidden_state, model(**batch).logits
    with rhf.patch(model, group) as handle:
        with Exact():
            assert torch.equal(model.model.vision_tower(pixels).last_hidden_state, plain)
        assert model.model.vision_tower.config._attn_implementation != "ringattn"
        assert model.model.language_model.config._attn_implementation == "ringattn"
        assert_close(_logits(handle, batch), logits, atol=1e-10, name="logits")


def test_a_vision_tower_keeps_its_attention(pool: RankPool) -> None:
    pool.run(_tower, 2)


def _by_name(group: dist.ProcessGroup) -> None:
    config = architecture("LlamaForCausalLM").build().config
    assert isinstance(config, LlamaConfig)
    config._attn_implementation = "ringattn"
    model = LlamaForCausalLM(config).double()
    assert model.config._attn_implementation == "ringattn"
    batch = PLAIN.batch()
    with pytest.raises(ArgumentError, match="call the model with what handle"):
        model(**batch)
    with rhf.patch(model, group) as handle:
        logits = _logits(handle, batch)
    model.set_attn_implementation("sdpa")
    with Exact():
        assert_close(logits, model(**batch).logits, atol=1e-10, name="logits")


def test_the_attention_implementation_by_name(pool: RankPool) -> None:
    pool.run(_by_name, 2)


def _checkpointed(group: dist.ProcessGroup, reentrant: bool) -> None:
    """Layers recomputed in backward get the context of their own batch, although another was sharded since."""
    model = architecture("GptOssForCausalLM").build()
    with rhf.patch(model, group) as handle:
        local_batch = handle.shard(PLAIN.batch())
        model(**local_batch).loss.backward()
        grads = gradients(model)
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss = model(**local_batch).loss
        handle.shard({"input_ids": torch.ones(1, 5, dtype=torch.long)})
        loss.backward()
    again = gradients(model)
    assert grads.keys() == again.keys()
    assert all(torch.equal(again[name], grad) for name, grad in grads.items())


def test_gradient_checkpointing(pool: RankPool) -> None:
    pool.run(_checkpointed, 2, False)


def test_gradient_checkpointing_by_reentering(pool: RankPool) -> None:
    pool.run(_checkpointed, 2, True)
