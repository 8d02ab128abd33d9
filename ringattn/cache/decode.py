"""Attention of new tokens, which every rank has, to a cache distributed over the ranks: one collective per layer.

Each rank attends to the keys that it stores. The ranks exchange only these partial results, an output and a
log-sum-exp per row, and merge them in order of rank. So the result is the same to the bit on all ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.cache.cache_call import CacheCall, CacheOptions, hashable_or_none, prepare_call
from ringattn.cache.call_marks import MarkCheck, mark_field
from ringattn.cache.kv_cache import DistributedKVCache
from ringattn.cache.pages import SlotAllocation
from ringattn.comm.collectives import PersistentCollective, all_gather, all_to_all, capacity_bytes_for
from ringattn.comm.packet import Field, Packet
from ringattn.errors import ArgumentError
from ringattn.geometry.layout import contiguous
from ringattn.geometry.masks import Mask, causal
from ringattn.geometry.visible_keys import visible_key_ranges
from ringattn.kernels import Queries, State
from ringattn.kernels.paged import PagedKernel, Pools, VisibleKeys, select_paged
from ringattn.score import Score
from ringattn.softmax import accumulation_dtype


@torch.no_grad()
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: DistributedKVCache,
    layer: int,
    extension: SlotAllocation,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Writes the keys and values of new tokens to a cache, and attends from the tokens to all keys of their sequences.

    The new tokens see each other too, as the mask says. All ranks of the cache's group call this together with the same
    tensors; the result is the same to the bit on all of them. It is not differentiable.

    Args:
        q: queries of the new tokens, (B, T, H, D), for B sequences with T tokens each, in the cache's dtype;
            H % H_kv == 0.
        k: keys of the new tokens, (B, T, H_kv, D).
        v: values of the new tokens, (B, T, H_kv, Dv).
        cache: stores the keys and values.
        layer: from 0.
        extension: the result of `cache.extend(sequences, T)` for the B sequences.
        mask: which keys each query sees, in global positions over the sequence as long as it is now; None is causal().
            Each query must see one run of positions. Evicted keys are not seen.
        scale: factor on q·k before the softmax, dimensionless; None is D ** -0.5.
        softcap: scores become softcap * tanh(score / softcap); positive; None leaves them.
        sink: (H,) learned logits that take part in each row's denominator; the same on all ranks.
        backend: a name in kernels.paged.PAGED_BACKENDS; None takes the first that supports the call.
    Returns:
        (B, T, H, Dv) in q.dtype; accumulated in fp32 (float64 for float64).
    Raises:
        ArgumentError, MaskError, BackendError: if an argument is not valid; nothing is written.
        DisagreementError: if the ranks' calls differ, this one or earlier ones. Only the new slots of this layer have
            been written. If this call differed, the same extension may be used again, or truncated. If earlier calls
            differed, continue with a snapshot or a new cache. On CUDA no layer waits for the host: the next call that
            changes or saves the cache (`extend`, `truncate`, `free`, `prefill_attention`, `save_cache`, ...) raises
            the error before it changes anything, and results since the differing call are void. Ranks with different
            numbers of queries are found by NCCL's timeout only.
    Communication: one all-gather (on CPUs, one message between each pair of ranks, all at once); each rank sends
        (W - 1) x (B T H (Dv + 1) a + 8) bytes, where a is 4 (8 for float64) whatever q.dtype. The first call of a
        signature (shapes, options) adds one all-gather of a few hundred bytes.
    Source: flash-decoding over ranks. The exchange is the one of Tree Attention, Shyam et al. 2024, arXiv:2408.04093,
        in one message instead of three.
    """
    options = CacheOptions("decode_attention", mask, Score(scale, softcap, sink), backend)
    call = CacheCall(q, k, v, cache, layer, extension, options)
    kernel, score = _prepare(call)
    collective = _collective_for(call, gather_results)
    _attend_locally(call, kernel, score, collective)
    return _exchange_and_merge(collective, cache.mark_check, kernel, score.sink).to(q.dtype)


@torch.no_grad()
def decode_attention_by_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: DistributedKVCache,
    layer: int,
    extension: SlotAllocation,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`decode_attention` with a result that is sharded by heads, for an output projection that is sharded by heads.

    It has the arguments and errors of `decode_attention`.

    Returns:
        (B, T, H_own, Dv) in q.dtype: the heads `contiguous(H, W).positions(rank)`.
    Communication: one all-to-all; each rank sends B T (H - H_own) (Dv + 1) a + 8 (W - 1) bytes, where a is 4 (8 for
        float64).
    """
    options = CacheOptions("decode_attention_by_heads", mask, Score(scale, softcap, sink), backend)
    call = CacheCall(q, k, v, cache, layer, extension, options)
    kernel, score = _prepare(call)
    collective = _collective_for(call, exchange_results_by_head)
    _attend_locally(call, kernel, score, collective)
    own = score.of_heads(_heads_of(cache.mesh.rank, q.shape[2], cache.mesh.size))
    return _exchange_and_merge(collective, cache.mark_check, kernel, own.sink).to(q.dtype)


def gather_results(
    fields: Sequence[Field], capacity_bytes: int, group: dist.ProcessGroup, device: torch.device
) -> PersistentCollective:
    """Returns the collective that sends the partial results of all heads to every rank.

    Args:
        fields: from `result_fields`.
        capacity_bytes: from `capacity_bytes_for`.
        group: the ranks.
        device: of the tensors.
    """
    return all_gather(fields, capacity_bytes, group, device)


def exchange_results_by_head(
    fields: Sequence[Field], capacity_bytes: int, group: dist.ProcessGroup, device: torch.device
) -> PersistentCollective:
    """Returns the collective that sends to each rank the partial results of its heads; args as in `gather_results`."""
    local = Packet.empty(fields, device).tensors
    mark, out, lse = local
    by_rank = [_heads_of(rank, out.shape[2], group.size()) for rank in range(group.size())]
    send_views = [(mark, out[:, :, heads.start : heads.stop], lse[:, heads.start : heads.stop]) for heads in by_rank]
    return all_to_all(local, send_views, capacity_bytes, group, device)


@lru_cache(maxsize=64)
def result_fields(rows: torch.Size, v_head_dim: int, dtype: torch.dtype) -> tuple[Field, Field, Field]:
    """Returns the packet fields of a rank's partial result: a call mark, the output and the log-sum-exp of each row.

    Args:
        rows: (B, T, H).
        v_head_dim: dim of the output.
        dtype: of output and log-sum-exp.
    """
    batch, tokens, heads = rows
    return mark_field(dtype), Field((batch, tokens, heads, v_head_dim), dtype), Field((batch, heads, tokens), dtype)


def _heads_of(rank: int, num_heads: int, world_size: int) -> range:
    """Returns the query heads of a rank."""
    runs = contiguous(num_heads, world_size).ranges(rank)
    return runs[0] if runs else range(0)


def _collective_for(call: CacheCall, create: Callable[..., PersistentCollective]) -> PersistentCollective:
    """Returns the collective of a call; all layers and all steps of equal shapes share it."""
    q, cache, group = call.q, call.cache, call.cache.mesh.axes[0].group
    fields = result_fields(q.shape[:3], cache.spec.v_head_dim, accumulation_dtype(q.dtype))
    capacity_bytes = capacity_bytes_for(fields, group)
    key = call.options.operation, q.shape, q.device, capacity_bytes
    return cache.collective(key, lambda: create(fields, capacity_bytes, group, q.device))


def _attend_locally(call: CacheCall, kernel: PagedKernel, score: Score, collective: PersistentCollective) -> None:
    """Writes the call mark, and the attention to the keys that this rank stores, into the send buffer."""
    q, cache, extension, options = call.q, call.cache, call.extension, call.options
    mark, out, lse = collective.local
    out.zero_()
    lse.fill_(-torch.inf)
    digest = None if options.mask is None else options.mask.digest
    numbers = (options.operation, score.scale, score.softcap)
    call_digest = _call_digest(call.layer, extension.sequences, q.shape[:3], digest, numbers)
    cache.mark_check.write(mark.view(torch.int32), cache.pages.history_digest32, call_digest)
    tables = cache.page_tables(extension)
    visible = _visible_keys(extension.starts, extension.num_tokens, options.mask, q.device)
    if len(tables.pages) and q.numel():
        pools = Pools(*cache.pools(call.layer))
        kernel.forward(Queries(q), pools, tables, visible, score, State(out, lse))


def _exchange_and_merge(
    collective: PersistentCollective, mark_check: MarkCheck, kernel: PagedKernel, sink: Tensor | None
) -> Tensor:
    """Runs the collective, compares the call marks, and merges the partial results of all ranks."""
    collective.run()
    marks, outs, lses = collective.received
    mark_check.compare(marks.view(torch.int32))
    return kernel.merge(outs, lses, collective.first_rank, sink)


@lru_cache(maxsize=1024, typed=True)
def _call_digest(
    layer: int, sequences: tuple[int, ...], rows: torch.Size, mask: str | None, options: tuple[object, ...]
) -> int:
    """Returns a digest of a call as a signed 32-bit integer; the same for a layer in every step."""
    text = repr((layer, sequences, tuple(rows), mask, options)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little", signed=True)


@lru_cache(maxsize=64)
def _visible_keys(starts: tuple[int, ...], num_tokens: int, mask: Mask | None, device: torch.device) -> VisibleKeys:
    """Returns the range of positions that each new token sees; the same in every layer."""
    mask = causal() if mask is None else mask
    ranges = np.stack([visible_key_ranges(mask, start, start + num_tokens) for start in starts])
    first, stop = (torch.from_numpy(ranges[:, :, column].astype(np.int32)).to(device) for column in (0, 1))
    return VisibleKeys(first, stop)


def _prepare(call: CacheCall) -> tuple[PagedKernel, Score]:
    """Checks a call, writes the new keys and values, and returns the kernel and the resolved score."""
    q, k, v, cache, layer, extension, options = call

    def check() -> None:
        if extension.layout is not None:
            raise ArgumentError("extension: made by a layout, for prefill_attention; decoding takes a number of tokens")
        expected = (len(extension.sequences), extension.num_tokens)
        if q.shape[:2] != expected:
            raise ArgumentError(f"q has (sequences, tokens) = {tuple(q.shape[:2])}: the extension has {expected}")

    def fingerprint(kernel: PagedKernel) -> Mapping[str, str]:
        return {"q": str(tuple(q.shape)), "the kernel": kernel.name}

    tensors = tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in (q, k, v))
    layout = getattr(extension, "layout", None)
    signature = hashable_or_none((options.signature(), tensors, cache.spec, layout))
    prepared = prepare_call(call, signature=signature, check=check, select=select_paged, fingerprint=fingerprint)
    # Raises if the mask does not fit, before anything is written.
    _visible_keys(extension.starts, extension.num_tokens, options.mask, q.device)
    cache.write(layer, extension, k, v)
    return prepared
