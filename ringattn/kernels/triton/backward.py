"""The backward kernels: dq by blocks of queries, dk and dv by blocks of keys.

Both recompute the probabilities from the final lse. Each block of a gradient has one program, which adds its tiles in
a fixed order: the same inputs give the same bits, with no atomic operation. The price is that scores are computed
twice: 7 matrix products where one kernel for all three would have 5.

Source: Dao 2023, arXiv:2307.08691.
"""

import triton
import triton.language as tl

from ringattn.kernels.triton.blocks import (
    add_rows,
    entry_pointers,
    find_item,
    find_run,
    first_row,
    load_rows,
    load_step,
    probabilities,
    store_rows,
    tanh,
    view_of_run,
)


@triton.jit
def dq_step(
    q, dout, lse, delta, keys, values, start, stop, see_first, see_last, dq, inner, factor,
    DIM: tl.constexpr, V_DIM: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    STEP: tl.constexpr, CAPPED: tl.constexpr, EDGE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Adds what keys [start, start + STEP) give to the gradient of the queries."""
    k = load_step(keys, start, stop, STEP, DIM, WIDTH, EDGE, DESCRIBED)
    v = load_step(values, start, stop, STEP, V_DIM, V_WIDTH, EDGE, DESCRIBED)
    x = tl.dot(q, tl.trans(k), input_precision="ieee")
    if CAPPED:
        x = tanh(x * inner, q.dtype == tl.float32)
    p = probabilities(x, lse[:, None], factor, q.dtype == tl.float32)
    dx = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
    if CAPPED:
        dx *= 1.0 - x * x
    if EDGE:
        at = start + tl.arange(0, STEP)[None, :]
        dx = tl.where((at >= see_first[:, None]) & (at <= see_last[:, None]), dx, 0.0)
    return tl.dot(dx.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def dq_kernel(
    dout, q, k, v, k_described, v_described, lse, delta, dq, items, runs,
    dout_batch, dout_row, dout_head, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    lse_batch, lse_head, lse_row, delta_batch, delta_head, delta_row, dq_batch, dq_row, dq_head,
    num_rows, num_heads, group, section, inner, factor, scale,
    DIM: tl.constexpr, V_DIM: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_STEP: tl.constexpr,
    CAPPED: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """A program for each item of the queries' schedule and head."""
    batch, head, first, full, edge, end = find_item(items, num_heads, section)
    rows = first + tl.arange(0, BLOCK_M)
    here = rows < num_rows
    q_block = load_rows(q + batch * q_batch + head * q_head, first, num_rows, q_row, BLOCK_M, DIM, WIDTH, True)
    dout += batch * dout_batch + head * dout_head
    dout_block = load_rows(dout, first, num_rows, dout_row, BLOCK_M, V_DIM, V_WIDTH, True)
    kv_head = head // group
    keys = (k_described, k + batch * k_batch + kv_head * k_head, k_row, batch, kv_head)
    values = (v_described, v + batch * v_batch + kv_head * v_head, v_row, batch, kv_head)
    # Rows behind the last one have the probability exp2(0 - inf) = 0.
    lse = entry_pointers(lse + batch * lse_batch + head * lse_head, first, lse_row, BLOCK_M)
    lse_block = tl.load(lse, mask=here, other=float("inf"))
    delta = entry_pointers(delta + batch * delta_batch + head * delta_head, first, delta_row, BLOCK_M)
    delta_block = tl.load(delta, mask=here, other=0.0)

    acc = tl.zeros([BLOCK_M, WIDTH], dtype=tl.float32)
    for number in range(full, edge):
        start, stop = find_run(runs, number)
        for at in range(start, stop, BLOCK_N):
            acc = dq_step(
                q_block, dout_block, lse_block, delta_block, keys, values, at, stop, rows, rows, acc,
                inner, factor, DIM, V_DIM, WIDTH, V_WIDTH, BLOCK_N, CAPPED, False, DESCRIBED,
            )  # fmt: skip
    for number in range(edge, end):
        start, stop = find_run(runs, number)
        see_first, see_last = view_of_run(runs, number, rows)
        for at in range(start, stop, EDGE_STEP):
            acc = dq_step(
                q_block, dout_block, lse_block, delta_block, keys, values, at, stop, see_first, see_last, acc,
                inner, factor, DIM, V_DIM, WIDTH, V_WIDTH, EDGE_STEP, CAPPED, True, DESCRIBED,
            )  # fmt: skip
    dq += batch * dq_batch + head * dq_head
    add_rows(dq, first, num_rows, dq_row, acc * scale, BLOCK_M, DIM, WIDTH)


@triton.jit
def dkdv_step(
    k, v, queries, cotangents, lse, delta, lse_row, delta_row, start, stop, see_first, see_last,
    dk, dv, inner, factor,
    DIM: tl.constexpr, V_DIM: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    STEP: tl.constexpr, CAPPED: tl.constexpr, EDGE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Adds what queries [start, start + STEP) give to dk and dv. Scores are (keys, queries)."""
    rows = start + tl.arange(0, STEP)
    q = load_step(queries, start, stop, STEP, DIM, WIDTH, EDGE, DESCRIBED)
    dout = load_step(cotangents, start, stop, STEP, V_DIM, V_WIDTH, EDGE, DESCRIBED)
    if EDGE:
        here = rows < stop
        lse_block = tl.load(lse + rows.to(tl.int64) * lse_row, mask=here, other=float("inf"))
        delta_block = tl.load(delta + rows.to(tl.int64) * delta_row, mask=here, other=0.0)
    else:
        lse_block = tl.load(lse + rows.to(tl.int64) * lse_row)
        delta_block = tl.load(delta + rows.to(tl.int64) * delta_row)
    x = tl.dot(k, tl.trans(q), input_precision="ieee")
    if CAPPED:
        x = tanh(x * inner, q.dtype == tl.float32)
    p = probabilities(x, lse_block[None, :], factor, q.dtype == tl.float32)
    if EDGE:
        seen = (rows[None, :] >= see_first[:, None]) & (rows[None, :] <= see_last[:, None])
        p = tl.where(seen, p, 0.0)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
    dx = p * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta_block[None, :])
    if CAPPED:
        dx *= 1.0 - x * x
    if EDGE:
        # Again, because own rows outside the tiles may hold NaN.
        dx = tl.where(seen, dx, 0.0)
    dk = tl.dot(dx.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def dkdv_kernel(
    dout, q, k, v, q_described, dout_described, lse, delta, dk, dv, items, runs,
    dout_batch, dout_row, dout_head, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    lse_batch, lse_head, lse_row, delta_batch, delta_head, delta_row,
    dk_batch, dk_row, dk_head, dv_batch, dv_row, dv_head,
    num_rows, num_heads, group, section, inner, factor, scale,
    DIM: tl.constexpr, V_DIM: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_STEP: tl.constexpr,
    CAPPED: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """A program for each item of the keys' schedule and kv head; it runs over the query heads that share it."""
    batch, kv_head, first, full, edge, end = find_item(items, num_heads, section)
    keys = first + tl.arange(0, BLOCK_N)
    k_block = load_rows(k + batch * k_batch + kv_head * k_head, first, num_rows, k_row, BLOCK_N, DIM, WIDTH, True)
    v_block = load_rows(v + batch * v_batch + kv_head * v_head, first, num_rows, v_row, BLOCK_N, V_DIM, V_WIDTH, True)
    dk_acc = tl.zeros([BLOCK_N, WIDTH], dtype=tl.float32)
    # dv starts as what is there, so that at the end only one gradient has to be read beside the other's sum.
    dv += batch * dv_batch + kv_head * dv_head
    dv_acc = load_rows(dv, first, num_rows, dv_row, BLOCK_N, V_DIM, V_WIDTH, True)
    # Full runs of all heads, then edges of all heads: what one loop keeps in registers, the other need not.
    num_runs = edge - full
    for index in range(0, group * num_runs):
        head, number = kv_head * group + index // num_runs, full + index % num_runs
        start, stop = find_run(runs, number)
        queries = (q_described, q + batch * q_batch + head * q_head, q_row, batch, head)
        cotangents = (dout_described, dout + batch * dout_batch + head * dout_head, dout_row, batch, head)
        lse_base, delta_base = (
            lse + batch * lse_batch + head * lse_head,
            delta + batch * delta_batch + head * delta_head,
        )
        for at in range(start, stop, BLOCK_M):
            dk_acc, dv_acc = dkdv_step(
                k_block, v_block, queries, cotangents, lse_base, delta_base, lse_row, delta_row,
                at, stop, keys, keys, dk_acc, dv_acc, inner, factor,
                DIM, V_DIM, WIDTH, V_WIDTH, BLOCK_M, CAPPED, False, DESCRIBED,
            )  # fmt: skip
    num_runs = end - edge
    for index in range(0, group * num_runs):
        head, number = kv_head * group + index // num_runs, edge + index % num_runs
        start, stop = find_run(runs, number)
        see_first, see_last = view_of_run(runs, number, keys)
        queries = (q_described, q + batch * q_batch + head * q_head, q_row, batch, head)
        cotangents = (dout_described, dout + batch * dout_batch + head * dout_head, dout_row, batch, head)
        lse_base, delta_base = (
            lse + batch * lse_batch + head * lse_head,
            delta + batch * delta_batch + head * delta_head,
        )
        for at in range(start, stop, EDGE_STEP):
            dk_acc, dv_acc = dkdv_step(
                k_block, v_block, queries, cotangents, lse_base, delta_base, lse_row, delta_row,
                at, stop, see_first, see_last, dk_acc, dv_acc, inner, factor,
                DIM, V_DIM, WIDTH, V_WIDTH, EDGE_STEP, CAPPED, True, DESCRIBED,
            )  # fmt: skip
    # Asked for anew, so that no address of these rows is held through the loops.
    first = first_row(items, num_heads, section)
    store_rows(dv, first, num_rows, dv_row, dv_acc, BLOCK_N, V_DIM, V_WIDTH)
    add_rows(dk + batch * dk_batch + kv_head * dk_head, first, num_rows, dk_row, dk_acc * scale, BLOCK_N, DIM, WIDTH)
