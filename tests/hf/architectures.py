"""The architectures that are tested: a tiny model of each, and what its layers ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
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
}


@dataclass(frozen=True)
class Architecture:
    """A tiny random model: its class, its config's class by the same prefix, and what is special to it."""

    model: str
    config: str
    asks_for: str
    options: dict[str, Any] = field(default_factory=dict)
    # Parts of it compute in fp32 whatever the dtype: it is held to the rule, not to 1e-10.
    fp32: bool = False

    def __str__(self) -> str:
        return self.model

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
        return model.to(dtype).eval()


ARCHITECTURES = (
    Architecture("LlamaForCausalLM", "LlamaConfig", "causal, grouped heads"),
    Architecture("MistralForCausalLM", "MistralConfig", "a sliding window in all layers", {"sliding_window": 5}),
)
