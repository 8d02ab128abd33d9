"""Merging the results of other libraries' kernels into the state, on the rows that they computed."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ringattn.softmax import merge_


def merge_part_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: Tensor | None = None) -> None:
    """Merges a partial result into the running state, in place: in one pass over memory on GPUs with Triton.

    Args:
        out: running output (B, S, H, Dv), accumulation dtype; updated.
        lse: running log-sum-exp (B, H, S), natural log; updated.
        part: output over further keys, (B, S, H, Dv), any floating dtype.
        part_lse: its log-sum-exp (B, H, S). Both -inf and +inf mark a row without keys: FlashAttention-2 writes +inf.
        rows: (n,) integers below B * S, the rows to merge, counted over the batch; None merges all.
    """
    if runs_triton(out):
        from ringattn.kernels.triton.merge_kernel import merge_rows_

        merge_rows_(out, lse, part, part_lse, rows)
        return
    part_lse = part_lse.masked_fill(part_lse == torch.inf, -torch.inf)
    if rows is None:
        merge_(out, lse, part, part_lse)
        return
    b, i = rows // out.shape[1], rows % out.shape[1]
    out_rows, lse_rows = out[b, i], lse[b, :, i]
    merge_(out_rows[None], lse_rows.T[None], part[b, i][None], part_lse[b, :, i].T[None])
    out[b, i], lse[b, :, i] = out_rows, lse_rows


def runs_triton(state: Tensor) -> bool:
    """Returns whether Triton kernels process a state: fp32, on a GPU, with Triton installed."""
    return state.is_cuda and state.dtype is torch.float32 and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
