"""Exact attention over sequences too long for one device."""

from importlib import import_module
from typing import TYPE_CHECKING

from ringattn.attention import custom_ops as custom_ops  # registers torch.ops.ringattn
from ringattn.comm import gloo_exit as gloo_exit  # its exit handler runs after the handlers registered later
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

if TYPE_CHECKING:
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

__version__ = "0.1.0"

# The modules of the other public names. They are imported when such a name is first used.
_LAZY_MODULES = (
    "ringattn.attention.api",
    "ringattn.attention.auto_attention",
    "ringattn.attention.calibration",
    "ringattn.attention.sharding",
    "ringattn.cache.decode",
    "ringattn.cache.kv_cache",
    "ringattn.cache.prefill",
    "ringattn.cache.resharding",
    "ringattn.cache.snapshot",
)

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


if not TYPE_CHECKING:  # to a type checker, a module with __getattr__ has every name

    def __getattr__(name: str) -> object:
        """Returns a public name of `_LAZY_MODULES`, and keeps it."""
        if name in __all__:
            for module in _LAZY_MODULES:
                if hasattr(found := import_module(module), name):
                    return globals().setdefault(name, getattr(found, name))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
