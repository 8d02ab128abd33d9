"""The backward kernels: dq by blocks of queries, dk and dv by blocks of keys.

Both recompute the probabilities from the final lse. Each block of a gradient has one program, which adds its tiles in
a fixed order: the same inputs give the same bits, with no atomic operation. The price is that scores are computed
twice: 7 matrix products where one kernel for all three would have 5.

Source: Dao 2023, arXiv:2307.08691.
"""

import triton
import triton.language as tl

from ringattn.kernels.triton.blocks import add_rows, find_item, find_run, load_rows, probabilities, tanh, view_of_run


@triton.jit
def dq_step(
    q, dout, lse, delta, k_base, v_base, k_row, v_row, start, stop, see_first, see_last, dq, inner, factor,
    DIM: tl.constexpr, V_DIM: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, CAPPED: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds what keys [start, start + BLOCK_N) give to the gradient of the queries."""
    k = load_rows(k_base, start, stop, k_row, BLOCK_N, DIM, WIDTH, EDGE)
    v = load_rows(v_base, start, stop, v_row, BLOCK_N, V_DIM, V_WIDTH, EDGE)
    x = tl.dot(q, tl.trans(k), input_precision="ieee")
    if CAPPED:
        x = tanh(x * inner, q.dtype == tl.float32)
    p = probabilities(x, lse[:, None], factor, q.dtype == tl.float32)
    dx = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
    if CAPPED:
        dx *= 1.0 - x * x
    if EDGE:
        keys = start + tl.arange(0, BLOCK_N)[None, :]
        dx = tl.where((keys >= see_first[:, None]) & (keys <= see_last[:, None]), dx, 0.0)
    return tl.dot(dx.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def dq_kernel(
    dout, q, k, v, lse, delta, dq, items, runs,
    dout_batch, dout_row, dout_head, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    lse_batch, lse_head, lse_row, delta_batch, delta_head, delta_row, dq_batch, dq_row, dq_head,
    num_rows, num_heads, group, section, inner, factor, scale,
    DIM: tl.constexpr, V_DIM: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """A program for each item of the queries' schedule and head."""
    batch, head, first, full, edge, end = find_item(items, num_heads, section)
    rows = first + tl.arange(0, BLOCK_M)
    here = rows < num_rows
    q_block = load_rows(q + batch * q_batch + head * q_head, first, num_rows, q_row, BLOCK_M, DIM, WIDTH, True)
    dout += batch * dout_batch + head * dout_head
    dout_block = load_rows(dout, first, num_rows, dout_row, BLOCK_M, V_DIM, V_WIDTH, True)
    k += batch * k_batch + head // group * k_head
    v += batch * v_batch + head // group * v_head
    # Rows behind the last one have the probability exp2(0 - inf) = 0.
    lse += batch * lse_batch + head * lse_head + rows.to(tl.int64) * lse_row
    lse_block = tl.load(lse, mask=here, other=float("inf"))
    delta += batch * delta_batch + head * delta_head + rows.to(tl.int64) * delta_row
    delta_block = tl.load(delta, mask=here, other=0.0)

    acc = tl.zeros([BLOCK_M, WIDTH], dtype=tl.float32)
    for number in range(full, edge):
        start, stop = find_run(runs, number)
        for at in range(start, stop, BLOCK_N):
            acc = dq_step(
                q_block, dout_block, lse_block, delta_block, k, v, k_row, v_row, at, stop, rows, rows, acc,
                inner, factor, DIM, V_DIM, WIDTH, V_WIDTH, BLOCK_N, CAPPED, False,
            )  # fmt: skip
    for number in range(edge, end):
        start, stop = find_run(runs, number)
        see_first, see_last = view_of_run(runs, number, rows)
        for at in range(start, stop, BLOCK_N):
            acc = dq_step(
                q_block, dout_block, lse_block, delta_block, k, v, k_row, v_row, at, stop, see_first, see_last, acc,
                inner, factor, DIM, V_DIM, WIDTH, V_WIDTH, BLOCK_N, CAPPED, True,
            )  # fmt: skip
    dq += batch * dq_batch + head * dq_head
    add_rows(dq, first, num_rows, dq_row, acc * scale, BLOCK_M, DIM, WIDTH)


@triton.jit
def dkdv_step(
    k, v, q_base, dout_base, lse, delta, q_row, dout_row, lse_row, delta_row, start, stop, see_first, see_last,
    dk, dv, inner, factor,
    DIM: tl.constexpr, V_DIM: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, CAPPED: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds what queries [start, start + BLOCK_M) give to the gradients of keys and values. Scores are (keys, queries)."""
    rows = start + tl.arange(0, BLOCK_M)
    q = load_rows(q_base, start, stop, q_row, BLOCK_M, DIM, WIDTH, EDGE)
    dout = load_rows(dout_base, start, stop, dout_row, BLOCK_M, V_DIM, V_WIDTH, EDGE)
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
    dout, q, k, v, lse, delta, dk, dv, items, runs,
    dout_batch, dout_row, dout_head, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    lse_batch, lse_head, lse_row, delta_batch, delta_head, delta_row,
    dk_batch, dk_row, dk_head, dv_batch, dv_row, dv_head,
    num_rows, num_heads, group, section, inner, factor, scale,
    DIM: tl.constexpr, V_DIM: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """A program for each item of the keys' schedule and kv head; it runs over the query heads that share it."""
    batch, kv_head, first, full, edge, end = find_item(items, num_heads, section)
    keys = first + tl.arange(0, BLOCK_N)
    k_block = load_rows(k + batch * k_batch + kv_head * k_head, first, num_rows, k_row, BLOCK_N, DIM, WIDTH, True)
    v_block = load_rows(v + batch * v_batch + kv_head * v_head, first, num_rows, v_row, BLOCK_N, V_DIM, V_WIDTH, True)
    dk_acc = tl.zeros([BLOCK_N, WIDTH], dtype=tl.float32)
    dv_acc = tl.zeros([BLOCK_N, V_WIDTH], dtype=tl.float32)
    for head in range(kv_head * group, (kv_head + 1) * group):
        q_base, dout_base = q + batch * q_batch + head * q_head, dout + batch * dout_batch + head * dout_head
        lse_base, delta_base = lse + batch * lse_batch + head * lse_head, delta + batch * delta_batch + head * delta_head
        for number in range(full, edge):
            start, stop = find_run(runs, number)
            for at in range(start, stop, BLOCK_M):
                dk_acc, dv_acc = dkdv_step(
                    k_block, v_block, q_base, dout_base, lse_base, delta_base, q_row, dout_row, lse_row, delta_row,
                    at, stop, keys, keys, dk_acc, dv_acc, inner, factor,
                    DIM, V_DIM, WIDTH, V_WIDTH, BLOCK_M, CAPPED, False,
                )  # fmt: skip
        for number in range(edge, end):
            start, stop = find_run(runs, number)
            see_first, see_last = view_of_run(runs, number, keys)
            for at in range(start, stop, BLOCK_M):
                dk_acc, dv_acc = dkdv_step(
                    k_block, v_block, q_base, dout_base, lse_base, delta_base, q_row, dout_row, lse_row, delta_row,
                    at, stop, see_first, see_last, dk_acc, dv_acc, inner, factor,
                    DIM, V_DIM, WIDTH, V_WIDTH, BLOCK_M, CAPPED, True,
                )  # fmt: skip
    add_rows(dk + batch * dk_batch + kv_head * dk_head, first, num_rows, dk_row, dk_acc * scale, BLOCK_N, DIM, WIDTH)
    add_rows(dv + batch * dv_batch + kv_head * dv_head, first, num_rows, dv_row, dv_acc, BLOCK_N, V_DIM, V_WIDTH)
