"""Exact attention over sequences too long for one device."""

from ringattn.attention.api import (
    gather_attention,
    gather_attention_with_lse,
    hybrid_attention,
    hybrid_attention_with_lse,
    ring_attention,
    ring_attention_with_lse,
    ulysses_attention,
    ulysses_attention_with_lse,
)
from ringattn.attention.sharding import shard, shard_batch, unshard
from ringattn.errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendError,
    DisagreementError,
    LayoutError,
    MaskError,
    OutOfPagesError,
    RingAttnError,
    SequenceError,
    SnapshotError,
)
from ringattn.geometry.balance import balanced
from ringattn.geometry.layout import Layout, contiguous, striped, zigzag
from ringattn.geometry.masks import Mask, causal, chunked, documents, full, prefix_lm, sliding_window

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "BackendError",
    "DisagreementError",
    "Layout",
    "LayoutError",
    "Mask",
    "MaskError",
    "OutOfPagesError",
    "RingAttnError",
    "SequenceError",
    "SnapshotError",
    "balanced",
    "causal",
    "chunked",
    "contiguous",
    "documents",
    "full",
    "gather_attention",
    "gather_attention_with_lse",
    "hybrid_attention",
    "hybrid_attention_with_lse",
    "prefix_lm",
    "ring_attention",
    "ring_attention_with_lse",
    "shard",
    "shard_batch",
    "sliding_window",
    "striped",
    "ulysses_attention",
    "ulysses_attention_with_lse",
    "unshard",
    "zigzag",
]
