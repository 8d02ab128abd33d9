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
from ringattn.attention.auto_attention import (
    context_parallel_attention,
    context_parallel_attention_with_lse,
    explain,
)
from ringattn.attention.calibration import measure_compute, measure_link
from ringattn.attention.sharding import position_ids, shard, shard_batch, unshard
from ringattn.cache.decode import decode_attention, decode_attention_by_heads
from ringattn.cache.kv_cache import DistributedKVCache
from ringattn.cache.prefill import prefill_attention
from ringattn.cache.resharding import reshard
from ringattn.cache.snapshot import load_cache, save_cache
from ringattn.cost.cost_model import Compute, CostModel, Link
from ringattn.errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendError,
    CheckpointError,
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
from ringattn.geometry.masks import Mask, causal, chunked, documents, full, key_range, prefix_lm, sliding_window
from ringattn.plan.exchanges import Gather, Ring, Ulysses
from ringattn.plan.select_exchange import Choice

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "BackendError",
    "CheckpointError",
    "Choice",
    "Compute",
    "CostModel",
    "DisagreementError",
    "DistributedKVCache",
    "Gather",
    "Layout",
    "LayoutError",
    "Link",
    "Mask",
    "MaskError",
    "OutOfPagesError",
    "Ring",
    "RingAttnError",
    "SequenceError",
    "SnapshotError",
    "Ulysses",
    "balanced",
    "causal",
    "chunked",
    "context_parallel_attention",
    "context_parallel_attention_with_lse",
    "contiguous",
    "decode_attention",
    "decode_attention_by_heads",
    "documents",
    "explain",
    "full",
    "gather_attention",
    "gather_attention_with_lse",
    "hybrid_attention",
    "hybrid_attention_with_lse",
    "key_range",
    "load_cache",
    "measure_compute",
    "measure_link",
    "position_ids",
    "prefill_attention",
    "prefix_lm",
    "reshard",
    "ring_attention",
    "ring_attention_with_lse",
    "save_cache",
    "shard",
    "shard_batch",
    "sliding_window",
    "striped",
    "ulysses_attention",
    "ulysses_attention_with_lse",
    "unshard",
    "zigzag",
]
