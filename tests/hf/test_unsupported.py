"""Unsupported models, options and batches raise an error on every rank that names them and says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

import ringattn.hf as rhf
from ringattn import contiguous
from tests.harness.ranks import RankPool
from tests.hf.architectures import architecture
from tests.hf.comparison import PACKED, PLAIN

SIZES = {"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def made(name: str, config: str, **options: Any) -> Any:
    """A model of an architecture that is not supported."""
    return getattr(transformers, name)(getattr(transformers, config)(**(SIZES | {"pad_token_id": 0} | options)))


def run(group: dist.ProcessGroup, name: str = "LlamaForCausalLM", **more: Any) -> None:
    """Calls a patched model with additional arguments."""
    with rhf.patch(architecture(name).build(), group) as handle:
        handle.model(**(handle.shard(PLAIN.batch()) | more))


def shard(group: dist.ProcessGroup, batch: dict[str, Any], name: str = "LlamaForCausalLM", **options: Any) -> None:
    with rhf.patch(architecture(name).build(), group, **options) as handle:
        handle.shard(batch)


def attention_dropout(group: dist.ProcessGroup) -> None:
    model = architecture("LlamaForCausalLM").build()
    model.model.layers[0].self_attn.attention_dropout = 0.1
    with rhf.patch(model.train(), group) as handle:
        model(**handle.shard(PLAIN.batch()))


def attention_weights(group: dist.ProcessGroup) -> None:
    run(group, output_attentions=True)


def attention_weights_by_config(group: dist.ProcessGroup) -> None:
    model = architecture("LlamaForCausalLM").build()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with rhf.patch(model, group) as handle:
        model(**handle.shard(PLAIN.batch()))


def load_on_experts(group: dist.ProcessGroup) -> None:
    run(group, "MixtralForCausalLM", output_router_logits=True)


def head_mask(group: dist.ProcessGroup) -> None:
    run(group, head_mask=torch.ones(2, 4))


def mask_of_four_dims(group: dist.ProcessGroup) -> None:
    run(group, attention_mask=torch.zeros(2, 1, 6, 13))


def mask_of_four_dims_in_the_batch(group: dist.ProcessGroup) -> None:
    shard(group, PLAIN.batch() | {"attention_mask": torch.zeros(2, 1, 13, 13)})


def padding_beside_the_batch(group: dist.ProcessGroup) -> None:
    rows = contiguous(13, 2).num_tokens(group.rank())
    mask = torch.ones(2, rows)
    mask[0, 0] = 0
    with rhf.patch(architecture("LlamaForCausalLM").build(), group, layout="contiguous") as handle:
        handle.model(**(handle.shard(PLAIN.batch()) | {"attention_mask": mask}))


def padding_with_holes(group: dist.ProcessGroup) -> None:
    mask = torch.ones(2, 13)
    mask[1, 4] = 0
    shard(group, PLAIN.batch() | {"attention_mask": mask})


def something_unknown(group: dist.ProcessGroup) -> None:
    run(group, alibi_slopes=torch.ones(4))


def two_windows(group: dist.ProcessGroup) -> None:
    """The layer has a window, its config has none."""
    model = architecture("Gemma3ForCausalLM").build()
    model.model.layers[1].self_attn.sliding_window = 3
    with rhf.patch(model, group) as handle:
        model(**handle.shard(PLAIN.batch()))


def lengths_that_end_early(group: dist.ProcessGroup) -> None:
    ends = torch.tensor([0, 5, 12])
    shard(group, {"input_ids": torch.ones(1, 13, dtype=torch.long), "cu_seq_lens_q": ends, "cu_seq_lens_k": ends})


def packed_encoder_decoder(group: dist.ProcessGroup) -> None:
    shard(group, PACKED.batch(), "BartForConditionalGeneration")


def no_tokens(group: dist.ProcessGroup) -> None:
    shard(group, {"labels": torch.ones(1, 13)})


def no_batch(group: dist.ProcessGroup) -> None:
    with rhf.patch(architecture("LlamaForCausalLM").build(), group) as handle:
        handle.model(input_ids=PLAIN.batch()["input_ids"])


def no_cache(group: dist.ProcessGroup) -> None:
    with rhf.patch(architecture("LlamaForCausalLM").build(), group) as handle:
        handle.model.generate(PLAIN.batch()["input_ids"], max_new_tokens=2)  # type: ignore[operator]


def unknown_layout(group: dist.ProcessGroup) -> None:
    shard(group, PLAIN.batch(), layout="spiral")


def layout_that_leaves_a_rank_out(group: dist.ProcessGroup) -> None:
    shard(group, PLAIN.batch(), layout=lambda n, w: rhf_layout(n))


def rhf_layout(length: int) -> Any:
    return type(contiguous(1, 1))(length, ((range(length),), ()))


def patched_twice(group: dist.ProcessGroup) -> None:
    model = architecture("LlamaForCausalLM").build()
    with rhf.patch(model, group):
        rhf.patch(model, group)


def no_transformer(group: dist.ProcessGroup) -> None:
    rhf.patch(nn.Linear(2, 2), group)


def relative_bias(group: dist.ProcessGroup) -> None:
    rhf.patch(made("T5ForConditionalGeneration", "T5Config", d_model=24, num_layers=1, d_kv=8, d_ff=8), group)


def state_space(group: dist.ProcessGroup) -> None:
    rhf.patch(made("MambaForCausalLM", "MambaConfig", state_size=4), group)


def linear_attention(group: dist.ProcessGroup) -> None:
    model = architecture("LlamaForCausalLM").build()
    model.config.__dict__["layer_types"] = ["linear_attention", "full_attention"]
    rhf.patch(model, group)


def classification(group: dist.ProcessGroup) -> None:
    rhf.patch(made("LlamaForSequenceClassification", "LlamaConfig", intermediate_size=8), group)


def pooler(group: dist.ProcessGroup) -> None:
    rhf.patch(made("BertModel", "BertConfig", intermediate_size=8), group)


def pooled_at_the_end(group: dist.ProcessGroup) -> None:
    with rhf.patch(made("CLIPTextModel", "CLIPTextConfig", intermediate_size=8), group) as handle:
        handle.model(**handle.shard({"input_ids": PLAIN.batch()["input_ids"]}))


REFUSALS: dict[Callable[[dist.ProcessGroup], None], tuple[str, str]] = {
    attention_dropout: ("LlamaAttention asks for attention dropout of 0.1", "set it to 0 in the config"),
    attention_weights: ("LlamaForCausalLM asks for output_attentions", "get them from the unpatched model"),
    attention_weights_by_config: ("asks for output_attentions", "get them from the unpatched model"),
    load_on_experts: ("MixtralForCausalLM asks for output_router_logits", "each rank has only its own tokens"),
    head_mask: ("asks for head_mask", "multiply the rows of the output projection"),
    mask_of_four_dims: ("a Tensor of shape (2, 1, 6, 13) as its mask", "give padding as a 2-D attention_mask"),
    mask_of_four_dims_in_the_batch: ("attention_mask has shape (2, 1, 13, 13)", "must be (2, 13), 1 for tokens"),
    padding_beside_the_batch: ("LlamaAttention got one with padding", "leave attention_mask to handle.shard(batch)"),
    padding_with_holes: ("padding between the tokens of row 1", "move the tokens together"),
    something_unknown: ("LlamaAttention asks for alibi_slopes=", "run the model unpatched"),
    two_windows: ("sliding_window=3 with a mask that has no window", "run this model unpatched"),
    lengths_that_end_early: ("cu_seq_lens_q=tensor([ 0,  5, 12])", "end at 13"),
    packed_encoder_decoder: ("batch has ['position_ids']", "put each document into a row of its own"),
    no_tokens: ("batch has ['labels']", "must have input_ids or inputs_embeds"),
    no_batch: (
        "LlamaAttention was called without a sharded batch",
        "call the model with what handle.shard(batch) returns",
    ),
    no_cache: (
        "LlamaAttention was called without a sharded batch",
        "to generate, pass past_key_values=ringattn.hf.RingCache(handle",
    ),
    unknown_layout: ("layout='spiral'", "'contiguous', 'zigzag', 'striped', 'balanced'"),
    layout_that_leaves_a_rank_out: ("ranks [1] have none", "at least one on each rank"),
    patched_twice: ("model=LlamaForCausalLM: is patched already", "call its handle's unpatch() first"),
    no_transformer: ("model=Linear", "must be a transformers PreTrainedModel"),
    relative_bias: ("T5ForConditionalGeneration", "has a bias for their distance"),
    state_space: ("MambaForCausalLM", "run it unpatched"),
    linear_attention: ("layers of types ['linear_attention']", "run it unpatched"),
    classification: ("its head pools a whole sequence", "what handle.unshard returns"),
    pooled_at_the_end: ("CLIPTextModel pools a whole sequence", "run it unpatched"),
    pooler: ("BertPooler takes the first row of a sequence", "add_pooling_layer=False"),
}


@pytest.mark.parametrize("case", REFUSALS, ids=lambda program: program.__name__)
def test_refuses(pool: RankPool, case: Callable[[dist.ProcessGroup], None]) -> None:
    message, remedy = REFUSALS[case]
    for error in pool.expect_error(case, 2):
        assert "ArgumentError" in error.mro_names, error.traceback
        assert message in error.message
        assert remedy in error.message
