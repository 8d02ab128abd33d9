"""The custom operators that stand for a call in a graph, `torch.ops.ringattn`.

`import ringattn` registers them, since a graph that was exported or cached names them before any call is made. Their
implementation, `operators.py`, is imported when a graph is traced or run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx.node import has_side_effect

if TYPE_CHECKING:
    from torch import Tensor

_CALL = "str call, float? scale, float? softcap, SymInt? stages"
_FORWARD = f"(Tensor q, Tensor k, Tensor v, Tensor? sink, {_CALL}) -> (Tensor, Tensor)"
_BACKWARD = (
    "(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor out, Tensor lse, "
    f"{_CALL}) -> Tensor[]"
)


def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    from ringattn.attention import operators

    return operators.forward(*inputs)


def _fake_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    from ringattn.attention import operators

    return operators.fake_forward(*inputs)


def _backward(*inputs: Any) -> list[Tensor]:
    from ringattn.attention import operators

    return operators.backward(*inputs)


def _fake_backward(*inputs: Any) -> list[Tensor]:
    from ringattn.attention import operators

    return operators.fake_backward(*inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    from ringattn.attention import operators

    operators.setup_context(ctx, inputs, output)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    from ringattn.attention import operators

    return operators.differentiate(ctx, dout, dlse)


attention = torch.library.custom_op("ringattn::attention", _forward, mutates_args=(), schema=_FORWARD)
attention.register_fake(_fake_forward)
attention.register_autograd(_differentiate, setup_context=_setup_context)
attention_backward = torch.library.custom_op(
    "ringattn::attention_backward", _backward, mutates_args=(), schema=_BACKWARD
)
attention_backward.register_fake(_fake_backward)

OPERATORS = (torch.ops.ringattn.attention.default, torch.ops.ringattn.attention_backward.default)

# A rank that does not use its result must still communicate with the others.
for _operator in OPERATORS:
    has_side_effect(_operator)
