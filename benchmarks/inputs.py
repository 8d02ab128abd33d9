"""Inputs that benchmarks share: shapes with random tensors, packed documents, layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import ringattn

LAYOUTS: Mapping[str, Callable[[ringattn.Mask, int, int], ringattn.Layout]] = {
    "contiguous": lambda mask, seq_len, ranks: ringattn.contiguous(seq_len, ranks),
    "zigzag": lambda mask, seq_len, ranks: ringattn.zigzag(seq_len, ranks),
    "striped": lambda mask, seq_len, ranks: ringattn.striped(seq_len, ranks),
    "balanced": ringattn.balanced,
}


@dataclass(frozen=True)
class Shape:
    """The heads of attention, their dim, and the dtype by its name in torch."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the keys and values of a token."""
        return 2 * self.kv_heads * self.head_dim * self.torch_dtype.itemsize

    def random(
        self, rows: int, device: torch.device, *, seed: int = 0, batch: int = 1
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns q, k, v and dout, (batch, rows, heads, head_dim), equal for equal seeds."""
        generator = torch.Generator(device).manual_seed(seed)
        q, k, v, dout = (
            torch.randn(batch, rows, heads, self.head_dim, generator=generator, device=device).to(self.torch_dtype)
            for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads)
        )
        return q, k, v, dout


def with_gradients(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: tuple[Tensor, ...], backward: bool
) -> Callable[[], object]:
    """Returns a function that runs a forward, or a forward and backward, of `attention`; tensors are q, k, v, dout."""
    q, k, v = (x.detach().clone().requires_grad_(backward) for x in tensors[:3])

    def once() -> object:
        out = attention(q, k, v)
        return torch.autograd.grad(out, [q, k, v], tensors[3]) if backward else out

    return once


def document_ends(
    seq_len: int, shortest: int = 128, longest: int = 8192, rate: float = 0.8, seed: int = 0
) -> list[int]:
    """Returns the cumulative lengths of packed documents, equal on every rank.

    Lengths have a long tail: shortest * exp(x), x exponentially distributed with a rate, and at most `longest`.
    """
    generator = torch.Generator().manual_seed(seed)
    tail = torch.empty(seq_len // shortest + 1).exponential_(rate, generator=generator)
    ends = (shortest * tail.exp()).clamp(max=longest).long().cumsum(0)
    return [0, *ends[ends < seq_len].tolist(), seq_len]


def packed_documents(seq_len: int) -> ringattn.Mask:
    """Returns causal documents of 128 to 8,192 tokens, most of them long."""
    return ringattn.documents(document_ends(seq_len, rate=0.35)) & ringattn.causal()
