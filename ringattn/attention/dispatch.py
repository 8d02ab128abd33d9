"""Running a call: at once, or as an operator in a graph that is being traced."""

from __future__ import annotations

import sys
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ringattn.attention.auto_exchange import prepare
from ringattn.attention.autograd import AttentionFunction
from ringattn.attention.validate import AttentionCall, apply_autocast, mesh_for
from ringattn.comm.agreement import agree
from ringattn.comm.topology import RankMesh

if TYPE_CHECKING:
    from collections.abc import Callable


def dispatch(call: AttentionCall, group: object) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of a call, once all ranks of the group have agreed that it can be run.

    Where a graph is traced, or a dispatch mode watches operators (as selective activation checkpointing does), the call
    is one operator.
    """
    call = apply_autocast(call)
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        from ringattn.attention import operators

        return operators.traced_attention(call, group)
    if "torch._dynamo" in sys.modules:
        return cast("tuple[Tensor, Tensor]", _outside_of_graphs()(call, group))
    return _run_eagerly(call, group)


def _run_eagerly(call: AttentionCall, group: object) -> tuple[Tensor, Tensor]:
    return attend_on(call, mesh_for(call.operation, call.exchange, group))


@lru_cache(maxsize=1)
def _outside_of_graphs() -> Callable[..., Any]:
    """`_run_eagerly`, of which nothing is compiled piece by piece where a graph has broken."""
    return torch.compiler.disable(_run_eagerly)  # type: ignore[no-untyped-call, no-any-return]


def attend_on(call: AttentionCall, mesh: RankMesh) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of a call on a mesh, at once."""
    plan = agree(mesh, call.signature(), partial(prepare, call, mesh))
    out, lse = AttentionFunction.apply(*call.tensors, plan, mesh)  # type: ignore[no-untyped-call]
    return cast(Tensor, out), cast(Tensor, lse)
