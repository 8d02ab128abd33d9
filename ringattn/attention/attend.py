"""Running what was asked for: at once, or as an operator in a graph that is being compiled."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ringattn.attention import operators
from ringattn.attention.choosing import settled
from ringattn.attention.function import Attention
from ringattn.attention.request import Request, autocast, prepare, team_for
from ringattn.comm.group import Team, agreed


def attend(request: Request, group: object) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of what was asked for, once all ranks of the group have agreed that it can be done."""
    request = autocast(request)
    if torch.compiler.is_compiling():
        return operators.attend(request, group)
    found: tuple[Tensor, Tensor] = _attend_at_once(request, group)
    return found


# Where a graph has broken, nothing below is to be compiled piece by piece.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_at_once(request: Request, group: object) -> tuple[Tensor, Tensor]:
    return attend_with(request, team_for(request.operation, group))


def attend_with(request: Request, team: Team) -> tuple[Tensor, Tensor]:
    """Returns the same for a team, at once."""
    request = settled(request, team)
    job = agreed(team, request.signature(), lambda: prepare(request, team))
    out, lse = Attention.apply(*request.tensors, job, team)  # type: ignore[no-untyped-call]
    return cast(Tensor, out), cast(Tensor, lse)
