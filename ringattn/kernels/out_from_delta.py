"""An `out` that makes a kernel compute a given delta, for kernels that compute rowsum(dout * out) themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from ringattn.kernels.merge import runs_triton


def out_for_delta(dout: Tensor, delta: Tensor, column: int | None = None) -> Tensor:
    """Returns an `out` of dout's shape and dtype with rowsum(dout * out) = delta, up to rounding.

    Each row is a multiple of dout's row, bounded by |out|. If delta also holds a gradient of lse, there may be no such
    multiple, since dout can be 0: then a padding column carries delta.

    Args:
        dout: (..., D).
        delta: (...), in the accumulation dtype.
        column: a padding column of dout, which is set to 1 in place; None if delta holds no gradient of lse.
    """
    if column is not None:
        out = torch.zeros_like(dout)
        out[..., column], dout[..., column] = delta.to(out.dtype), 1.0
        return out
    if runs_triton(delta) and dout.dim() == 4 and dout.stride(3) == 1:
        from ringattn.kernels.triton.out_from_delta_kernel import out_for_rows

        return out_for_rows(dout, delta)
    acc = dout.to(delta.dtype)
    # Rows are scaled to 1 first: squares of small gradients would underflow.
    largest = acc.abs().amax(dim=-1, keepdim=True)
    unit = (acc / largest).nan_to_num_(nan=0.0)
    factor = (delta.unsqueeze(-1) / largest).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    factor /= torch.linalg.vecdot(unit, unit).clamp_(min=1.0).unsqueeze(-1)
    return unit.mul_(factor).to(dout.dtype)
