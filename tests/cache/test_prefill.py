"""Prefill: pass-KV or pass-Q, whichever is fewer bytes, with the same result."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ringattn
from ringattn import (
    DistributedKVCache,
    Layout,
    MaskError,
    causal,
    contiguous,
    documents,
    sliding_window,
    striped,
    zigzag,
)
from ringattn.cache import prefill
from ringattn.plan.payload import AttentionShape, Payload
from tests.attention.test_bytes import counted_bytes
from tests.harness.cases import tensors
from tests.harness.compare import assert_close, assert_within_rule
from tests.harness.oracle import dense_attention, plain_attention
from tests.harness.ranks import RankPool

CHUNKS = (13, 1, 30, 0, 7)


def allowed(start: int, stop: int, window: int | None) -> Tensor:
    q, k = torch.arange(start, stop)[:, None], torch.arange(stop)[None, :]
    return (k <= q) if window is None else (k <= q) & (k >= q - window)


def in_chunks(
    group: dist.ProcessGroup, dtype: torch.dtype, kv_heads: int, window: int | None, forced: bool | None
) -> list[tuple[Tensor, bool, int, int]]:
    """For each chunk: the whole output, whether queries moved, the bytes predicted, and the bytes sent."""
    world, total = group.size(), sum(CHUNKS)
    t = tensors(7, 1, total, total, 8, kv_heads, 8, 6, dtype)
    cache = DistributedKVCache(
        num_layers=1, num_kv_heads=kv_heads, head_dim=8, v_head_dim=6,
        num_pages=60, page_size=4, dtype=dtype, group=group,
    )  # fmt: skip
    sequence, start, found = cache.new(), 0, []
    layouts = (zigzag, contiguous, striped, zigzag, contiguous)
    original = prefill.queries_move
    decided: list[bool] = []

    def deciding(*args: Any) -> bool:
        decided.append(original(*args) if forced is None else forced)
        return decided[-1]

    with patch.object(prefill, "queries_move", deciding):
        for length, make in zip(CHUNKS, layouts, strict=True):
            layout: Layout = make(length, world)
            extension = cache.extend([sequence], layout)
            mine = start + layout.positions(group.rank())
            mask = causal() if window is None else sliding_window(window)
            with counted_bytes() as sent:
                q, k, v = (x[:, mine] for x in t[:3])
                out = ringattn.prefill_attention(q, k, v, cache, 0, extension, mask=mask)
            whole = ringattn.unshard(out, layout, group)
            queries, keys = prefill._layouts(cache, extension)
            carried = Payload.Q if decided[-1] else Payload.KV
            sizes = AttentionShape(1, 8, kv_heads, 8, 6, dtype.itemsize, 8 if dtype == torch.float64 else 4)
            predicted = prefill.bytes_moved(carried, (mask,), queries, keys, sizes)
            found.append((whole, decided[-1], predicted, sum(sent)))
            start += length
    return found


@pytest.mark.parametrize("forced", [None, False, True])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_chunks_by_either_way(pool: RankPool, world_size: int, window: int | None, forced: bool | None) -> None:
    total = sum(CHUNKS)
    t = tensors(7, 1, total, total, 8, 2, 8, 6, torch.float64)
    ranks = pool.run(in_chunks, world_size, torch.float64, 2, window, forced)
    start = 0
    for chunk, length in enumerate(CHUNKS):
        stop = start + length
        expected, _ = dense_attention(t.q[:, start:stop], t.k[:, :stop], t.v[:, :stop], allowed(start, stop, window))
        for found in ranks:
            assert_close(found[chunk][0], expected, atol=1e-10, name=f"chunk {chunk}")
        assert len({found[chunk][1:3] for found in ranks}) == 1
        assert sum(found[chunk][3] for found in ranks) == ranks[0][chunk][2]
        start = stop


def test_queries_move_when_few_of_them_meet_a_long_cache(pool: RankPool) -> None:
    (one, *_) = pool.run(in_chunks, 2, torch.float64, 2, None, None)
    assert [by_queries for _, by_queries, *_ in one][:2] == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy_follows_the_dtype(pool: RankPool, dtype: torch.dtype) -> None:
    t = tensors(7, 1, sum(CHUNKS), sum(CHUNKS), 8, 2, 8, 6, dtype)
    start, stop = sum(CHUNKS[:2]), sum(CHUNKS[:3])
    q, k, v = t.q[:, start:stop], t.k[:, :stop], t.v[:, :stop]
    expected, _ = dense_attention(q, k, v, allowed(start, stop, None))
    plain, _ = plain_attention(q, k, v, allowed(start, stop, None))
    for forced in (False, True):
        for found in pool.run(in_chunks, 3, dtype, 2, None, forced):
            assert_within_rule(found[2][0], expected, plain, name="chunk")


def make_wrong(group: dist.ProcessGroup, wrong: str) -> None:
    world = group.size()
    cache = DistributedKVCache(
        num_layers=1, num_kv_heads=2, head_dim=8, num_pages=9, page_size=4, dtype=torch.float32, group=group
    )
    sequences = [cache.new(), cache.new()]
    layout = zigzag(4 * world, world)
    extension = cache.extend(sequences[: 2 if wrong == "two sequences" else 1], 4 if wrong == "a number" else layout)
    q, k = torch.ones(1, 4, 4, 8), torch.ones(1, 4, 2, 8)
    options: dict[str, Any] = {"scale": 0.1 + len(wrong)}  # a signature that was not agreed on before
    if wrong == "a row too many on one rank" and not group.rank():
        q = torch.ones(1, 5, 4, 8)
    if wrong == "documents":
        options["mask"] = documents([0, 3])
    if wrong.startswith("later"):
        ringattn.prefill_attention(q, k, k, cache, 0, extension, **options)
        q = q.double() if wrong == "later, another dtype" else q[..., :4]
    before = [p.clone().view(torch.int32) for p in cache.pools(0)]
    try:
        ringattn.prefill_attention(q, k, k, cache, 0, extension, **options)
    finally:
        assert all(torch.equal(a, b.view(torch.int32)) for a, b in zip(before, cache.pools(0), strict=True))


WRONG = {
    "two sequences": ("ArgumentError", "takes an extension of one sequence"),
    "a number": ("ArgumentError", "made by a layout"),
    "a row too many on one rank": ("ArgumentError", "on rank 0 of 3: q has (sequences, rows) = (1, 5)"),
    "later, another dtype": ("ArgumentError", "q is torch.float64"),
    "later, another dim": ("ArgumentError", "q has head_dim 4"),
    "documents": (MaskError.__name__, "cu_seqlens ends at 3"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_every_rank_raises_and_nothing_is_written(pool: RankPool, wrong: str) -> None:
    kind, message = WRONG[wrong]
    for error in pool.expect_error(make_wrong, 3, wrong):
        assert error.type_name == kind
        assert message in error.message
