"""A small Llama-style decoder: grouped-query attention, rotary positions, RMSNorm, SwiGLU.

The decoder does not know about ranks. All of its layers but attention work row by row, and the caller passes the
attention function, which decides what each row sees and on which ranks the keys are. Positions and mask are arguments,
not state, so each micro-batch of a pipeline has its own.
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

# (q, k, v, mask) -> out; each tensor is (B, S, heads, head_dim).
AttentionFn = Callable[[Tensor, Tensor, Tensor, Masks], Tensor]


@dataclass(frozen=True)
class MoESpec:
    """The mixture-of-experts layers of a decoder.

    Args:
        num_experts: number of experts in a layer.
        top_k: number of experts per token.
        hidden: hidden width of an expert.
        every: layers every - 1, 2 * every - 1, ... have experts; 1 means all layers.
        aux_loss_weight: weight of the load-balancing loss; 0 turns it off.
    """

    num_experts: int
    top_k: int
    hidden: int
    every: int = 1
    aux_loss_weight: float = 0.01


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a decoder.

    Args:
        vocab_size: number of tokens in the vocabulary.
        num_layers: number of layers.
        dim: width of the residual stream.
        num_heads: number of query heads; must divide dim, with an even dim / num_heads.
        num_kv_heads: number of key/value heads; must divide num_heads.
        hidden: hidden width of the feed-forward layers.
        rope_base: base of the rotary wavelengths.
        norm_eps: epsilon of RMSNorm.
        moe: the mixture-of-experts layers; None for a dense decoder.
    Raises:
        ArgumentError: when the numbers of heads do not divide, or the head width is odd.
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
        """Checks the numbers of heads."""
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ArgumentError(f"dim={self.dim}: must be num_heads={self.num_heads} x an even head width")
        if self.num_heads % self.num_kv_heads:
            raise ArgumentError(f"num_heads={self.num_heads}: must be a multiple of num_kv_heads={self.num_kv_heads}")

    @property
    def head_dim(self) -> int:
        """The width of a query, key or value head."""
        return self.dim // self.num_heads

    def is_moe(self, layer: int) -> bool:
        """Returns whether the layer of this index has a mixture of experts as its feed-forward."""
        return self.moe is not None and (layer + 1) % self.moe.every == 0


# Makes the feed-forward module of a mixture-of-experts layer: (B, S, dim) -> (B, S, dim).
FeedForwardFactory = Callable[[DecoderConfig], nn.Module]


class Decoder(nn.Module):
    """A decoder: tokens (B, S) to logits (B, S, vocab_size).

    A pipeline stage is a decoder with some of the layers, under the names they have in the whole model. `embed` is None
    in all stages but the first, `norm` and `head` are None in all but the last, and modules that are None are skipped:
    a middle stage maps (B, S, dim) to (B, S, dim).

    Args:
        config: the sizes.
        moe_factory: makes the feed-forward of each mixture-of-experts layer, such as `make_moe`; required with, and
            only with, config.moe.
    Raises:
        ArgumentError: when one of config.moe and moe_factory is given without the other.
    """

    embed: nn.Embedding | None
    norm: nn.RMSNorm | None
    head: nn.Linear | None

    def __init__(self, config: DecoderConfig, *, moe_factory: FeedForwardFactory | None = None) -> None:
        super().__init__()
        if (config.moe is None) != (moe_factory is None):
            raise ArgumentError("config.moe and moe_factory must be given together: pass both, or neither")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict()
        for index in range(config.num_layers):
            feed_forward = moe_factory(config) if moe_factory and config.is_moe(index) else FeedForward(config)
            self.layers[str(index)] = DecoderLayer(config, feed_forward)
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, x: Tensor, *, positions: Tensor, mask: Masks, attention_fn: AttentionFn) -> Tensor:
        """Returns the logits of the next token at each position.

        Args:
            x: tokens, (B, S) int64; in stages after the first, the output of the previous stage, (B, S, dim).
            positions: (B, S) or (1, S) integers for the rotary embedding: positions in the sequence or in its document,
                not in the local shard.
            mask: the attention mask, passed to `attention_fn` unchanged.
            attention_fn: computes attention: (q, k, v, mask) -> out, each (B, S, heads, head_dim).
        Returns:
            (B, S, vocab_size); in stages before the last, (B, S, dim).
        """
        if self.embed is not None:
            x = self.embed(x)
        for layer in self.layers.values():
            x = layer(x, positions=positions, mask=mask, attention_fn=attention_fn)
        if self.norm is not None:
            x = self.norm(x)
        if self.head is not None:
            x = self.head(x)
        return x


class DecoderLayer(nn.Module):
    """Attention and a feed-forward, each in a residual branch behind a norm: (B, S, dim) -> (B, S, dim)."""

    def __init__(self, config: DecoderConfig, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = SelfAttention(config)
        self.feed_forward_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, *, positions: Tensor, mask: Masks, attention_fn: AttentionFn) -> Tensor:
        x = x + self.attention(self.attention_norm(x), positions=positions, mask=mask, attention_fn=attention_fn)
        return x + cast(Tensor, self.feed_forward(self.feed_forward_norm(x)))


class SelfAttention(nn.Module):
    """The projections around an attention function. The number of heads follows from the weights' (local) shapes."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim, self.rope_base = config.head_dim, config.rope_base
        kv_dim = config.num_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, kv_dim, bias=False)
        self.wv = nn.Linear(config.dim, kv_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, *, positions: Tensor, mask: Masks, attention_fn: AttentionFn) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.wq, self.wk, self.wv))
        q, k = (apply_rotary(x, positions, self.rope_base) for x in (q, k))
        out = attention_fn(q, k, v, mask)
        return cast(Tensor, self.wo(out.flatten(2)))


class FeedForward(nn.Module):
    """SwiGLU feed-forward: (B, S, dim) -> (B, S, dim). Source: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.hidden, bias=False)
        self.up = nn.Linear(config.dim, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down(F.silu(self.gate(x)) * self.up(x)))


def apply_rotary(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Applies rotary position embedding to queries or keys.

    Args:
        x: (B, S, heads, head_dim), head_dim even.
        positions: (B, S) or (1, S).
        base: base of the wavelengths.
    Returns:
        A tensor like x.
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = base ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = positions[..., None, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
