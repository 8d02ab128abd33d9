"""The backward kernels: dq by blocks of queries, dk and dv by blocks of keys.

Both recompute the probabilities from the final lse. One program owns each block of a gradient, and adds the tiles in a
fixed order: the same inputs give the same bits, without atomic operations. In return, scores are computed twice: 7
matrix products instead of the 5 of a single kernel.

Source: Dao 2023, arXiv:2307.08691.
"""

import triton
import triton.language as tl

from ringattn.kernels.triton.args import LoadSource, QueryArgs
from ringattn.kernels.triton.tile_io import (
    add_rows,
    apply_softcap,
    entry_pointers,
    is_visible,
    load_item,
    load_rows,
    load_run,
    load_step,
    probabilities,
    reload_first_row,
    select_head,
    store_rows,
    visible_in_run,
    width_of,
)


@triton.jit
def dq_step(
    queries, keys, values, start, stop, visible, dq, scores,
    DIM: tl.constexpr, V_DIM: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Adds the contribution of keys [start, start + STEP) to dq. All are visible if `visible` is None."""
    EXACT: tl.constexpr = queries.q.dtype == tl.float32
    k = load_step(keys, start, stop, STEP, DIM, visible is not None)
    v = load_step(values, start, stop, STEP, V_DIM, visible is not None)
    x = apply_softcap(tl.dot(queries.q, tl.trans(k), input_precision="ieee"), scores, EXACT)
    p = probabilities(x, queries.lse[:, None], scores, EXACT)
    dx = p * (tl.dot(queries.dout, tl.trans(v), input_precision="ieee") - queries.delta[:, None])
    if scores.inner is not None:
        dx *= 1.0 - x * x
    if visible is not None:
        dx = tl.where(is_visible(start + tl.arange(0, STEP)[None, :], visible), dx, 0.0)
    return tl.dot(dx.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def dq_kernel(
    queries, k, v, k_descriptor, v_descriptor, dq, work, scores,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_STEP: tl.constexpr,
):  # fmt: skip
    """One program per item of the work list of queries, and head."""
    batch, head, first, full, edge, end = load_item(work)
    rows = first + tl.arange(0, BLOCK_M)
    row_mask = rows < work.num_rows
    q_block = load_rows(select_head(queries.q, batch, head), first, work.num_rows, BLOCK_M, DIM, True)
    dout_block = load_rows(select_head(queries.dout, batch, head), first, work.num_rows, BLOCK_M, V_DIM, True)
    kv_head = head // work.group
    keys = LoadSource(k_descriptor, select_head(k, batch, kv_head), batch, kv_head)
    values = LoadSource(v_descriptor, select_head(v, batch, kv_head), batch, kv_head)
    # Rows behind the last one get the probability exp2(0 - inf) = 0.
    lse = entry_pointers(select_head(queries.lse, batch, head), first, BLOCK_M)
    lse_block = tl.load(lse, mask=row_mask, other=float("inf"))
    delta = entry_pointers(select_head(queries.delta, batch, head), first, BLOCK_M)
    delta_block = tl.load(delta, mask=row_mask, other=0.0)

    block = QueryArgs(q_block, dout_block, lse_block, delta_block)
    acc = tl.zeros([BLOCK_M, width_of(DIM)], dtype=tl.float32)
    for number in range(full, edge):
        start, stop = load_run(work, number)
        for at in range(start, stop, BLOCK_N):
            acc = dq_step(block, keys, values, at, stop, None, acc, scores, DIM, V_DIM, BLOCK_N)
    for number in range(edge, end):
        start, stop = load_run(work, number)
        visible = visible_in_run(work, number, rows)
        for at in range(start, stop, EDGE_STEP):
            acc = dq_step(block, keys, values, at, stop, visible, acc, scores, DIM, V_DIM, EDGE_STEP)
    add_rows(select_head(dq, batch, head), first, work.num_rows, acc * scores.scale, BLOCK_M, DIM)


@triton.jit
def dkdv_step(
    k, v, queries, start, stop, visible, dk, dv, scores,
    DIM: tl.constexpr, V_DIM: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Adds the contribution of queries [start, start + STEP) to dk and dv. Scores are (keys, queries)."""
    EXACT: tl.constexpr = k.dtype == tl.float32
    rows = start + tl.arange(0, STEP)
    q = load_step(queries.q, start, stop, STEP, DIM, visible is not None)
    dout = load_step(queries.dout, start, stop, STEP, V_DIM, visible is not None)
    lse, delta = queries.lse, queries.delta
    if visible is not None:
        row_mask = rows < stop
        lse_block = tl.load(lse.pointer + rows.to(tl.int64) * lse.stride, mask=row_mask, other=float("inf"))
        delta_block = tl.load(delta.pointer + rows.to(tl.int64) * delta.stride, mask=row_mask, other=0.0)
    else:
        lse_block = tl.load(lse.pointer + rows.to(tl.int64) * lse.stride)
        delta_block = tl.load(delta.pointer + rows.to(tl.int64) * delta.stride)
    x = apply_softcap(tl.dot(k, tl.trans(q), input_precision="ieee"), scores, EXACT)
    p = probabilities(x, lse_block[None, :], scores, EXACT)
    if visible is not None:
        visible_mask = is_visible(rows[None, :], visible)
        p = tl.where(visible_mask, p, 0.0)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
    dx = p * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta_block[None, :])
    if scores.inner is not None:
        dx *= 1.0 - x * x
    if visible is not None:
        # A second time, since own rows outside the tiles may hold NaN.
        dx = tl.where(visible_mask, dx, 0.0)
    dk = tl.dot(dx.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def dkdv_run(
    k, v, queries, q_descriptor, dout_descriptor, batch, head, run, visible, dk, dv, scores,
    DIM: tl.constexpr, V_DIM: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Adds the contribution of one query head over a run (start, stop). All is visible if `visible` is None."""
    start, stop = run
    # Built inline: in triton 3.6 a function cannot return a tuple that contains None.
    head_queries = QueryArgs(
        LoadSource(q_descriptor, select_head(queries.q, batch, head), batch, head),
        LoadSource(dout_descriptor, select_head(queries.dout, batch, head), batch, head),
        select_head(queries.lse, batch, head),
        select_head(queries.delta, batch, head),
    )
    for at in range(start, stop, STEP):
        dk, dv = dkdv_step(k, v, head_queries, at, stop, visible, dk, dv, scores, DIM, V_DIM, STEP)
    return dk, dv


@triton.jit
def dkdv_kernel(
    queries, k, v, q_descriptor, dout_descriptor, dk, dv, work, scores,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_STEP: tl.constexpr,
):  # fmt: skip
    """One program per item of the work list of keys, and kv head; it loops over the query heads of the kv head."""
    batch, kv_head, first, full, edge, end = load_item(work)
    keys = first + tl.arange(0, BLOCK_N)
    k_block = load_rows(select_head(k, batch, kv_head), first, work.num_rows, BLOCK_N, DIM, True)
    v_block = load_rows(select_head(v, batch, kv_head), first, work.num_rows, BLOCK_N, V_DIM, True)
    dk_acc = tl.zeros([BLOCK_N, width_of(DIM)], dtype=tl.float32)
    # dv starts from the accumulator, so that only dk has to be read again at the end.
    dv_rows = select_head(dv, batch, kv_head)
    dv_acc = load_rows(dv_rows, first, work.num_rows, BLOCK_N, V_DIM, True)
    # Full runs of all heads, then edge runs of all heads: each loop keeps fewer values in registers.
    num_runs = edge - full
    for index in range(0, work.group * num_runs):
        head, number = kv_head * work.group + index // num_runs, full + index % num_runs
        dk_acc, dv_acc = dkdv_run(
            k_block, v_block, queries, q_descriptor, dout_descriptor, batch, head, load_run(work, number), None,
            dk_acc, dv_acc, scores, DIM, V_DIM, BLOCK_M,
        )  # fmt: skip
    num_runs = end - edge
    for index in range(0, work.group * num_runs):
        head, number = kv_head * work.group + index // num_runs, edge + index % num_runs
        dk_acc, dv_acc = dkdv_run(
            k_block, v_block, queries, q_descriptor, dout_descriptor, batch, head, load_run(work, number),
            visible_in_run(work, number, keys), dk_acc, dv_acc, scores, DIM, V_DIM, EDGE_STEP,
        )  # fmt: skip
    # Reloaded, so that the loops hold no address of these rows.
    first = reload_first_row(work)
    store_rows(dv_rows, first, work.num_rows, dv_acc, BLOCK_N, V_DIM)
    add_rows(select_head(dk, batch, kv_head), first, work.num_rows, dk_acc * scores.scale, BLOCK_N, DIM)
