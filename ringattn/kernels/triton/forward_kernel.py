"""The forward kernel: attention of a block of queries over all tiles that touch it, merged into the state.

It resumes the online softmax of FlashAttention: m_i, l_i and the weighted values start from the state (out, lse), and
end as the new state. Inside, logarithms are to base 2.

Source: Dao 2023, arXiv:2307.08691; Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

import triton
import triton.language as tl

from ringattn.kernels.triton.args import LoadSource, OnlineSoftmax, ScoreArgs
from ringattn.kernels.triton.tile_io import (
    LOG2E,
    apply_softcap,
    entry_pointers,
    is_visible,
    load_item,
    load_rows,
    load_run,
    load_step,
    row_pointers,
    select_head,
    visible_in_run,
    width_of,
)

LN2 = tl.constexpr(0.6931471805599453)
# The maximal score of no keys: finite, so that differences to it are not NaN, and less than any score.
MIN_SCORE = tl.constexpr(-3.0e38)


@triton.jit
def attend(
    q, keys, values, start, stop, visible, softmax, scores,
    DIM: tl.constexpr, V_DIM: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over keys [start, start + STEP). All are visible if `visible` is None."""
    k = load_step(keys, start, stop, STEP, DIM, visible is not None)
    x = apply_softcap(tl.dot(q, tl.trans(k), input_precision="ieee"), scores, q.dtype == tl.float32)
    if visible is not None:
        x = tl.where(is_visible(start + tl.arange(0, STEP)[None, :], visible), x, float("-inf"))
    m_i = tl.maximum(softmax.m_i, tl.max(x, 1) * scores.factor)
    p = tl.exp2(x * scores.factor - m_i[:, None])
    alpha = tl.exp2(softmax.m_i - m_i)
    l_i = softmax.l_i * alpha + tl.sum(p, 1)
    v = load_step(values, start, stop, STEP, V_DIM, visible is not None)
    acc = tl.dot(p.to(v.dtype), v, softmax.acc * alpha[:, None], input_precision="ieee")
    return OnlineSoftmax(acc, l_i, m_i)


@triton.jit
def forward_kernel(
    q, k, v, k_descriptor, v_descriptor, out, lse, work, scores,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_STEP: tl.constexpr,
):  # fmt: skip
    """One program per item of the work list of queries, and head."""
    batch, head, first, full, edge, end = load_item(work)
    rows = first + tl.arange(0, BLOCK_M)
    q_block = load_rows(select_head(q, batch, head), first, work.num_rows, BLOCK_M, DIM, True)
    kv_head = head // work.group
    keys = LoadSource(k_descriptor, select_head(k, batch, kv_head), batch, kv_head)
    values = LoadSource(v_descriptor, select_head(v, batch, kv_head), batch, kv_head)
    lse_pointers = entry_pointers(select_head(lse, batch, head), first, BLOCK_M)
    out_pointers = row_pointers(select_head(out, batch, head), first, BLOCK_M, width_of(V_DIM))
    row_mask = rows < work.num_rows
    out_mask = row_mask[:, None] & (tl.arange(0, width_of(V_DIM)) < V_DIM)[None, :]

    scores = ScoreArgs(scores.inner, scores.factor * LOG2E, scores.scale)
    old_lse = tl.load(lse_pointers, mask=row_mask, other=float("-inf"))
    old_m = tl.maximum(old_lse * LOG2E, MIN_SCORE)
    old_l = tl.where(old_lse == float("-inf"), 0.0, 1.0)
    softmax = OnlineSoftmax(tl.load(out_pointers, mask=out_mask, other=0.0), old_l, old_m)
    for number in range(full, edge):
        start, stop = load_run(work, number)
        for at in range(start, stop, BLOCK_N):
            softmax = attend(q_block, keys, values, at, stop, None, softmax, scores, DIM, V_DIM, BLOCK_N)
    for number in range(edge, end):
        start, stop = load_run(work, number)
        visible = visible_in_run(work, number, rows)
        for at in range(start, stop, EDGE_STEP):
            softmax = attend(q_block, keys, values, at, stop, visible, softmax, scores, DIM, V_DIM, EDGE_STEP)
    # Rows without visible keys, or whose new keys vanish beside the state, keep their bits.
    changed = row_mask & ((softmax.l_i != old_l) | (softmax.m_i != old_m))
    l_i = tl.where(softmax.l_i == 0.0, 1.0, softmax.l_i)
    tl.store(lse_pointers, (softmax.m_i + tl.log2(l_i)) * LN2, mask=changed)
    tl.store(out_pointers, softmax.acc / l_i[:, None], mask=out_mask & changed[:, None])
