"""A small byte-level decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# (q, k, v), each (B, S, heads, head_dim), to the attention's output (B, S, heads, head_dim).
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

VOCABULARY = 256


@dataclass(frozen=True)
class Size:
    """How large a model is."""

    layers: int
    dim: int
    heads: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        """Of queries, keys and values."""
        return self.dim // self.heads


class Decoder(nn.Module):
    """Bytes (B, S) and their positions (1, S) to logits (B, S, 256).

    Knows nothing of ranks: every layer but attention works row by row, and `attend` decides what a row can see.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, size.dim)
        self.blocks = nn.ModuleList(_Block(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.dim)
        self.head = nn.Linear(size.dim, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Returns the logits of each next byte."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, positions, attend)
        logits: Tensor = self.head(self.norm(x))
        return logits


class _Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.norm_1, self.norm_2 = nn.RMSNorm(size.dim), nn.RMSNorm(size.dim)
        self.qkv = nn.Linear(size.dim, (size.heads + 2 * size.kv_heads) * size.head_dim, bias=False)
        self.out = nn.Linear(size.dim, size.dim, bias=False)
        self.up = nn.Linear(size.dim, 6 * size.dim, bias=False)
        self.down = nn.Linear(3 * size.dim, size.dim, bias=False)

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        heads, kv_heads = self.size.heads, self.size.kv_heads
        qkv = self.qkv(self.norm_1(x)).unflatten(-1, (-1, self.size.head_dim))
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
        x = x + self.out(attend(_rotate(q, positions), _rotate(k, positions), v).flatten(2))
        gate, value = self.up(self.norm_2(x)).chunk(2, dim=-1)
        mixed: Tensor = x + self.down(F.silu(gate) * value)
        return mixed


def _rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding of GLOBAL positions: a shard must not count from zero. Su et al. 2021, 2104.09864."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions[..., None, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
