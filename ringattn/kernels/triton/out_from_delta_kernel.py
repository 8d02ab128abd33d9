"""`out_for_delta` as one kernel: one pass over dout; tensor operations take several, and hold three fp32 copies."""

import torch
import triton
import triton.language as tl

from ringattn.kernels.triton.args import StridedRows
from ringattn.kernels.triton.tile_io import row_offsets

# Elements of dout per program: 32 per thread.
BLOCK_SIZE = 4096
NUM_WARPS = 4


@triton.jit
def out_from_delta_kernel(dout, delta, out, num_rows, length, num_heads, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One program per block of rows."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_rows
    batch, row, head = index // num_heads // length, index // num_heads % length, index % num_heads
    dims = tl.arange(0, triton.next_power_of_2(DIM))
    mask = inside[:, None] & (dims < DIM)[None, :]
    dout_pointers = dout.pointer + (row_offsets(dout, batch, row, head)[:, None] + dims[None, :])
    rows = tl.load(dout_pointers, mask=mask, other=0.0).to(tl.float32)
    target = tl.load(delta.pointer + row_offsets(delta, batch, row, head), mask=inside, other=0.0)
    # Rows are scaled to 1 first: squares of small gradients would underflow.
    largest = tl.max(tl.abs(rows), 1)
    unit = rows / tl.where(largest > 0, largest, 1.0)[:, None]
    factor = target / largest / tl.maximum(tl.sum(unit * unit, 1), 1.0)
    # A row of zeros stays zero.
    factor = tl.where(tl.abs(factor) < float("inf"), factor, 0.0)
    out_pointers = out.pointer + (row_offsets(out, batch, row, head)[:, None] + dims[None, :])
    tl.store(out_pointers, (unit * factor[:, None]).to(out.pointer.dtype.element_ty), mask=mask)


def out_for_rows(dout: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Returns `out_for_delta` of dout (B, S, H, D), its last dim contiguous, and an fp32 delta (B, S, H)."""
    out = torch.empty_like(dout)
    dim, num_rows = dout.shape[3], delta.numel()
    if not (dim and num_rows):
        return out
    block = max(BLOCK_SIZE // triton.next_power_of_2(dim), 1)
    out_from_delta_kernel[(triton.cdiv(num_rows, block),)](
        StridedRows.of(dout), StridedRows.of(delta), StridedRows.of(out), num_rows, *delta.shape[1:],
        DIM=dim, BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out
