"""Tiny models with images, and batches whose rows have images of different sizes at different positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.hf.comparison import PLAIN, VOCABULARY, BatchSpec

IMAGE = VOCABULARY - 1  # the placeholder of a feature
ROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN = {
    "depth": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
}
TOKENS = {"image_token_id": IMAGE, "video_token_id": 35, "vision_start_token_id": 34, "vision_end_token_id": 33}


@dataclass(frozen=True)
class MultimodalModel:
    """A tiny random model that merges images into its text.

    Args:
        model: its class.
        config: its config's.
        features: what is special to it.
        options: of its config.
        counts: features of each image, two of them, one in each row.
        pixels: makes what else a batch has, of the ids.
    """

    model: str
    config: str
    features: str
    options: dict[str, Any]
    counts: tuple[int, int]
    pixels: Callable[[Tensor], dict[str, Tensor]]

    def __str__(self) -> str:
        return self.model

    def build(self) -> PreTrainedModel:
        """Returns the model, in float64, with weights that depend on nothing but this entry."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.options)
        model: PreTrainedModel = getattr(transformers, self.model)(config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
        nn.Module.double(model)
        nn.Module.eval(model)
        return model

    def batch(self, spec: BatchSpec = PLAIN) -> dict[str, Tensor]:
        """Returns a batch of this shape with its images, the same on every rank."""
        batch = spec.batch()
        ids = batch["input_ids"]
        ids[ids >= min(TOKENS.values())] = 3
        for row, (start, count) in enumerate(zip((2, 7), self.counts, strict=True)):
            ids[row, start : start + count] = IMAGE
            batch["labels"][row, start : start + count] = -100
        return batch | self.pixels(ids)


def _normal(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def _squares(ids: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": _normal(2, 3, 8, 8)}


def _squares_of(name: str, ids: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": _normal(2, 3, 8, 8), name: (ids == IMAGE).long()}


def _patches(ids: Tensor) -> dict[str, Tensor]:
    """Images of 4 x 4 and of 2 x 4 patches, of which four make a feature."""
    return {
        "pixel_values": _normal(24, 12),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 4]]),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


MULTIMODAL_MODELS = (
    MultimodalModel(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        "images",
        {
            "vision_config": {"model_type": "clip_vision_model", **CLIP},
            "text_config": {"model_type": "llama", **TEXT},
            "image_token_index": IMAGE,
        },
        (4, 4),
        _squares,
    ),
    MultimodalModel(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        "images; positions in time, height and width",
        {
            "text_config": TEXT | {"rope_parameters": ROPE},
            "vision_config": QWEN | {"embed_dim": 16, "mlp_ratio": 1},
            **TOKENS,
        },
        (4, 2),
        _patches,
    ),
    MultimodalModel(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        "images, whose features are also added in the first layers; positions in time, height and width",
        {
            "text_config": TEXT | {"head_dim": 8, "rope_parameters": ROPE | {"mrope_interleaved": True}},
            "vision_config": QWEN
            | {
                "intermediate_size": 16,
                "out_hidden_size": 16,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1],
            },
            **TOKENS,
        },
        (4, 2),
        _patches,
    ),
)

# The tokens of an image see each other both ways.
GEMMA = MultimodalModel(
    "Gemma3ForConditionalGeneration",
    "Gemma3Config",
    "sliding windows in most layers; images whose tokens see one another both ways",
    {
        "text_config": TEXT
        | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": CLIP | {"vision_use_head": False},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
    },
    (4, 4),
    partial(_squares_of, "token_type_ids"),
)


def multimodal_model(model: str) -> MultimodalModel:
    """Returns the entry of this model: entries are passed to ranks by name."""
    return next(entry for entry in (*MULTIMODAL_MODELS, GEMMA) if entry.model == model)
