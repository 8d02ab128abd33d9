"""What travels, and how many bytes a row of it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum


class Payload(Enum):
    """What a message carries, a row at a time, over the whole batch."""

    KV = "kv"  # keys and values, in their own dtype
    DKV = "dkv"  # their gradients, in the accumulation dtype
    Q = "q"  # queries and gradients of the output in their own dtype, lse and delta in the accumulation dtype
    DQ = "dq"  # the queries' gradients, in the accumulation dtype

    @property
    def gradient(self) -> Payload:
        """What comes back of it."""
        return Payload.DQ if self is Payload.Q else Payload.DKV


@dataclass(frozen=True)
class AttentionShape:
    """The dims of a call that bytes depend on.

    Args:
        batch, heads, kv_heads, head_dim, v_head_dim: as in q (B, S, H, D), k (B, S, H_kv, D), v (B, S, H_kv, Dv).
        itemsize: bytes of an input's element.
        sum_itemsize: bytes of an element in the accumulation dtype.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    itemsize: int
    sum_itemsize: int

    def row_bytes(self, payload: Payload) -> int:
        """Returns the bytes of one row of `payload`, over the batch."""
        both = self.head_dim + self.v_head_dim
        kv, q = self.batch * self.kv_heads, self.batch * self.heads
        return {
            Payload.KV: kv * both * self.itemsize,
            Payload.DKV: kv * both * self.sum_itemsize,
            Payload.Q: q * (both * self.itemsize + 2 * self.sum_itemsize),
            Payload.DQ: q * self.head_dim * self.sum_itemsize,
        }[payload]

    def of_heads(self, heads: int, kv_heads: int) -> AttentionShape:
        """Returns the sizes of a part of the heads."""
        return replace(self, heads=heads, kv_heads=kv_heads)
