"""The implementation of the operators that stand for a call in a compiled graph; `custom_ops.py` registers them.

A graph holds tensors, numbers and texts, so a call's mask, layouts and group are written into one text while tracing,
and parsed when the operator runs. There is no table that a graph could outlive, and a graph that is loaded in another
process means the same there.

Tracing sends nothing: a rank may compile, or recompile, while others do not. The ranks agree when the operator runs,
just as in an eager call, and also with ranks that call eagerly.
"""

from __future__ import annotations

from ast import literal_eval
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringattn.attention import autograd
from ringattn.attention.auto_exchange import prepare
from ringattn.attention.custom_ops import OPERATORS, attention, attention_backward
from ringattn.attention.execution_plan import ExecutionPlan
from ringattn.attention.inductor_order import keep_order
from ringattn.attention.validate import AttentionCall, mesh_for
from ringattn.comm.agreement import agree, recall
from ringattn.comm.topology import mesh_from_name, mesh_name
from ringattn.cost.cost_model import CostModel, parse_cost_model
from ringattn.errors import ArgumentError, ArgumentTypeError
from ringattn.geometry.layout import Layout, contiguous, parse_layout, striped, zigzag
from ringattn.geometry.masks import Mask, parse_mask
from ringattn.plan.exchanges import Exchange, parse_exchange
from ringattn.score import Score, check_number
from ringattn.softmax import accumulation_dtype
from ringattn.types import Masks


def traced_attention(call: AttentionCall, group: object) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of a call in a graph that is being traced."""
    score = call.score
    scale = None if score.scale is None else check_number("scale", score.scale)
    softcap = None if score.softcap is None else check_number("softcap", score.softcap)
    if isinstance(call.stages, bool):
        raise ArgumentError(f"stages={call.stages!r}: must be an integer of 1 or more")
    text = _serialize(call, _mesh_text(call.operation, _exchange_text(call.exchange), group))
    found: tuple[Tensor, Tensor] = attention(*call.tensors, text, scale, softcap, call.stages)
    return found


def _exchange_text(exchange: Exchange | str) -> str:
    """The name of an exchange, or the text of a value, which has parentheses."""
    if isinstance(exchange, str):
        return exchange
    if isinstance(exchange, Exchange):
        return exchange.text
    raise ArgumentError(f"exchange={exchange!r}: must be the name of one, 'auto', or a value such as Ring()")


def _exchange_from_text(text: str) -> Exchange | str:
    return parse_exchange(text) if text.endswith(")") else text


# ---- a call as a text


class _ParsedCall(NamedTuple):
    """All of a call but its tensors and numbers."""

    operation: str
    returns_lse: bool
    gradients: tuple[bool, ...]
    mesh: str
    backend: str | None
    exchange: Exchange | str
    model: CostModel | None
    layout: Layout | None
    kv_layout: Layout | None
    mask: Masks


def _serialize(call: AttentionCall, mesh: str) -> str:
    """Returns the text of a call. It is traced: a graph is guarded by exactly the values that it reads."""
    mask, backend, model = call.mask, call.backend, call.model
    if backend is not None and not isinstance(backend, str):
        raise ArgumentError(f"backend={backend!r}: must be a name, or None")
    if model is not None and not isinstance(model, CostModel):
        raise ArgumentTypeError(f"model={model!r}: must be a CostModel or None")
    if mask is None:
        masks = []
    elif isinstance(mask, Mask):
        masks = ["all", mask.text]
    else:
        masks = ["each", *[row.text for row in mask]]
    gradients = "".join(["1" if wanted else "0" for wanted in call.require_gradients()])
    layouts = ["" if layout is None else layout.text for layout in (call.layout, call.kv_layout)]
    choice = [_exchange_text(call.exchange), "" if model is None else model.text]
    lse = "lse" if call.returns_lse else ""
    return "\n".join([call.operation, lse, gradients, mesh, repr(backend), *choice, *layouts, *masks])


@lru_cache(maxsize=256)
def _parse(text: str) -> _ParsedCall:
    operation, lse, gradients, mesh, backend, exchange, model, layout, kv_layout, *masks = text.split("\n")
    mask: Masks = None
    if masks:
        rows = [parse_mask(row) for row in masks[1:]]
        mask = rows[0] if masks[0] == "all" else rows
    return _ParsedCall(
        operation,
        bool(lse),
        tuple(wanted == "1" for wanted in gradients),
        mesh,
        literal_eval(backend),
        _exchange_from_text(exchange),
        parse_cost_model(model) if model else None,
        parse_layout(layout) if layout else None,
        parse_layout(kv_layout) if kv_layout else None,
        mask,
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _mesh_text(operation: str, exchange: str, group: object) -> str:
    # While a graph is traced, torch shows some objects through a stand-in.
    return mesh_name(mesh_for(operation, _exchange_from_text(exchange), getattr(group, "real_obj", group)))


# So that they can be called in a compiled function: numbers to a value, and nothing to trace.
for _constructor in (contiguous, striped, zigzag):
    torch.compiler.assume_constant_result(_constructor.__wrapped__)  # type: ignore[no-untyped-call]


def _rebuild_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    parsed: _ParsedCall,
    scale: float | None,
    softcap: float | None,
    stages: int | None,
) -> AttentionCall:
    return AttentionCall(
        parsed.operation, q, k, v, Score(scale, softcap, sink), parsed.mask, parsed.layout, parsed.kv_layout,
        parsed.backend, parsed.exchange, stages, parsed.model, parsed.returns_lse, parsed.gradients,
    )  # fmt: skip


# ---- the operators


def forward(
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
    parsed = _parse(call)
    mesh, rebuilt = mesh_from_name(parsed.mesh), _rebuild_call(q, k, v, sink, parsed, scale, softcap, stages)
    plan = agree(mesh, rebuilt.signature(), lambda: prepare(rebuilt, mesh))
    return autograd.forward(plan, mesh, q, k, v, sink)


def fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    call: str,
    scale: float | None,
    softcap: float | None,
    stages: int | None,
) -> tuple[Tensor, Tensor]:
    """Returns empty tensors like the results of `forward`."""
    _parse(call)  # a mask that cannot be read again is refused before anything runs
    keep_order(*OPERATORS)
    # Slices, so that tensors of wrong shapes get as far as the checks that all ranks make together.
    out = q.new_empty((*q.shape[:3], *v.shape[3:]))
    lse = q.new_empty((*q.shape[:1], *q.shape[2:3], *q.shape[1:2]), dtype=accumulation_dtype(q.dtype))
    return out, lse


def backward(
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
    """Runs a call backward; returns the gradients of the tensors among q, k, v, sink that require them."""
    parsed = _parse(call)
    mesh, rebuilt = mesh_from_name(parsed.mesh), _rebuild_call(q, k, v, sink, parsed, scale, softcap, stages)
    plan: ExecutionPlan = recall(mesh, rebuilt.signature(), lambda: prepare(rebuilt, mesh))
    saved = autograd.SavedForward(q, k, v, sink, out, lse)
    found = autograd.backward(plan, mesh, saved, dout, dlse, rebuilt.require_gradients())
    return [_own_storage(x) for x in found if x is not None]


def _own_storage(x: Tensor) -> Tensor:
    """Returns the tensor in memory of its own: what an operator returns must not overlap."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def fake_backward(
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
    """Returns empty tensors like the results of `backward`."""
    wanted = _parse(call).gradients
    return [x.new_empty(x.shape) for x, wants in zip((q, k, v, sink), wanted, strict=True) if wants and x is not None]


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Saves the inputs and outputs of the forward operator for its gradient."""
    q, k, v, sink, *ctx.call = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, sink, *output)


def differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Returns the gradients of all inputs of the forward operator, by the backward operator."""
    found = iter(attention_backward(dout, dlse, *ctx.saved_tensors, *ctx.call))
    gradients = [next(found) if wanted else None for wanted in _parse(ctx.call[0]).gradients]
    return (*gradients, None, None, None, None)
