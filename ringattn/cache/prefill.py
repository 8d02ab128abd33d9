"""Attention of new tokens, each of which one rank computes, to a cache distributed over the ranks.

The slots of a sequence are a layout of its keys over the ranks, and the new tokens are a layout of queries in the same
positions. So a prefill runs a plan, as training does. Either keys and values move to the queries (pass-KV), or queries
move to the keys and their partial results move back (pass-Q), whichever is fewer bytes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from ringattn.attention.execution_plan import ExecutionPlan, TensorSpec, without_tensors
from ringattn.attention.executor import execute
from ringattn.attention.movement import Forward, ForwardByQueries
from ringattn.cache.cache_call import CacheCall, CacheOptions, hashable_or_none, prepare_call
from ringattn.cache.kv_cache import DistributedKVCache
from ringattn.cache.pages import SlotAllocation
from ringattn.errors import ArgumentError
from ringattn.geometry.layout import Layout
from ringattn.geometry.masks import Mask, causal
from ringattn.kernels import BlockKernel, Keys, Queries, select
from ringattn.plan.comm_pattern import CommPattern
from ringattn.plan.exchanges import Gather, build_plan
from ringattn.plan.payload import AttentionShape, Payload
from ringattn.plan.plan import Phase
from ringattn.score import Score
from ringattn.softmax import add_sink_, empty_state


@torch.no_grad()
def prefill_attention(
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
    """Writes the keys and values of a sequence's new tokens to a cache, and attends from the tokens to all its keys.

    The new tokens are sharded by a layout, and see each other too, as the mask says. The result is the one of a single
    process that stores everything. All ranks of the cache's group call this together. A long prompt may be split into
    chunks, each with its own extension; a conversation may go on with a prefill after decoding. It is not
    differentiable.

    Args:
        q: queries of the new tokens that this rank computes, (1, S_local, H, D), in the cache's dtype; H % H_kv == 0.
        k: their keys, (1, S_local, H_kv, D).
        v: their values, (1, S_local, H_kv, Dv).
        cache: stores the keys and values.
        layer: from 0.
        extension: the result of `cache.extend([sequence], layout)`, for the layout of the new tokens.
        mask: which keys each query sees, in global positions over the sequence as long as it is now; None is causal().
            Evicted keys are not seen.
        scale: factor on q·k before the softmax, dimensionless; None is D ** -0.5.
        softcap: scores become softcap * tanh(score / softcap); positive; None leaves them.
        sink: (H,) learned logits that take part in each row's denominator; the same on all ranks.
        backend: a name from `ringattn info`; None takes the first that supports the call.
    Returns:
        (1, S_local, H, Dv) in q.dtype; accumulated in fp32 (float64 for float64).
    Raises:
        ArgumentError, MaskError, BackendError: if an argument is not valid; on every rank.
        DisagreementError: if the ranks' calls differ; on every rank. The ranks are compared on the first call with an
            extension, and not afterwards. On CUDA also for a difference that an earlier decoding call has found.
    Communication: whichever is fewer bytes over all ranks. Pass-KV sends each key and value to each rank that has a
        query which sees it, H_kv (D + Dv) elements per row. Pass-Q sends each query to each rank that stores a key
        which it sees, H D elements per row, and H (Dv + 1) elements back in the accumulation dtype. In addition one
        all-gather of a few hundred bytes for each extension.
    Source: Yang et al. 2024, arXiv:2411.01783.
    """
    cache.mark_check.raise_pending()
    mask = causal() if mask is None else mask
    options = CacheOptions("prefill_attention", mask, Score(scale, softcap, sink), backend)
    kernel, score = _prepare(CacheCall(q, k, v, cache, layer, extension, options))
    layout, kv_layout = _layouts(cache, extension)
    mask.slices(layout.seq_len, kv_layout.seq_len)  # raises if the mask does not fit, before anything is written
    cache.write(layer, extension, k, v)
    keys = Keys(*cache.read(layer, extension.sequences[0]))
    tensors = TensorSpec(1, q.shape[2], keys.k.shape[2], q.shape[3], keys.v.shape[3], q.dtype)
    phase = Phase.FORWARD_BY_QUERIES if queries_move((mask,), layout, kv_layout, tensors.shape) else Phase.FORWARD
    mesh, options_only = cache.mesh, without_tensors(score)
    plan = _execution_plan(mask, layout, kv_layout, mesh.rank, phase, tensors, kernel, options_only)
    state = empty_state(q, keys.v.shape[3])
    kind = ForwardByQueries if phase is Phase.FORWARD_BY_QUERIES else Forward
    movement = kind(plan.headwise, [Queries(q)], [state], [keys])
    execute(plan.compiled(mesh, backward=False), mesh, movement)
    if score.sink is not None:
        add_sink_(state.out, state.lse, score.sink)
    return state.out.to(q.dtype)


@lru_cache(maxsize=64)
def _execution_plan(
    mask: Mask,
    layout: Layout,
    kv_layout: Layout,
    rank: int,
    phase: Phase,
    tensors: TensorSpec,
    kernel: BlockKernel,
    score: Score,
) -> ExecutionPlan:
    """Returns how a rank runs a prefill; the same for all layers."""
    exchange = Gather() if phase is Phase.FORWARD_BY_QUERIES else Gather(layout.world_size)
    plan = build_plan(exchange, (mask,), layout, kv_layout, rank, forward=phase)
    chunks = (layout.num_tokens(rank),), (kv_layout.num_tokens(rank),)
    return ExecutionPlan(plan, None, kernel, score, tensors, *chunks, returns_lse=False, wanted=(False, False))


@lru_cache(maxsize=64)
def queries_move(masks: tuple[Mask, ...], layout: Layout, kv_layout: Layout, shape: AttentionShape) -> bool:
    """Returns whether pass-Q sends fewer bytes than pass-KV, over all ranks.

    Args:
        masks: of the plan.
        layout: of the queries.
        kv_layout: of the keys and values.
        shape: of the tensors.
    """
    q_bytes, kv_bytes = (bytes_moved(payload, masks, layout, kv_layout, shape) for payload in (Payload.Q, Payload.KV))
    return q_bytes < kv_bytes


def bytes_moved(
    payload: Payload, masks: tuple[Mask, ...], layout: Layout, kv_layout: Layout, shape: AttentionShape
) -> int:
    """Returns the bytes that all ranks together send by pass-KV, or by pass-Q with the partial results."""
    rows, _ = Gather().rows_moved(CommPattern(payload, masks, layout, kv_layout))
    returning = shape.row_bytes(Payload.STATE) if payload is Payload.Q else 0
    return rows * (shape.row_bytes(payload) + returning)


def _layouts(cache: DistributedKVCache, extension: SlotAllocation) -> tuple[Layout, Layout]:
    """Returns the layouts of the queries and of the keys, in positions of the sequence."""
    kv_layout = cache.key_layout(extension)
    assert extension.layout is not None
    return _shifted(extension.layout, extension.starts[0]), kv_layout


@lru_cache(maxsize=64)
def _shifted(layout: Layout, start: int) -> Layout:
    """Returns the layout with all positions moved up by `start`."""
    ranges = tuple(tuple(range(r.start + start, r.stop + start, r.step) for r in own) for own in layout.rank_ranges)
    return Layout(start + layout.seq_len, ranges, f"{layout} from {start}", whole=False)


def _prepare(call: CacheCall) -> tuple[BlockKernel, Score]:
    """Checks a call, and returns the kernel and the resolved score."""
    q, cache, extension = call.q, call.cache, call.extension

    def check() -> None:
        if extension.layout is None or len(extension.sequences) != 1:
            raise ArgumentError("extension: a prefill takes an extension of one sequence, made by a layout")
        _check_rows(q, cache, extension)

    def fingerprint(_: BlockKernel) -> Mapping[str, str]:
        return {}

    signature = _signature(call)
    prepared = prepare_call(call, signature=signature, check=check, select=select, fingerprint=fingerprint)
    _check_rows(q, cache, extension)
    return prepared


def _signature(call: CacheCall) -> Hashable | None:
    """Returns the signature of a call: the same on every rank, so without this rank's number of rows."""
    q, extension = call.q, call.extension
    tensor = (q.dtype, q.device, q.shape[2:]) if isinstance(q, Tensor) else q
    allocation = (extension.sequences, extension.versions, extension.starts, extension.layout)
    return hashable_or_none((call.options.signature(), tensor, call.cache.spec, allocation))


def _check_rows(q: Tensor, cache: DistributedKVCache, extension: SlotAllocation) -> None:
    rows = 0 if extension.layout is None else extension.layout.num_tokens(cache.mesh.rank)
    if q.shape[:2] != (1, rows):
        raise ArgumentError(f"q has (sequences, rows) = {tuple(q.shape[:2])}: the extension has (1, {rows}) here")
