"""The backward kernels: dq by blocks of queries, dk and dv by blocks of keys.

Both recompute the probabilities from the final lse. Each block of a gradient has one program, which adds its tiles in
a fixed order: the same inputs give the same bits, with no atomic operation. The price is that scores are computed
twice: 7 matrix products where one kernel for all three would have 5.

Source: Dao 2023, arXiv:2307.08691.
"""

import triton
import triton.language as tl

from ringattn.kernels.triton.args import LoadSource, QueryArgs
from ringattn.kernels.triton.tile_io import (
    add_rows,
    capped,
    entry_pointers,
    find_item,
    find_run,
    first_row,
    load_rows,
    load_step,
    of_head,
    probabilities,
    range_in_run,
    seen,
    store_rows,
    width_of,
)


@triton.jit
def dq_step(
    queries, keys, values, start, stop, sight, dq, scores,
    DIM: tl.constexpr, V_DIM: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Adds what keys [start, start + STEP) give to the gradient of the queries. All are seen where `sight` is None."""
    EXACT: tl.constexpr = queries.q.dtype == tl.float32
    k = load_step(keys, start, stop, STEP, DIM, sight is not None)
    v = load_step(values, start, stop, STEP, V_DIM, sight is not None)
    x = capped(tl.dot(queries.q, tl.trans(k), input_precision="ieee"), scores, EXACT)
    p = probabilities(x, queries.lse[:, None], scores, EXACT)
    dx = p * (tl.dot(queries.dout, tl.trans(v), input_precision="ieee") - queries.delta[:, None])
    if scores.inner is not None:
        dx *= 1.0 - x * x
    if sight is not None:
        dx = tl.where(seen(start + tl.arange(0, STEP)[None, :], sight), dx, 0.0)
    return tl.dot(dx.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def dq_kernel(
    queries, k, v, k_described, v_described, dq, work, scores,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_STEP: tl.constexpr,
):  # fmt: skip
    """A program for each item of the queries' schedule and head."""
    batch, head, first, full, edge, end = find_item(work)
    rows = first + tl.arange(0, BLOCK_M)
    here = rows < work.num_rows
    q_block = load_rows(of_head(queries.q, batch, head), first, work.num_rows, BLOCK_M, DIM, True)
    dout_block = load_rows(of_head(queries.dout, batch, head), first, work.num_rows, BLOCK_M, V_DIM, True)
    kv_head = head // work.group
    keys = LoadSource(k_described, of_head(k, batch, kv_head), batch, kv_head)
    values = LoadSource(v_described, of_head(v, batch, kv_head), batch, kv_head)
    # Rows behind the last one have the probability exp2(0 - inf) = 0.
    lse = entry_pointers(of_head(queries.lse, batch, head), first, BLOCK_M)
    lse_block = tl.load(lse, mask=here, other=float("inf"))
    delta = entry_pointers(of_head(queries.delta, batch, head), first, BLOCK_M)
    delta_block = tl.load(delta, mask=here, other=0.0)

    block = QueryArgs(q_block, dout_block, lse_block, delta_block)
    acc = tl.zeros([BLOCK_M, width_of(DIM)], dtype=tl.float32)
    for number in range(full, edge):
        start, stop = find_run(work, number)
        for at in range(start, stop, BLOCK_N):
            acc = dq_step(block, keys, values, at, stop, None, acc, scores, DIM, V_DIM, BLOCK_N)
    for number in range(edge, end):
        start, stop = find_run(work, number)
        sight = range_in_run(work, number, rows)
        for at in range(start, stop, EDGE_STEP):
            acc = dq_step(block, keys, values, at, stop, sight, acc, scores, DIM, V_DIM, EDGE_STEP)
    add_rows(of_head(dq, batch, head), first, work.num_rows, acc * scores.scale, BLOCK_M, DIM)


@triton.jit
def dkdv_step(
    k, v, queries, start, stop, sight, dk, dv, scores,
    DIM: tl.constexpr, V_DIM: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Adds what queries [start, start + STEP) give to dk and dv. Scores are (keys, queries)."""
    EXACT: tl.constexpr = k.dtype == tl.float32
    rows = start + tl.arange(0, STEP)
    q = load_step(queries.q, start, stop, STEP, DIM, sight is not None)
    dout = load_step(queries.dout, start, stop, STEP, V_DIM, sight is not None)
    lse, delta = queries.lse, queries.delta
    if sight is not None:
        here = rows < stop
        lse_block = tl.load(lse.pointer + rows.to(tl.int64) * lse.stride, mask=here, other=float("inf"))
        delta_block = tl.load(delta.pointer + rows.to(tl.int64) * delta.stride, mask=here, other=0.0)
    else:
        lse_block = tl.load(lse.pointer + rows.to(tl.int64) * lse.stride)
        delta_block = tl.load(delta.pointer + rows.to(tl.int64) * delta.stride)
    x = capped(tl.dot(k, tl.trans(q), input_precision="ieee"), scores, EXACT)
    p = probabilities(x, lse_block[None, :], scores, EXACT)
    if sight is not None:
        some = seen(rows[None, :], sight)
        p = tl.where(some, p, 0.0)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
    dx = p * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta_block[None, :])
    if scores.inner is not None:
        dx *= 1.0 - x * x
    if sight is not None:
        # Again, because own rows outside the tiles may hold NaN.
        dx = tl.where(some, dx, 0.0)
    dk = tl.dot(dx.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def dkdv_run(
    k, v, queries, q_described, dout_described, batch, head, run, sight, dk, dv, scores,
    DIM: tl.constexpr, V_DIM: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Adds what one query head gives in a run of (start, stop), of which each key sees all where `sight` is None."""
    start, stop = run
    # Made here: triton 3.6 lets no function return a tuple in which something is None.
    of_this_head = QueryArgs(
        LoadSource(q_described, of_head(queries.q, batch, head), batch, head),
        LoadSource(dout_described, of_head(queries.dout, batch, head), batch, head),
        of_head(queries.lse, batch, head),
        of_head(queries.delta, batch, head),
    )
    for at in range(start, stop, STEP):
        dk, dv = dkdv_step(k, v, of_this_head, at, stop, sight, dk, dv, scores, DIM, V_DIM, STEP)
    return dk, dv


@triton.jit
def dkdv_kernel(
    queries, k, v, q_described, dout_described, dk, dv, work, scores,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_STEP: tl.constexpr,
):  # fmt: skip
    """A program for each item of the keys' schedule and kv head; it runs over the query heads that share it."""
    batch, kv_head, first, full, edge, end = find_item(work)
    keys = first + tl.arange(0, BLOCK_N)
    k_block = load_rows(of_head(k, batch, kv_head), first, work.num_rows, BLOCK_N, DIM, True)
    v_block = load_rows(of_head(v, batch, kv_head), first, work.num_rows, BLOCK_N, V_DIM, True)
    dk_acc = tl.zeros([BLOCK_N, width_of(DIM)], dtype=tl.float32)
    # dv starts as what is there, so that at the end only one gradient has to be read beside the other's sum.
    dv_rows = of_head(dv, batch, kv_head)
    dv_acc = load_rows(dv_rows, first, work.num_rows, BLOCK_N, V_DIM, True)
    # Full runs of all heads, then edges of all heads: what one loop keeps in registers, the other need not.
    num_runs = edge - full
    for index in range(0, work.group * num_runs):
        head, number = kv_head * work.group + index // num_runs, full + index % num_runs
        dk_acc, dv_acc = dkdv_run(
            k_block, v_block, queries, q_described, dout_described, batch, head, find_run(work, number), None,
            dk_acc, dv_acc, scores, DIM, V_DIM, BLOCK_M,
        )  # fmt: skip
    num_runs = end - edge
    for index in range(0, work.group * num_runs):
        head, number = kv_head * work.group + index // num_runs, edge + index % num_runs
        dk_acc, dv_acc = dkdv_run(
            k_block, v_block, queries, q_described, dout_described, batch, head, find_run(work, number),
            range_in_run(work, number, keys), dk_acc, dv_acc, scores, DIM, V_DIM, EDGE_STEP,
        )  # fmt: skip
    # Asked for anew, so that no address of these rows is held through the loops.
    first = first_row(work)
    store_rows(dv_rows, first, work.num_rows, dv_acc, BLOCK_N, V_DIM)
    add_rows(of_head(dk, batch, kv_head), first, work.num_rows, dk_acc * scores.scale, BLOCK_N, DIM)
