"""The forward kernel: attention of a block of queries over all tiles that touch it, merged into (out, lse).

The online softmax of FlashAttention, resumed: its running maximum, sum and weighted values start as the state so
far, and end as the new one. Inside, logarithms are to base 2.

Source: Dao 2023, arXiv:2307.08691; Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

import triton
import triton.language as tl

from ringattn.kernels.triton.args import LoadSource, OnlineSoftmax, ScoreArgs
from ringattn.kernels.triton.tile_io import (
    LOG2E,
    capped,
    entry_pointers,
    find_item,
    find_run,
    load_rows,
    load_step,
    of_head,
    range_in_run,
    row_pointers,
    seen,
    width_of,
)

LN2 = tl.constexpr(0.6931471805599453)
# The running maximum of nothing. Finite, so that differences to it are no NaN; less than any score.
LEAST = tl.constexpr(-3.0e38)


@triton.jit
def attend(
    q, keys, values, start, stop, sight, softmax, scores,
    DIM: tl.constexpr, V_DIM: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over keys [start, start + STEP). All are seen where `sight` is None."""
    k = load_step(keys, start, stop, STEP, DIM, sight is not None)
    x = capped(tl.dot(q, tl.trans(k), input_precision="ieee"), scores, q.dtype == tl.float32)
    if sight is not None:
        x = tl.where(seen(start + tl.arange(0, STEP)[None, :], sight), x, float("-inf"))
    most = tl.maximum(softmax.most, tl.max(x, 1) * scores.factor)
    p = tl.exp2(x * scores.factor - most[:, None])
    decay = tl.exp2(softmax.most - most)
    total = softmax.total * decay + tl.sum(p, 1)
    v = load_step(values, start, stop, STEP, V_DIM, sight is not None)
    acc = tl.dot(p.to(v.dtype), v, softmax.acc * decay[:, None], input_precision="ieee")
    return OnlineSoftmax(acc, total, most)


@triton.jit
def forward_kernel(
    q, k, v, k_described, v_described, out, lse, work, scores,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_STEP: tl.constexpr,
):  # fmt: skip
    """A program for each item and head: see schedule.py."""
    batch, head, first, full, edge, end = find_item(work)
    rows = first + tl.arange(0, BLOCK_M)
    q_block = load_rows(of_head(q, batch, head), first, work.num_rows, BLOCK_M, DIM, True)
    kv_head = head // work.group
    keys = LoadSource(k_described, of_head(k, batch, kv_head), batch, kv_head)
    values = LoadSource(v_described, of_head(v, batch, kv_head), batch, kv_head)
    lse_here = entry_pointers(of_head(lse, batch, head), first, BLOCK_M)
    out_here = row_pointers(of_head(out, batch, head), first, BLOCK_M, width_of(V_DIM))
    here = rows < work.num_rows
    inside = here[:, None] & (tl.arange(0, width_of(V_DIM)) < V_DIM)[None, :]

    scores = ScoreArgs(scores.inner, scores.factor * LOG2E, scores.scale)
    old_lse = tl.load(lse_here, mask=here, other=float("-inf"))
    old_most = tl.maximum(old_lse * LOG2E, LEAST)
    old_total = tl.where(old_lse == float("-inf"), 0.0, 1.0)
    softmax = OnlineSoftmax(tl.load(out_here, mask=inside, other=0.0), old_total, old_most)
    for number in range(full, edge):
        start, stop = find_run(work, number)
        for at in range(start, stop, BLOCK_N):
            softmax = attend(q_block, keys, values, at, stop, None, softmax, scores, DIM, V_DIM, BLOCK_N)
    for number in range(edge, end):
        start, stop = find_run(work, number)
        sight = range_in_run(work, number, rows)
        for at in range(start, stop, EDGE_STEP):
            softmax = attend(q_block, keys, values, at, stop, sight, softmax, scores, DIM, V_DIM, EDGE_STEP)
    # Rows of the block that no tile mentions, or that saw only what vanishes beside the rest, stay as they are.
    changed = here & ((softmax.total != old_total) | (softmax.most != old_most))
    total = tl.where(softmax.total == 0.0, 1.0, softmax.total)
    tl.store(lse_here, (softmax.most + tl.log2(total)) * LN2, mask=changed)
    tl.store(out_here, softmax.acc / total[:, None], mask=inside & changed[:, None])
