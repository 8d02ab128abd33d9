"""An `out` for delta as one kernel: a pass over dout, where tensor operations take many, and hold it thrice in fp32."""

import torch
import triton
import triton.language as tl

from ringattn.kernels.triton.args import StridedRows
from ringattn.kernels.triton.tile_io import offsets

# Numbers of dout that a program holds: 32 for each of its threads.
BLOCK_SIZE = 4096
NUM_WARPS = 4


@triton.jit
def delta_kernel(dout, delta, out, num_rows, length, num_heads, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """A program for each block of rows. See out_for_rows."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_rows
    batch, row, head = index // num_heads // length, index // num_heads % length, index % num_heads
    dims = tl.arange(0, triton.next_power_of_2(DIM))
    mask = inside[:, None] & (dims < DIM)[None, :]
    dout_here = dout.pointer + (offsets(dout, batch, row, head)[:, None] + dims[None, :])
    rows = tl.load(dout_here, mask=mask, other=0.0).to(tl.float32)
    wanted = tl.load(delta.pointer + offsets(delta, batch, row, head), mask=inside, other=0.0)
    # Rows are scaled to 1 first: squares of small gradients would underflow.
    largest = tl.max(tl.abs(rows), 1)
    unit = rows / tl.where(largest > 0, largest, 1.0)[:, None]
    factor = wanted / largest / tl.maximum(tl.sum(unit * unit, 1), 1.0)
    # A row of zeros has no multiple but itself.
    factor = tl.where(tl.abs(factor) < float("inf"), factor, 0.0)
    out_here = out.pointer + (offsets(out, batch, row, head)[:, None] + dims[None, :])
    tl.store(out_here, (unit * factor[:, None]).to(out.pointer.dtype.element_ty), mask=mask)


def out_for_rows(dout: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Does what delta.out_for_delta says, for dout of four dims, the last contiguous, and an fp32 delta."""
    out = torch.empty_like(dout)
    dim, num_rows = dout.shape[3], delta.numel()
    if not (dim and num_rows):
        return out
    block = max(BLOCK_SIZE // triton.next_power_of_2(dim), 1)
    delta_kernel[(triton.cdiv(num_rows, block),)](
        StridedRows.of(dout), StridedRows.of(delta), StridedRows.of(out), num_rows, *delta.shape[1:],
        DIM=dim, BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out
