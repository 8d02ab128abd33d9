"""The forward kernel: attention of a block of queries over all tiles that touch it, merged into (out, lse).

The online softmax of FlashAttention, resumed: its running maximum, sum and weighted values start as the state so
far, and end as the new one. Inside, logarithms are to base 2.

Source: Dao 2023, arXiv:2307.08691; Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

import triton
import triton.language as tl

from ringattn.kernels.triton.blocks import (
    LOG2E,
    entry_pointers,
    find_item,
    find_run,
    load_rows,
    load_step,
    row_pointers,
    tanh,
    view_of_run,
)

LN2 = tl.constexpr(0.6931471805599453)
# The running maximum of nothing. Finite, so that differences to it are no NaN; less than any score.
LEAST = tl.constexpr(-3.0e38)


@triton.jit
def attend(
    q, keys, values, start, stop, see_first, see_last, acc, total, most, inner, factor,
    DIM: tl.constexpr, V_DIM: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    STEP: tl.constexpr, CAPPED: tl.constexpr, EDGE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over keys [start, start + STEP)."""
    k = load_step(keys, start, stop, STEP, DIM, WIDTH, EDGE, DESCRIBED)
    x = tl.dot(q, tl.trans(k), input_precision="ieee")
    if CAPPED:
        x = tanh(x * inner, q.dtype == tl.float32)
    if EDGE:
        at = start + tl.arange(0, STEP)[None, :]
        x = tl.where((at >= see_first[:, None]) & (at <= see_last[:, None]), x, float("-inf"))
    new_most = tl.maximum(most, tl.max(x, 1) * factor)
    p = tl.exp2(x * factor - new_most[:, None])
    decay = tl.exp2(most - new_most)
    total = total * decay + tl.sum(p, 1)
    v = load_step(values, start, stop, STEP, V_DIM, V_WIDTH, EDGE, DESCRIBED)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, total, new_most


@triton.jit
def forward_kernel(
    q, k, v, k_described, v_described, out, lse, items, runs,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    out_batch, out_row, out_head, lse_batch, lse_head, lse_row,
    num_rows, num_heads, group, section, inner, factor,
    DIM: tl.constexpr, V_DIM: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_STEP: tl.constexpr,
    CAPPED: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """A program for each item and head: see schedule.py. `inner` and `factor`: see launch.Scores."""
    batch, head, first, full, edge, end = find_item(items, num_heads, section)
    rows = first + tl.arange(0, BLOCK_M)
    q_block = load_rows(q + batch * q_batch + head * q_head, first, num_rows, q_row, BLOCK_M, DIM, WIDTH, True)
    kv_head = head // group
    keys = (k_described, k + batch * k_batch + kv_head * k_head, k_row, batch, kv_head)
    values = (v_described, v + batch * v_batch + kv_head * v_head, v_row, batch, kv_head)
    lse = entry_pointers(lse + batch * lse_batch + head * lse_head, first, lse_row, BLOCK_M)
    out = row_pointers(out + batch * out_batch + head * out_head, first, out_row, BLOCK_M, V_WIDTH)
    here = rows < num_rows
    inside = here[:, None] & (tl.arange(0, V_WIDTH) < V_DIM)[None, :]

    factor *= LOG2E
    old_lse = tl.load(lse, mask=here, other=float("-inf"))
    old_most = tl.maximum(old_lse * LOG2E, LEAST)
    old_total = tl.where(old_lse == float("-inf"), 0.0, 1.0)
    acc, total, most = tl.load(out, mask=inside, other=0.0), old_total, old_most
    for number in range(full, edge):
        start, stop = find_run(runs, number)
        for at in range(start, stop, BLOCK_N):
            acc, total, most = attend(
                q_block, keys, values, at, stop, rows, rows, acc, total, most, inner, factor,
                DIM, V_DIM, WIDTH, V_WIDTH, BLOCK_N, CAPPED, False, DESCRIBED,
            )  # fmt: skip
    for number in range(edge, end):
        start, stop = find_run(runs, number)
        see_first, see_last = view_of_run(runs, number, rows)
        for at in range(start, stop, EDGE_STEP):
            acc, total, most = attend(
                q_block, keys, values, at, stop, see_first, see_last, acc, total, most, inner, factor,
                DIM, V_DIM, WIDTH, V_WIDTH, EDGE_STEP, CAPPED, True, DESCRIBED,
            )  # fmt: skip
    # Rows of the block that no tile mentions, or that saw only what vanishes beside the rest, stay as they are.
    changed = here & ((total != old_total) | (most != old_most))
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(lse, (most + tl.log2(total)) * LN2, mask=changed)
    tl.store(out, acc / total[:, None], mask=inside & changed[:, None])
