"""A small decoder, as Llama is one: grouped-query attention, rotary positions, RMSNorm, SwiGLU.

It knows nothing of ranks. Every layer but attention works row by row, and attention is a value that the caller gives:
which rows a row can see, and on which ranks they lie, is its business. What describes a batch, its positions and its
mask, travels as arguments, never as state: so each micro-batch of a pipeline has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ringattn.errors import ArgumentError
from ringattn.types import Masks

# (q, k, v, mask), each tensor (B, S, heads, head_dim), to the attention's output (B, S, heads, head_dim).
AttentionFn = Callable[[Tensor, Tensor, Tensor, Masks], Tensor]


@dataclass(frozen=True)
class MoESpec:
    """What the mixture-of-experts layers of a decoder are.

    Args:
        num_experts: experts in a layer.
        top_k: how many of them each token goes to.
        hidden: width of an expert.
        every: each `every`-th layer is one, the last of the first `every` being the first.
        aux_loss_weight: of the loss that balances the experts; 0 leaves it out.
    """

    num_experts: int
    top_k: int
    hidden: int
    every: int = 1
    aux_loss_weight: float = 0.01


@dataclass(frozen=True)
class DecoderConfig:
    """How large a decoder is.

    Args:
        vocab_size: how many tokens there are.
        num_layers: how many layers.
        dim: width of the residual stream.
        num_heads: query heads; dim % num_heads == 0.
        num_kv_heads: key and value heads; num_heads % num_kv_heads == 0.
        hidden: width of the feed-forward.
        rope_base: of the rotary positions' wavelengths.
        norm_eps: of RMSNorm.
        moe: what the mixture-of-experts layers are; None has none.
    Raises:
        ArgumentError: when heads do not divide, or a head's width is odd.
    """

    vocab_size: int
    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    hidden: int
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    moe: MoESpec | None = None

    def __post_init__(self) -> None:
        """Checks the heads."""
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ArgumentError(f"dim={self.dim}: must be num_heads={self.num_heads} x an even width")
        if self.num_heads % self.num_kv_heads:
            raise ArgumentError(f"num_heads={self.num_heads}: must be a multiple of num_kv_heads={self.num_kv_heads}")

    @property
    def head_dim(self) -> int:
        """Width of a head of queries, keys and values."""
        return self.dim // self.num_heads

    def is_moe(self, layer: int) -> bool:
        """Returns whether a layer's feed-forward is a mixture of experts."""
        return self.moe is not None and (layer + 1) % self.moe.every == 0


# What stands in a layer's feed-forward slot: (B, S, dim) to (B, S, dim).
FeedForwardFactory = Callable[[DecoderConfig], nn.Module]


class Decoder(nn.Module):
    """Tokens (B, S) to logits (B, S, vocab_size).

    A stage of a pipeline has some of the layers, under their own names; `embed` is None but in the first, `norm` and
    `head` are None but in the last. What is None is skipped: so a stage in the middle takes and gives (B, S, dim).

    Args:
        config: how large it is.
        moe: what makes the feed-forward of a mixture-of-experts layer; needed if config.moe is given.
    Raises:
        ArgumentError: when one of config.moe and `moe` is given without the other.
    """

    embed: nn.Embedding | None
    norm: nn.RMSNorm | None
    head: nn.Linear | None

    def __init__(self, config: DecoderConfig, *, moe: FeedForwardFactory | None = None) -> None:
        super().__init__()
        if (config.moe is None) != (moe is None):
            raise ArgumentError("config.moe and moe must be given together: what the experts are, and what makes them")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict()
        for index in range(config.num_layers):
            feed_forward = moe(config) if moe is not None and config.is_moe(index) else FeedForward(config)
            self.layers[str(index)] = DecoderLayer(config, feed_forward)
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, x: Tensor, *, positions: Tensor, mask: Masks, attend: AttentionFn) -> Tensor:
        """Returns the logits of each next token.

        Args:
            x: tokens, (B, S) int64; in a stage that is not the first, what the one before gave, (B, S, dim).
            positions: (B, S) or (1, S), those that rotary embedding turns by: of the sequence or its document, never
                counted from a shard's own start.
            mask: who may attend to whom; goes to `attend` as it is.
            attend: the attention.
        Returns:
            (B, S, vocab_size); in a stage that is not the last, (B, S, dim).
        """
        if self.embed is not None:
            x = self.embed(x)
        for layer in self.layers.values():
            x = layer(x, positions=positions, mask=mask, attend=attend)
        if self.norm is not None:
            x = self.norm(x)
        if self.head is not None:
            x = self.head(x)
        return x


class DecoderLayer(nn.Module):
    """Attention and a feed-forward, each added to the residual stream: (B, S, dim) to (B, S, dim)."""

    def __init__(self, config: DecoderConfig, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = SelfAttention(config)
        self.feed_forward_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, *, positions: Tensor, mask: Masks, attend: AttentionFn) -> Tensor:
        """Returns the residual stream after this layer."""
        x = x + self.attention(self.attention_norm(x), positions=positions, mask=mask, attend=attend)
        return x + cast(Tensor, self.feed_forward(self.feed_forward_norm(x)))


class SelfAttention(nn.Module):
    """Projections around the attention that it is given, with as many heads as its weights have rows for."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim, self.rope_base = config.head_dim, config.rope_base
        kv_dim = config.num_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, kv_dim, bias=False)
        self.wv = nn.Linear(config.dim, kv_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, *, positions: Tensor, mask: Masks, attend: AttentionFn) -> Tensor:
        """Returns what the rows of x, (B, S, dim), see."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.wq, self.wk, self.wv))
        out = attend(rotate(q, positions, self.rope_base), rotate(k, positions, self.rope_base), v, mask)
        return cast(Tensor, self.wo(out.flatten(2)))


class FeedForward(nn.Module):
    """SwiGLU: (B, S, dim) to (B, S, dim), row by row. Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.hidden, bias=False)
        self.up = nn.Linear(config.dim, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the rows, each through the same two layers."""
        return cast(Tensor, self.down(F.silu(self.gate(x)) * self.up(x)))


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary position embedding of (B, S, heads, head_dim). Su et al. 2021, arXiv:2104.09864.

    Args:
        x: queries or keys.
        positions: (B, S) or (1, S).
        base: of the wavelengths.
    """
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = base ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = positions[..., None, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
