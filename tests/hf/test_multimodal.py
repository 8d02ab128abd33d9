"""Models with images: logits, loss and gradients, the vision tower's too, are the same as in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, CLIPConfig, CLIPModel

import ringattn.hf as rhf
from tests.harness.compare import assert_close
from tests.harness.ranks import RankPool
from tests.hf.architectures import architecture
from tests.hf.comparison import PLAIN, SIZES, BatchSpec, gradients, one_process, sharded
from tests.hf.exact import Exact
from tests.hf.multimodal_models import CLIP, GEMMA, MULTIMODAL_MODELS, TEXT, multimodal_model

# Their images lie behind the padding, and across the ranks' bounds.
PADDED = BatchSpec("padded", padding=((1, 0), (4, 2)))


def _as_in_one_process(group: dist.ProcessGroup, name: str, spec: BatchSpec, layout: str) -> None:
    model, batch = multimodal_model(name).build(), multimodal_model(name).batch(spec)
    with rhf.patch(model, group, layout=layout) as handle:
        ours = sharded(model, handle, batch, group)
    if group.rank():
        return
    logits, loss, grads = one_process(model, batch)
    valid = batch["attention_mask"].bool() if spec.padding else torch.ones(SIZES, dtype=torch.bool)
    assert_close(ours[0][valid], logits[valid], atol=1e-10, name="logits")
    assert_close(ours[1], loss, atol=1e-10, name="loss")
    for parameter, grad in ours[2].items():
        expected = grads.get(parameter, torch.zeros_like(grad))
        assert_close(grad, expected, atol=1e-10, name=f"gradient of {parameter}")
    seen = [grad for parameter, grad in grads.items() if "vision_tower" in parameter or "visual" in parameter]
    assert sum(bool(grad.abs().max() > 1e-6) for grad in seen) > len(seen) / 2


@pytest.mark.parametrize("layout", ["zigzag", "striped"])
@pytest.mark.parametrize("entry", MULTIMODAL_MODELS, ids=str)
def test_as_in_one_process(pool: RankPool, entry: Any, layout: str) -> None:
    pool.run(_as_in_one_process, 3 if layout == "zigzag" else 2, str(entry), PLAIN, layout)


@pytest.mark.parametrize("entry", MULTIMODAL_MODELS, ids=str)
def test_padding(pool: RankPool, entry: Any) -> None:
    """Some models count positions by the padding."""
    pool.run(_as_in_one_process, 2, str(entry), PADDED, "contiguous")


def _packed(group: dist.ProcessGroup) -> None:
    """Documents given by the first of four axes of position_ids, as Qwen2-VL has them."""
    model = multimodal_model("Qwen2VLForConditionalGeneration").build()
    ids = PLAIN.batch()["input_ids"][:1] % 33
    positions = torch.cat([torch.arange(5), torch.arange(8)]).expand(4, 1, -1).contiguous()
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    logits, loss, grads = one_process(model, batch)
    with rhf.patch(model, group) as handle:
        assert handle.shard(batch)["ringattn"].rows.documents == ((0, 5, 13),)
        ours = sharded(model, handle, batch, group)
    assert_close(ours[0], logits, atol=1e-10, name="logits")
    assert_close(ours[1], loss, atol=1e-10, name="loss")
    for name, grad in grads.items():
        assert_close(ours[2][name], grad, atol=1e-10, name=name)


def test_documents_by_four_kinds_of_positions(pool: RankPool) -> None:
    pool.run(_packed, 2)


def _savings(group: dist.ProcessGroup) -> None:
    """With MLPs in tiles and the loss in chunks."""
    entry = multimodal_model("LlavaForConditionalGeneration")
    model, batch = entry.build(), entry.batch()
    _, loss, grads = one_process(model, batch)
    with rhf.patch(model, group, tile_mlp=2, chunk_loss=3) as handle, Exact():
        ours = model(**handle.shard(batch)).loss
        torch.autograd.backward(ours)
    assert_close(handle.reduce(ours), loss, atol=1e-10, name="loss")
    for name, grad in gradients(model).items():
        dist.all_reduce(grad, group=group)
        assert_close(grad, grads.get(name, torch.zeros_like(grad)), atol=1e-10, name=name)


def test_with_memory_saved(pool: RankPool) -> None:
    pool.run(_savings, 2)


def _embeddings(group: dist.ProcessGroup) -> None:
    """Embeddings that were made without the model, for example with images merged in, can be sharded."""
    model = architecture("MistralForCausalLM").build()
    ids = PLAIN.batch()["input_ids"]
    found = []
    for patched in (False, True):
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        batch = {"inputs_embeds": embeds, "labels": ids}
        if patched:
            with rhf.patch(model, group) as handle:
                logits, loss, _ = sharded(model, handle, batch, group)
        else:
            logits, loss, _ = one_process(model, batch)
        assert embeds.grad is not None
        if patched:
            dist.all_reduce(embeds.grad, group=group)
        found.append((logits, loss, embeds.grad))
    for name, a, b in zip(("logits", "loss", "gradient"), *found, strict=True):
        assert_close(b, a, atol=1e-10, name=name)


def test_embeddings(pool: RankPool) -> None:
    pool.run(_embeddings, 3)


def _run(group: dist.ProcessGroup, name: str, **more: Tensor) -> None:
    """Runs a model whose text model gets additional arguments."""
    model = multimodal_model(name).build()
    with rhf.patch(model, group) as handle:
        text: nn.Module = model.model.language_model
        text.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | more), with_kwargs=True, prepend=True)
        model(**handle.shard(multimodal_model(name).batch()))


def something_beside(group: dist.ProcessGroup) -> None:
    _run(group, "LlavaForConditionalGeneration", cross_states=torch.ones(2, 4, 16))


def another_length(group: dist.ProcessGroup) -> None:
    _run(group, "LlavaForConditionalGeneration", inputs_embeds=torch.ones(2, 16, 16))


def both_ways(group: dist.ProcessGroup) -> None:
    _run(group, GEMMA.model)


def no_text_model(group: dist.ProcessGroup) -> None:
    sizes = {"base_channels": 32, "channel_multiplier": [1], "embed_dim": 8, "latent_channels": 8, "num_embeddings": 8}
    options: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocabulary_map": {"<image>": 4},
    }
    config = ChameleonConfig(vocab_size=37, vq_config=sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options)
    rhf.patch(ChameleonForConditionalGeneration(config), group)


def two_towers(group: dist.ProcessGroup) -> None:
    text = {name: TEXT[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    config = CLIPConfig(text_config=text | {"num_attention_heads": 2}, vision_config=CLIP, projection_dim=8)
    model = CLIPModel(config).double()
    with rhf.patch(model, group) as handle:
        model(**handle.shard(multimodal_model("LlavaForConditionalGeneration").batch()))


@pytest.mark.parametrize(
    ("case", "message", "remedy"),
    [
        (something_beside, "cross_states: LlamaModel gets shape (2, 4, 16)", "run this model, or this batch"),
        (another_length, "LlamaModel gets 16 rows for a sequence of 13", "as many placeholders"),
        (
            both_ways,
            "unions (images whose tokens see each other both ways)",
            "Run this model, or this batch, unpatched",
        ),
        (two_towers, "inputs_embeds=None: CLIPTextModel gets none", "run it unpatched"),
        (no_text_model, "reads image, text, and must have one text model inside", "Run it unpatched"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_refuses(pool: RankPool, case: Any, message: str, remedy: str) -> None:
    for error in pool.expect_error(case, 2):
        assert message in error.message
        assert remedy in error.message
