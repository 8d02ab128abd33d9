"""The tested architectures: a tiny model of each, and its attention features; `multimodal_models` has the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

# Common to all: small enough for CI, odd enough to show a wrong reshape.
_SIZES = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "experts_implementation": "eager",  # which has float64
}


@dataclass(frozen=True)
class Architecture:
    """A tiny random model: its class, the class of its config, its attention features and its config options."""

    model: str
    config: str
    features: str
    options: dict[str, Any] = field(default_factory=dict)
    # Whether transformers masks packed documents; if not, the reference runs them one by one.
    supports_packing: bool = True

    def __str__(self) -> str:
        return self.model

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model is an encoder-decoder; documents cannot be packed into its rows."""
        return self.model.endswith("ForConditionalGeneration")

    def build(self, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
        """Returns the model with weights that depend on nothing but this entry."""
        config = getattr(transformers, self.config)(**(_SIZES | self.options))
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, self.model)(config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                # Larger than at the start of a training, so that attention is far from uniform.
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
        nn.Module.to(model, dtype)
        nn.Module.eval(model)
        return model


_WINDOWED = ["sliding_attention", "full_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 100.0}

ARCHITECTURES = (
    Architecture("LlamaForCausalLM", "LlamaConfig", "causal attention, grouped heads"),
    Architecture("MistralForCausalLM", "MistralConfig", "a sliding window in every layer", {"sliding_window": 5}),
    Architecture("MixtralForCausalLM", "MixtralConfig", "causal attention; experts", {"num_local_experts": 4}),
    Architecture(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        "a sliding window in some layers",
        {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    ),
    Architecture("Qwen3ForCausalLM", "Qwen3Config", "norms of queries and keys; its own head_dim", {"head_dim": 10}),
    Architecture(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        "softcap, its own scale, a sliding window in every other layer",
        {
            "head_dim": 8,
            "sliding_window": 4,
            "attn_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 20,
            "attn_implementation": "eager",  # sdpa has no softcap, and older versions took it nevertheless
        },
    ),
    Architecture(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        "sliding windows in most layers, a rotary base per layer type",
        {"head_dim": 8, "sliding_window": 4, "layer_types": _WINDOWED, "query_pre_attn_scalar": 20},
    ),
    Architecture(
        "GptOssForCausalLM",
        "GptOssConfig",
        "trained sinks, a sliding window in every other layer; experts",
        {
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": _WINDOWED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": _ROPE,
        },
        supports_packing=False,
    ),
    Architecture(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        "chunks in some layers, a temperature that grows with the position in the others; experts",
        {
            "head_dim": 8,
            "attention_chunk_size": 4,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "floor_scale": 4,
            "attn_scale": 0.3,
            "intermediate_size_mlp": 20,
            "num_local_experts": 2,
            "rope_parameters": _ROPE,
        },
    ),
    Architecture(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        "multi-head latent attention: values with another head_dim than keys; experts",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 6,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 8,
        },
    ),
    Architecture("Phi3ForCausalLM", "Phi3Config", "one projection for queries, keys and values"),
    Architecture("Olmo2ForCausalLM", "Olmo2Config", "norms after attention; norms of queries and keys"),
    Architecture("GPTNeoXForCausalLM", "GPTNeoXConfig", "rotary embedding on a part of each head; biases"),
    Architecture("GPT2LMHeadModel", "GPT2Config", "learned positions", {"n_embd": 24, "n_layer": 2, "n_head": 4}),
    Architecture(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        "bidirectional; a window to both sides in most layers",
        {"local_attention": 6, "global_attn_every_n_layers": 2},
        supports_packing=False,
    ),
    Architecture("BertForMaskedLM", "BertConfig", "bidirectional; learned positions", supports_packing=False),
    Architecture(
        "RobertaForMaskedLM",
        "RobertaConfig",
        "bidirectional; positions counted from the padding token",
        supports_packing=False,
    ),
    Architecture(
        "BartForConditionalGeneration",
        "BartConfig",
        "encoder-decoder: bidirectional, causal and cross-attention",
        {
            "d_model": 24,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 20,
            "decoder_ffn_dim": 20,
            "decoder_start_token_id": 2,
        },
    ),
)


# Llama with rotary embeddings whose frequencies follow the largest position of a forward pass, above 8.
_BASE = 10000.0
ROTARIES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": _BASE},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": _BASE,
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "short_factor": [1.0, 1.5, 2.0],
        "long_factor": [2.0, 3.5, 5.0],
    },
}


def architecture(model: str) -> Architecture:
    """Returns the entry of this model, or of these rotary embeddings: entries are passed to ranks by name."""
    if model in ROTARIES:
        options = {"max_position_embeddings": 8, "rope_parameters": ROTARIES[model]}
        return Architecture("LlamaForCausalLM", "LlamaConfig", f"{model} rotary embeddings", options)
    return next(entry for entry in ARCHITECTURES if entry.model == model)
