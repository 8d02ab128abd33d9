"""Payloads: what a message carries, and how many bytes a row of it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum


class Payload(Enum):
    """What a message carries, one row at a time, over the whole batch."""

    KV = "kv"  # keys and values, in their own dtype
    DKV = "dkv"  # their gradients, in the accumulation dtype
    Q_BACKWARD = "q, dout, lse, delta"  # q and dout in their own dtype, lse and delta in the accumulation dtype
    DQ = "dq"  # gradients of queries, in the accumulation dtype
    Q = "q"  # queries, in their own dtype
    STATE = "out, lse"  # partial results of queries, in the accumulation dtype

    @property
    def returning(self) -> Payload:
        """What is computed for the rows of a moving payload, and returns to the rank that holds them."""
        return {Payload.KV: Payload.DKV, Payload.Q_BACKWARD: Payload.DQ, Payload.Q: Payload.STATE}[self]

    @property
    def moves_queries(self) -> bool:
        """Whether rows belong to queries; otherwise to keys and values."""
        return self not in (Payload.KV, Payload.DKV)


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
            Payload.Q_BACKWARD: q * (both * self.itemsize + 2 * self.sum_itemsize),
            Payload.DQ: q * self.head_dim * self.sum_itemsize,
            Payload.Q: q * self.head_dim * self.itemsize,
            Payload.STATE: q * (self.v_head_dim + 1) * self.sum_itemsize,
        }[payload]

    def of_heads(self, heads: int, kv_heads: int) -> AttentionShape:
        """Returns the shape of a part of the heads."""
        return replace(self, heads=heads, kv_heads=kv_heads)
