"""Running what was asked for: at once, or as an operator in a graph that is being compiled."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ringattn.attention import operators
from ringattn.attention.auto_exchange import with_exchange
from ringattn.attention.autograd import AttentionFunction
from ringattn.attention.validate import AttentionCall, apply_autocast, mesh_for, plan_call
from ringattn.comm.agreement import agree
from ringattn.comm.topology import RankMesh


def dispatch(request: AttentionCall, group: object) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of what was asked for, once all ranks of the group have agreed that it can be done."""
    request = apply_autocast(request)
    if torch.compiler.is_compiling():
        return operators.traced_attention(request, group)
    found: tuple[Tensor, Tensor] = _attend_at_once(request, group)
    return found


# Where a graph has broken, nothing below is to be compiled piece by piece.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_at_once(request: AttentionCall, group: object) -> tuple[Tensor, Tensor]:
    return attend_on(request, mesh_for(request.operation, group))


def attend_on(request: AttentionCall, team: RankMesh) -> tuple[Tensor, Tensor]:
    """Returns the same for a team, at once."""
    request = with_exchange(request, team)
    job = agree(team, request.signature(), lambda: plan_call(request, team))
    out, lse = AttentionFunction.apply(*request.tensors, job, team)  # type: ignore[no-untyped-call]
    return cast(Tensor, out), cast(Tensor, lse)
