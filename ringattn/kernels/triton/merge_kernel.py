"""The merge of partial attention as one kernel: a pass over memory, where tensor operations take five.

Each program merges a few rows of one head. Rows of a head lie far apart in `out`, but each is hundreds of bytes long;
their lse lie side by side. Programs of neighbouring heads run next to one another, so that together they read
whole pages. Rows where the part attended to nothing are neither read nor written.
"""

import torch
import triton
import triton.language as tl

from ringattn.kernels.triton.args import StridedRows
from ringattn.kernels.triton.tile_io import offsets

# Numbers of `out` that a program holds: 32 for each of its threads.
BLOCK_SIZE = 4096
NUM_WARPS = 4


@triton.jit
def merge_kernel(out, lse, part, part_lse, rows, num_rows, length, num_heads, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """A program for each block of rows and head. See merge_rows_."""
    program = tl.program_id(0).to(tl.int64)
    head = program % num_heads
    index = program // num_heads * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_rows
    if rows is not None:
        index = tl.load(rows + index, mask=inside, other=0).to(tl.int64)
    batch, row = index // length, index % length

    lse_here = lse.pointer + offsets(lse, batch, row, head)
    part_lse_here = part_lse.pointer + offsets(part_lse, batch, row, head)
    new = tl.load(part_lse_here, mask=inside, other=float("-inf"))
    # NaN is not nothing: it must show.
    some = (new != float("-inf")) & (new != float("inf"))
    old = tl.load(lse_here, mask=some, other=float("-inf"))
    # Differences are of -inf and a number at most, since rows with -inf on the part's side are left out.
    new = tl.where(some, new, 0.0)
    weight = 1.0 / (1.0 + tl.exp(old - new))
    larger = tl.maximum(old, new, propagate_nan=tl.PropagateNan.ALL)
    tl.store(lse_here, larger + tl.log(1.0 + tl.exp(-tl.abs(old - new))), mask=some)

    dims = tl.arange(0, triton.next_power_of_2(DIM))
    mask = some[:, None] & (dims < DIM)[None, :]
    out_here = out.pointer + (offsets(out, batch, row, head)[:, None] + dims[None, :])
    part_here = part.pointer + (offsets(part, batch, row, head)[:, None] + dims[None, :])
    before = tl.load(out_here, mask=mask, other=0.0)
    further = tl.load(part_here, mask=mask, other=0.0).to(tl.float32)
    # From the nearer end, so that no small difference of large numbers decides.
    way, w = further - before, weight[:, None]
    merged = tl.where(w < 0.5, before + w * way, further - (1.0 - w) * way)
    tl.store(out_here, merged, mask=mask)


def merge_rows_(
    out: torch.Tensor,
    lse: torch.Tensor,
    part: torch.Tensor,
    part_lse: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> None:
    """Does what merge.merge_part_ says, for an fp32 state; `rows` are int32, each at most once."""
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
