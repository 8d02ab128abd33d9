"""An `out` for delta as one kernel: a pass over dout, where tensor operations take many, and hold it thrice in fp32."""

import torch
import triton
import triton.language as tl

# Numbers of dout that a program holds: 32 for each of its threads.
BLOCK_SIZE = 4096
NUM_WARPS = 4


@triton.jit
def delta_kernel(
    dout, delta, out,
    num_rows, size_1, size_2,
    dout_0, dout_1, dout_2, delta_0, delta_1, delta_2, out_0, out_1, out_2,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for each block of rows. See out_for_rows."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_rows
    i, j, k = index // size_2 // size_1, index // size_2 % size_1, index % size_2
    dims = tl.arange(0, WIDTH)
    mask = inside[:, None] & (dims < DIM)[None, :]
    dout += (i * dout_0 + j * dout_1 + k * dout_2)[:, None] + dims[None, :]
    rows = tl.load(dout, mask=mask, other=0.0).to(tl.float32)
    wanted = tl.load(delta + i * delta_0 + j * delta_1 + k * delta_2, mask=inside, other=0.0)
    # Rows are scaled to 1 first: squares of small gradients would underflow.
    largest = tl.max(tl.abs(rows), 1)
    unit = rows / tl.where(largest > 0, largest, 1.0)[:, None]
    factor = wanted / largest / tl.maximum(tl.sum(unit * unit, 1), 1.0)
    # A row of zeros has no multiple but itself.
    factor = tl.where(tl.abs(factor) < float("inf"), factor, 0.0)
    out += (i * out_0 + j * out_1 + k * out_2)[:, None] + dims[None, :]
    tl.store(out, (unit * factor[:, None]).to(out.dtype.element_ty), mask=mask)


def out_for_rows(dout: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Does what delta.out_for_delta says, for dout of four dims, the last contiguous, and an fp32 delta."""
    out = torch.empty_like(dout)
    dim, num_rows = dout.shape[3], delta.numel()
    if not (dim and num_rows):
        return out
    width = triton.next_power_of_2(dim)
    block = max(BLOCK_SIZE // width, 1)
    delta_kernel[(triton.cdiv(num_rows, block),)](
        dout, delta, out,
        num_rows, *delta.shape[1:],
        *dout.stride()[:3], *delta.stride(), *out.stride()[:3],
        DIM=dim, WIDTH=width, BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out
