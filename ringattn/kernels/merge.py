"""Merging what a foreign kernel returns into the running state, on the rows that it was asked for."""

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
        part_lse: its log-sum-exp (B, H, S). Both -inf and +inf say that a row attended to nothing: FlashAttention-2
            writes the latter.
        rows: integers below B * S: the rows, counted over the batch, to merge; None for all.
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
    some, some_lse = out[b, i], lse[b, :, i]
    merge_(some[None], some_lse.T[None], part[b, i][None], part_lse[b, :, i].T[None])
    out[b, i], lse[b, :, i] = some, some_lse


def runs_triton(state: Tensor) -> bool:
    """Returns whether passes over a state like this run as Triton kernels: in fp32, on a GPU, and where Triton is."""
    return state.is_cuda and state.dtype is torch.float32 and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
