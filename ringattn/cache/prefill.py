"""Attention of new tokens, each computed by one rank, to a cache of which every rank has a part.

What the ranks hold of a sequence is a layout of its keys, and the new tokens are a layout of queries in the same
positions. So this is attention as in training, with a plan: keys and values come to the queries; or queries go to the
keys, and what they find comes home, if that is fewer bytes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from ringattn.attention.block_buffers import BlockBuffers
from ringattn.attention.chunked_rows import ChunkedRows
from ringattn.attention.executor import ExecutionPlan, run_forward
from ringattn.cache.cache_call import CacheCall, CacheOptions, hashable_key, prepare_call
from ringattn.cache.kv_cache import DistributedKVCache
from ringattn.cache.pages import SlotAllocation
from ringattn.comm.all_to_all import AllToAll
from ringattn.comm.packet import Field, Packet
from ringattn.errors import ArgumentError
from ringattn.geometry.layout import Layout
from ringattn.geometry.masks import Mask, causal
from ringattn.geometry.rows import count_rows
from ringattn.kernels import BlockKernel, Keys, Queries, State, select
from ringattn.plan.comm_pattern import CommPattern
from ringattn.plan.exchanges import Gather, build_plan
from ringattn.plan.head_shards import all_heads
from ringattn.plan.payload import AttentionShape, Payload
from ringattn.score import Score
from ringattn.softmax import accumulation_dtype, add_sink_, empty_state, merge_
from ringattn.types import Rows


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
    """Attention of a sequence's new tokens, sharded by a layout, to all that the cache holds of it, them included.

    Puts k and v in their places first. The result is that of one process which holds everything. All ranks of the
    cache's group call it together. A long prompt may come in chunks, each an extension of its own; so may the
    next turn of a conversation, after decoding. It takes no part in autograd.

    Args:
        q: queries of the new tokens that this rank computes, (1, S_local, H, D), in the cache's dtype; H % H_kv == 0.
        k: their keys, (1, S_local, H_kv, D).
        v: their values, (1, S_local, H_kv, Dv).
        cache: where they go, and what they attend to.
        layer: which, from 0.
        extension: what `cache.extend([sequence], layout)` returned, `layout` being that of the new tokens.
        mask: who sees whom, in global positions, over the sequence as long as it is now; None is causal(). What was
            evicted is not there to be seen.
        scale: softmax scale, dimensionless; D ** -0.5 if None.
        softcap: scores become softcap * tanh(score / softcap); positive; None leaves them.
        sink: (H,) learned logits that take part in each row's denominator; the same on all ranks.
        backend: a name out of `ringattn info`; None takes the first that can.
    Returns:
        (1, S_local, H, Dv) in q.dtype; accumulated in fp32 (float64 for float64).
    Raises:
        ArgumentError, MaskError, BackendError: when something is not allowed. DisagreementError when the ranks do not
            ask for the same. On every rank, on the first call with an extension, after which they are not compared;
            on CUDA also what decoding has found before.
    Communication: what is fewer bytes over all ranks: each key and value that some query of a rank sees, to
        that rank, H_kv (D + Dv) elements a row; or each query to each rank that holds keys which it sees, H D elements,
        and back H (Dv + 1) in the accumulation dtype. One all-gather of a few hundred bytes for each extension.
    Source: Yang et al. 2024, arXiv:2411.01783.
    """
    cache.agreement.settle()
    mask = causal() if mask is None else mask
    options = CacheOptions("prefill_attention", mask, scale, softcap, backend)
    kernel, score = _prepare(CacheCall(q, k, v, sink, cache, layer, extension, options))
    layout, kv_layout = _layouts(cache, extension)
    mask.slices(layout.seq_len, kv_layout.seq_len)  # a mask that does not fit raises before anything is written
    cache.write(layer, extension, k, v)
    keys = Keys(*cache.held(layer, extension.sequences[0]))
    if queries_move((mask,), layout, kv_layout, _sizes(q, cache)):
        travel = CommPattern(Payload.Q, (mask,), layout, kv_layout)
        out, lse = _move_queries(travel, cache, q, keys, kernel, score)
        if sink is not None:
            add_sink_(out, lse, sink)
    else:
        team = cache.team
        plan = build_plan(Gather(team.size), (mask,), layout, kv_layout, team.rank)
        heads = all_heads(q.shape[2], keys.k.shape[2]).runs()
        job = ExecutionPlan(plan, None, kernel, score, heads, False, (False, False))
        out, _ = state = empty_state(q, keys.v.shape[3])
        run_forward(job, team, [Queries(q)], [keys], [state], sink)
    return out.to(q.dtype)


@lru_cache(maxsize=64)
def queries_move(masks: tuple[Mask, ...], layout: Layout, kv_layout: Layout, sizes: AttentionShape) -> bool:
    """Returns whether it is fewer bytes, over all ranks, to pass queries and their results than keys and values.

    Args:
        masks, layout, kv_layout: of the plan.
        sizes: of the tensors.
    """
    by_queries, by_keys = (bytes_moved(carried, masks, layout, kv_layout, sizes) for carried in (Payload.Q, Payload.KV))
    return by_queries < by_keys


def bytes_moved(
    carried: Payload, masks: tuple[Mask, ...], layout: Layout, kv_layout: Layout, sizes: AttentionShape
) -> int:
    """Returns the bytes that all ranks together send when keys and values travel, or queries and their results."""
    rows, _ = Gather().rows_moved(CommPattern(carried, masks, layout, kv_layout))
    if carried is Payload.KV:
        return rows * sizes.row_bytes(Payload.KV)
    there = sizes.head_dim * sizes.itemsize
    back = (sizes.v_head_dim + 1) * sizes.sum_itemsize
    return rows * sizes.batch * sizes.heads * (there + back)


def _sizes(q: Tensor, cache: DistributedKVCache) -> AttentionShape:
    form = cache.form
    wide = accumulation_dtype(q.dtype).itemsize
    return AttentionShape(1, q.shape[2], form.num_kv_heads, form.head_dim, form.v_head_dim, q.dtype.itemsize, wide)


def _layouts(cache: DistributedKVCache, extension: SlotAllocation) -> tuple[Layout, Layout]:
    """Returns who has which queries, and who holds which keys, in positions of the sequence."""
    kv_layout = cache.key_layout(extension)
    assert extension.layout is not None
    return _shifted(extension.layout, extension.starts[0]), kv_layout


@lru_cache(maxsize=64)
def _shifted(layout: Layout, start: int) -> Layout:
    ranges = tuple(tuple(range(r.start + start, r.stop + start, r.step) for r in own) for own in layout.rank_ranges)
    return Layout(start + layout.seq_len, ranges, f"{layout} from {start}", whole=False)


def _prepare(call: CacheCall) -> tuple[BlockKernel, Score]:
    """Checks a call, and returns what runs it."""
    q, cache, extension = call.q, call.cache, call.extension

    def check() -> None:
        if extension.layout is None or len(extension.sequences) != 1:
            raise ArgumentError("extension: a prefill takes one of one sequence, made by a layout")
        _check_rows(q, cache, extension)

    def alike(_: BlockKernel) -> Mapping[str, str]:
        return {}

    found = prepare_call(call, key=_signature(call), check=check, select=select, alike=alike)
    _check_rows(q, cache, extension)
    return found


def _signature(call: CacheCall) -> Hashable | None:
    """Returns what decides a call: the same on every rank, so without this one's number of rows."""
    q, sink, extension = call.q, call.sink, call.extension
    looks = [(x.dtype, x.device) if isinstance(x, Tensor) else x for x in (q, sink)]
    shapes = q.shape[2:] if isinstance(q, Tensor) else None, getattr(sink, "shape", None)
    place = (extension.sequences, extension.versions, extension.starts, extension.layout)
    return hashable_key((call.options, *looks, shapes, call.cache.form, place))


def _check_rows(q: Tensor, cache: DistributedKVCache, extension: SlotAllocation) -> None:
    rows = 0 if extension.layout is None else extension.layout.num_tokens(cache.team.rank)
    if q.shape[:2] != (1, rows):
        raise ArgumentError(f"q has (sequences, rows) = {tuple(q.shape[:2])}: the extension has (1, {rows}) here")


def _move_queries(
    travel: CommPattern,
    cache: DistributedKVCache,
    q: Tensor,
    keys: Keys,
    kernel: BlockKernel,
    score: Score,
) -> State:
    """Returns (out, lse) of this rank's queries: they go to whoever holds keys for them, and what is found comes home.

    Communication: each query once to each rank that it needs; its output and lse once back.
    """
    team = cache.team
    program = Gather().program(travel, team.rank, backward=False)
    blocks = BlockBuffers(program, team, team.rank, ChunkedRows([(q.transpose(1, 2),)]))
    v_dim = keys.v.shape[3]
    state = empty_state(q, v_dim)
    answers: list[Packet | None] = [None] * team.size
    for step in program.steps:
        blocks.begin(step)
        for visit in step.visits:
            (came,) = blocks.carried(visit.piece)
            if visit.piece.block == team.rank:
                kernel.forward(Queries(q), keys, visit.tiles, score, state)
                continue
            asked = came.transpose(1, 2)
            answer = Packet.empty(_result_fields(asked, v_dim, asked.shape[1]), q.device)
            part_out, part_lse = answer.tensors
            kernel.forward(Queries(asked), keys, visit.tiles, score, empty_state(asked, v_dim, part_out, part_lse))
            answers[visit.piece.block] = answer
        blocks.end(step)
    blocks.finish()
    given = travel.rows_given(team.rank)
    fields = [_result_fields(q, v_dim, count_rows(given.get(peer, ()))) for peer in range(team.size)]
    found = AllToAll(team.axes[0], answers, fields).wait()
    for peer in sorted(given):  # always in the same order, so that results do not depend on who was first
        part, part_lse = found[peer].tensors
        _merge_rows(*state, part, part_lse, given[peer])
    return state


def _result_fields(q: Tensor, v_dim: int, rows: int) -> list[Field]:
    """What a rank tells of others' queries."""
    dtype = accumulation_dtype(q.dtype)
    return [Field((q.shape[0], rows, q.shape[2], v_dim), dtype), Field((q.shape[0], q.shape[2], rows), dtype)]


def _merge_rows(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: Rows) -> None:
    start = 0
    for run in rows:
        here, there = slice(run.start, run.stop), slice(start, start + len(run))
        merge_(out[:, here], lse[:, :, here], part[:, there], part_lse[:, :, there])
        start += len(run)
