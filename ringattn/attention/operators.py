"""The operators that stand for a call in a compiled graph.

A graph holds tensors, numbers and texts, so a call's mask, layouts and group are written into one text while the graph
is made, and read again when it runs. The text is all there is: no table that a graph could outlive, and a graph that
is kept for another process means there what it means here.

Making a graph sends nothing: a rank may compile, or compile again, while others do not. The ranks agree when the
operator runs, just as in a call at once, and with those that make one.
"""

from __future__ import annotations

from ast import literal_eval
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from ringattn.attention import autograd
from ringattn.attention.auto_exchange import with_exchange
from ringattn.attention.executor import ExecutionPlan
from ringattn.attention.inductor_order import keep_order
from ringattn.attention.validate import AttentionCall, ExchangePreference, mesh_for, plan_call
from ringattn.comm.agreement import agree, recall
from ringattn.comm.topology import mesh_from_name, mesh_name
from ringattn.cost.cost_model import CostModel, parse_cost_model
from ringattn.errors import ArgumentError, ArgumentTypeError
from ringattn.geometry.layout import Layout, contiguous, parse_layout, striped, zigzag
from ringattn.geometry.masks import Mask, parse_mask
from ringattn.score import check_number
from ringattn.softmax import accumulation_dtype
from ringattn.types import Masks


def traced_attention(request: AttentionCall, group: object) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of a call in a graph that is being made."""
    scale = None if request.scale is None else check_number("scale", request.scale)
    softcap = None if request.softcap is None else check_number("softcap", request.softcap)
    if isinstance(request.stages, bool):
        raise ArgumentError(f"stages={request.stages!r}: must be an integer of 1 or more")
    call = _serialize(request, _team_text(request.operation, group))
    if request.asked is not None:
        _check_asked(request.asked)
    found: tuple[Tensor, Tensor] = attention(*request.tensors, call, scale, softcap, request.stages)
    return found


def _check_asked(asked: ExchangePreference) -> None:
    if not isinstance(asked.exchange, str):
        raise ArgumentError(f"exchange={asked.exchange!r}: must be the name of one, or 'auto'")
    if asked.model is not None and not isinstance(asked.model, CostModel):
        raise ArgumentTypeError(f"model={asked.model!r}: must be a CostModel or None")


# ---- a call as a text


class _ParsedCall(NamedTuple):
    """All of a call but its tensors and numbers."""

    operation: str
    returns_lse: bool
    gradients: tuple[bool, ...]
    team: str
    backend: str | None
    asked: ExchangePreference | None
    layout: Layout | None
    kv_layout: Layout | None
    mask: Masks


def _serialize(request: AttentionCall, team: str) -> str:
    """Returns the text of a call. Traced, so that graphs are told apart by what it reads, and by nothing else."""
    mask, backend = request.mask, request.backend
    if backend is not None and not isinstance(backend, str):
        raise ArgumentError(f"backend={backend!r}: must be a name, or None")
    if mask is None:
        masks = []
    elif isinstance(mask, Mask):
        masks = ["all", mask.text]
    else:
        masks = ["each", *[row.text for row in mask]]
    gradients = "".join(["1" if wanted else "0" for wanted in request.require_gradients()])
    layouts = ["" if layout is None else layout.text for layout in (request.layout, request.kv_layout)]
    asked = ""
    if request.asked is not None:
        model = request.asked.model
        asked = repr(request.asked.exchange) + "\t" + ("" if model is None else model.text)
    told = [request.operation, "lse" if request.returns_lse else "", gradients, team, repr(backend), asked]
    lines = [*told, *layouts, *masks]
    return "\n".join(lines)


@lru_cache(maxsize=256)
def _parse(text: str) -> _ParsedCall:
    operation, lse, gradients, team, backend, asked, layout, kv_layout, *masks = text.split("\n")
    exchange, _, model = asked.partition("\t")
    mask: Masks = None
    if masks:
        rows = [parse_mask(row) for row in masks[1:]]
        mask = rows[0] if masks[0] == "all" else rows
    return _ParsedCall(
        operation,
        bool(lse),
        tuple(wanted == "1" for wanted in gradients),
        team,
        literal_eval(backend),
        ExchangePreference(literal_eval(exchange), parse_cost_model(model) if model else None) if asked else None,
        parse_layout(layout) if layout else None,
        parse_layout(kv_layout) if kv_layout else None,
        mask,
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _team_text(operation: str, group: object) -> str:
    # While a graph is made, torch shows some objects through a stand-in.
    return mesh_name(mesh_for(operation, getattr(group, "real_obj", group)))


# So that they can be called in a compiled function: numbers to a value, and nothing to trace.
for _constructor in (contiguous, striped, zigzag):
    torch.compiler.assume_constant_result(_constructor.__wrapped__)  # type: ignore[no-untyped-call]


def _rebuild_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    call: _ParsedCall,
    scale: float | None,
    softcap: float | None,
    stages: int | None,
) -> AttentionCall:
    return AttentionCall(
        call.operation, q, k, v, call.mask, call.layout, call.kv_layout, scale, softcap, sink, call.backend, stages,
        call.returns_lse, call.gradients, call.asked,
    )  # fmt: skip


# ---- the operators


@torch.library.custom_op("ringattn::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    call: str,
    scale: float | None,
    softcap: float | None,
    stages: int | None,
) -> tuple[Tensor, Tensor]:
    """Runs a call forward: (out, lse), as in api.ring_attention_with_lse."""
    request = _rebuild_call(q, k, v, sink, _parse(call), scale, softcap, stages)
    team = mesh_from_name(_parse(call).team)
    request = with_exchange(request, team)
    job = agree(team, request.signature(), lambda: plan_call(request, team))
    return autograd.forward(job, team, q, k, v, sink)


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    call: str,
    scale: float | None,
    softcap: float | None,
    stages: int | None,
) -> tuple[Tensor, Tensor]:
    _parse(call)  # a mask that cannot be read again is refused before anything runs
    keep_order(*_OPERATORS)
    # Slices, so that tensors of wrong shapes get as far as the checks that all ranks make together.
    out = q.new_empty((*q.shape[:3], *v.shape[3:]))
    lse = q.new_empty((*q.shape[:1], *q.shape[2:3], *q.shape[1:2]), dtype=accumulation_dtype(q.dtype))
    return out, lse


@torch.library.custom_op("ringattn::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    call: str,
    scale: float | None,
    softcap: float | None,
    stages: int | None,
) -> list[Tensor]:
    """Runs a call backward: the gradients of those of q, k, v, sink that require them."""
    request = _rebuild_call(q, k, v, sink, _parse(call), scale, softcap, stages)
    team = mesh_from_name(_parse(call).team)
    request = with_exchange(request, team, recall)
    job: ExecutionPlan = recall(team, request.signature(), lambda: plan_call(request, team))
    saved = autograd.SavedForward(q, k, v, sink, out, lse)
    found = autograd.backward(job, team, saved, dout, dlse, request.require_gradients())
    return [_own_storage(x) for x in found if x is not None]


def _own_storage(x: Tensor) -> Tensor:
    """Returns the tensor in memory of its own: what an operator returns must not overlap."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


@attention_backward.register_fake
def _(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    call: str,
    scale: float | None,
    softcap: float | None,
    stages: int | None,
) -> list[Tensor]:
    wanted = _parse(call).gradients
    return [x.new_empty(x.shape) for x, wants in zip((q, k, v, sink), wanted, strict=True) if wants and x is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sink, *ctx.call = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, sink, *output)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    found = iter(attention_backward(dout, dlse, *ctx.saved_tensors, *ctx.call))
    gradients = [next(found) if wanted else None for wanted in _parse(ctx.call[0]).gradients]
    return (*gradients, None, None, None, None)


attention.register_autograd(_backward, setup_context=_setup_context)

_OPERATORS = (torch.ops.ringattn.attention.default, torch.ops.ringattn.attention_backward.default)

# A rank that does not use its result must still do its part for the others.
for _operator in _OPERATORS:
    has_side_effect(_operator)
