"""Running what was asked for: at once, or as an operator in a graph that is being compiled."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from ringattn.attention import operators
from ringattn.attention.function import Attention
from ringattn.attention.request import Request, prepare, team_for
from ringattn.comm.group import agreed


def attend(request: Request, group: object) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of what was asked for, once all ranks of the group have agreed that it can be done."""
    request = _autocast(request)
    if torch.compiler.is_compiling():
        return operators.attend(request, group)
    found: tuple[Tensor, Tensor] = _attend_at_once(request, group)
    return found


# Where a graph has broken, nothing below is to be compiled piece by piece.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_at_once(request: Request, group: object) -> tuple[Tensor, Tensor]:
    team = team_for(request.operation, group)
    job = agreed(team, request.signature(), lambda: prepare(request, team))
    out, lse = Attention.apply(*request.tensors, job, team)  # type: ignore[no-untyped-call]
    return cast(Tensor, out), cast(Tensor, lse)


def _autocast(request: Request) -> Request:
    """Casts q, k, v as torch's own attention does inside autocast."""
    q, k, v = request.q, request.k, request.v
    if not isinstance(q, Tensor) or not torch.is_autocast_enabled(q.device.type):
        return request
    dtype = torch.get_autocast_dtype(q.device.type)

    def cast_down(x: Tensor) -> Tensor:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype is not torch.float64
        return x.to(dtype) if eligible else x

    return replace(request, q=cast_down(q), k=cast_down(k), v=cast_down(v))
