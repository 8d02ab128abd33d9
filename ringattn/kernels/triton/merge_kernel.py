"""The merge of partial attention as one kernel: one pass over memory, where tensor operations take five.

Each program merges a few rows of one head. Rows of a head are far apart in `out`, each hundreds of bytes long; their
lse are contiguous. Programs of neighbouring heads run side by side, so that together they read whole pages. Rows that
are empty in the part are neither read nor written.
"""

import torch
import triton
import triton.language as tl

from ringattn.kernels.triton.args import StridedRows
from ringattn.kernels.triton.tile_io import row_offsets

# Elements of `out` per program: 32 per thread.
BLOCK_SIZE = 4096
NUM_WARPS = 4


@triton.jit
def merge_kernel(out, lse, part, part_lse, rows, num_rows, length, num_heads, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One program per block of rows, and head."""
    program = tl.program_id(0).to(tl.int64)
    head = program % num_heads
    index = program // num_heads * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_rows
    if rows is not None:
        index = tl.load(rows + index, mask=inside, other=0).to(tl.int64)
    batch, row = index // length, index % length

    lse_pointers = lse.pointer + row_offsets(lse, batch, row, head)
    part_lse_pointers = part_lse.pointer + row_offsets(part_lse, batch, row, head)
    new = tl.load(part_lse_pointers, mask=inside, other=float("-inf"))
    # A NaN is no empty row: it propagates.
    row_mask = (new != float("-inf")) & (new != float("inf"))
    old = tl.load(lse_pointers, mask=row_mask, other=float("-inf"))
    # The difference is never (-inf) - (-inf), since empty rows of the part are masked.
    new = tl.where(row_mask, new, 0.0)
    weight = 1.0 / (1.0 + tl.exp(old - new))
    larger = tl.maximum(old, new, propagate_nan=tl.PropagateNan.ALL)
    tl.store(lse_pointers, larger + tl.log(1.0 + tl.exp(-tl.abs(old - new))), mask=row_mask)

    dims = tl.arange(0, triton.next_power_of_2(DIM))
    mask = row_mask[:, None] & (dims < DIM)[None, :]
    out_pointers = out.pointer + (row_offsets(out, batch, row, head)[:, None] + dims[None, :])
    part_pointers = part.pointer + (row_offsets(part, batch, row, head)[:, None] + dims[None, :])
    old_out = tl.load(out_pointers, mask=mask, other=0.0)
    new_out = tl.load(part_pointers, mask=mask, other=0.0).to(tl.float32)
    # Interpolated from the nearer end, which avoids cancellation.
    difference, w = new_out - old_out, weight[:, None]
    merged = tl.where(w < 0.5, old_out + w * difference, new_out - (1.0 - w) * difference)
    tl.store(out_pointers, merged, mask=mask)


def merge_rows_(
    out: torch.Tensor,
    lse: torch.Tensor,
    part: torch.Tensor,
    part_lse: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> None:
    """Merges as `merge.merge_part_`, for an fp32 state; `rows` are int32 and distinct."""
    batch, length, heads, dim = out.shape
    num_rows = batch * length if rows is None else rows.numel()
    if not (num_rows and heads and dim):
        return
    part = part if part.stride(3) == 1 else part.contiguous()
    if out.stride(3) != 1:
        raise ValueError(f"out must be contiguous in its last dim, but its strides are {out.stride()}")
    block = max(BLOCK_SIZE // triton.next_power_of_2(dim), 1)
    merge_kernel[(heads * triton.cdiv(num_rows, block),)](
        StridedRows.of(out), StridedRows.of_entries(lse), StridedRows.of(part), StridedRows.of_entries(part_lse),
        rows, num_rows, length, heads, DIM=dim, BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip
