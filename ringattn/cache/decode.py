"""Attention of new tokens, which every rank has, to a cache of which every rank has a part: one collective a layer.

Each rank attends to the keys that it holds. What comes of it, an output and a log-sum-exp for each row, is all that
is exchanged, and merged in the order of ranks. So what all ranks have computed is the same to the bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.cache.cache_call import CacheCall, CacheOptions, hashable_key, prepare_call
from ringattn.cache.call_marks import MarkCheck, mark_field
from ringattn.cache.kv_cache import DistributedKVCache
from ringattn.cache.pages import SlotAllocation
from ringattn.comm.collectives import PersistentCollective, all_gather, all_to_all, buffer_bytes_for
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
    """Attention of the new tokens of some sequences to all that the cache holds of them, the new ones included.

    Puts k and v in their places first. All ranks of the cache's group call it together, with the same tensors; the
    result is the same to the bit on all of them. It takes no part in autograd.

    Args:
        q: queries of the new tokens, (B, T, H, D), B sequences with T tokens each, in the cache's dtype; H % H_kv == 0.
        k: their keys, (B, T, H_kv, D).
        v: their values, (B, T, H_kv, Dv).
        cache: where they go, and what they attend to.
        layer: which, from 0.
        extension: what `cache.extend(sequences, T)` returned; the B sequences are its.
        mask: who sees whom, in global positions, over the sequence as long as it is now; None is causal(). Each query
            must see one run of positions; what was evicted is not there to be seen.
        scale: softmax scale, dimensionless; D ** -0.5 if None.
        softcap: scores become softcap * tanh(score / softcap); positive; None leaves them.
        sink: (H,) learned logits that take part in each row's denominator; the same on all ranks.
        backend: a name out of kernels.paged.PAGED_BACKENDS; None takes the first that can.
    Returns:
        (B, T, H, Dv) in q.dtype; accumulated in fp32 (float64 for float64).
    Raises:
        ArgumentError, MaskError, BackendError: when something is not allowed; nothing is written.
        DisagreementError: when the ranks do not ask for the same, or have not asked the same of the cache before. All
            that the cache held is as it was, so is the extension, and a call that is the same on all ranks may follow
            with it, or `truncate`; only its own places of this layer hold what was to be written. Ranks that have asked
            otherwise before go on with a snapshot, or a new cache. On CUDA, where no layer waits for the host, it
            is raised by what next builds on the cache's state (`extend`, `truncate`, `free`, `prefill_attention`,
            `save_cache`, ...), before it changes anything, and results since are void; ranks whose queries differ in
            number are found by NCCL's timeout only.
    Communication: one all-gather (on CPUs made of one message from each rank to each other, all at once); each rank
        sends (W - 1) x (B T H (Dv + 1) a + 8) bytes, a being 4 (8 for float64), whatever q.dtype.
        On the first call of a signature (shapes, options) one all-gather of a few hundred bytes more.
    Source: flash-decoding, over ranks; what is exchanged is that of Tree Attention, Shyam et al. 2024,
        arXiv:2408.04093, in one message instead of three.
    """
    options = CacheOptions("decode_attention", mask, scale, softcap, backend)
    call = CacheCall(q, k, v, sink, cache, layer, extension, options)
    kernel, score = _prepare(call)
    meeting = _collective(call, gather_results)
    _attend(call, kernel, score, meeting)
    return _merge(meeting, cache.agreement, kernel, sink).to(q.dtype)


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
    """The result of `decode_attention` for this rank's heads only, for a projection that is sharded by heads.

    Args, errors and the way of calling are those of `decode_attention`.

    Returns:
        (B, T, H_own, Dv) in q.dtype: of the heads `contiguous(H, W).positions(rank)`.
    Communication: one all-to-all, as above; each rank sends B T (H - H_own) (Dv + 1) a + 8 (W - 1) bytes.
    """
    options = CacheOptions("decode_attention_by_heads", mask, scale, softcap, backend)
    call = CacheCall(q, k, v, sink, cache, layer, extension, options)
    kernel, score = _prepare(call)
    meeting = _collective(call, exchange_results_by_head)
    _attend(call, kernel, score, meeting)
    own = _heads_of(cache.team.rank, q.shape[2], cache.team.size)
    return _merge(meeting, cache.agreement, kernel, None if sink is None else sink[own]).to(q.dtype)


def gather_results(
    fields: Sequence[Field], room: int, group: dist.ProcessGroup, device: torch.device
) -> PersistentCollective:
    """Returns where partial results of all heads are merged on every rank.

    Args:
        fields: from `result_fields`.
        room: from `buffer_bytes_for`.
        group: of the ranks.
        device: of the tensors.
    """
    return all_gather(fields, room, group, device)


def exchange_results_by_head(
    fields: Sequence[Field], room: int, group: dist.ProcessGroup, device: torch.device
) -> PersistentCollective:
    """Returns where partial results are merged for each rank's heads; see `gather_results`."""
    local = Packet.empty(fields, device).tensors
    mark, out, lse = local
    parts = [_heads_of(rank, out.shape[2], group.size()) for rank in range(group.size())]
    return all_to_all(local, [(mark, out[:, :, part], lse[:, part]) for part in parts], room, group, device)


def _heads_of(rank: int, heads: int, size: int) -> slice:
    runs = contiguous(heads, size).ranges(rank)
    return slice(runs[0].start, runs[0].stop) if runs else slice(0, 0)


@lru_cache(maxsize=64)
def result_fields(rows: torch.Size, v_head_dim: int, dtype: torch.dtype) -> tuple[Field, Field, Field]:
    """What a rank tells another: a mark of what was asked for, an output and a log-sum-exp for each row.

    Args:
        rows: (B, T, H).
        v_head_dim: of the output.
        dtype: of both.
    """
    batch, tokens, heads = rows
    return mark_field(dtype), Field((batch, tokens, heads, v_head_dim), dtype), Field((batch, heads, tokens), dtype)


def _collective(call: CacheCall, make: Callable[..., PersistentCollective]) -> PersistentCollective:
    """Returns the meeting of a call: in steps that are alike, the same for all layers."""
    q, cache, group = call.q, call.cache, call.cache.team.axes[0].group
    fields = result_fields(q.shape[:3], cache.form.v_head_dim, accumulation_dtype(q.dtype))
    room = buffer_bytes_for(fields, group)
    key = call.options.operation, q.shape, q.device, room
    return cache.meeting(key, lambda: make(fields, room, group, q.device))


def _merge(meeting: PersistentCollective, agreement: MarkCheck, kernel: PagedKernel, sink: Tensor | None) -> Tensor:
    """Merges what all ranks have found, if they were asked for the same."""
    meeting.hold()
    marks, outs, lses = meeting.parts
    agreement.compare(marks.view(torch.int32))
    return kernel.merge(outs, lses, meeting.first, sink)


@lru_cache(maxsize=1024, typed=True)
def _call_mark(
    layer: int, sequences: tuple[int, ...], rows: torch.Size, mask: str | None, options: tuple[object, ...]
) -> int:
    """Returns 32 bits that tell apart calls: the same for a layer in every step."""
    asked = repr((layer, sequences, tuple(rows), mask, options)).encode()
    return int.from_bytes(hashlib.blake2b(asked, digest_size=4).digest(), "little", signed=True)


def _attend(call: CacheCall, kernel: PagedKernel, score: Score, meeting: PersistentCollective) -> None:
    """Attends to what this rank holds, and writes down what it was asked for: before and now."""
    q, cache, extension, options = call.q, call.cache, call.extension, call.options
    mark, out, lse = meeting.local
    out.zero_()
    lse.fill_(-torch.inf)
    digest = None if options.mask is None else options.mask.digest
    rest = (options.operation, options.scale, options.softcap)
    now = _call_mark(call.layer, extension.sequences, q.shape[:3], digest, rest)
    cache.agreement.tell(mark.view(torch.int32), cache.pages.short_digest, now)
    tables = cache.page_tables(extension)
    visible = _visible(extension.starts, extension.num_tokens, options.mask, q.device)
    if len(tables.pages) and q.numel():
        pools = Pools(*cache.pools(call.layer))
        kernel.forward(Queries(q), pools, tables, visible, score, State(out, lse))


@lru_cache(maxsize=64)
def _visible(starts: tuple[int, ...], num_tokens: int, mask: Mask | None, device: torch.device) -> VisibleKeys:
    """What the new tokens see: the same in every layer."""
    mask = causal() if mask is None else mask
    rows = np.stack([visible_key_ranges(mask, start, start + num_tokens) for start in starts])
    first, stop = (torch.from_numpy(rows[:, :, column].astype(np.int32)).to(device) for column in (0, 1))
    return VisibleKeys(first, stop)


def _prepare(call: CacheCall) -> tuple[PagedKernel, Score]:
    """Checks a call, writes the new keys and values, and returns what runs it."""
    q, k, v, sink, cache, layer, extension, options = call

    def check() -> None:
        if extension.layout is not None:
            raise ArgumentError("extension: made by a layout, for prefill_attention; decoding takes a number of tokens")
        wanted = (len(extension.sequences), extension.num_tokens)
        if q.shape[:2] != wanted:
            raise ArgumentError(f"q has (sequences, tokens) = {tuple(q.shape[:2])}: the extension has {wanted}")

    def alike(kernel: PagedKernel) -> Mapping[str, str]:
        return {"q": str(tuple(q.shape)), "the kernel": kernel.name}

    tensors = tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in (q, k, v, sink))
    key = hashable_key((options, tensors, cache.form, getattr(extension, "layout", None)))
    found = prepare_call(call, key=key, check=check, select=select_paged, alike=alike)
    # A mask that does not fit raises before anything is written.
    _visible(extension.starts, extension.num_tokens, options.mask, q.device)
    cache.write(layer, extension, k, v)
    return found
