"""The order of calls in what Inductor makes of a graph.

Inductor puts a graph's operators into the order that takes least memory, and decides that by sizes, which differ
between ranks. So two calls of which neither needs the other's result might change places on one rank alone, and each
rank would wait for the other. Here each call depends on the call before it. That orders them, and keeps no
result alive.

Operators registered as effectful would be held to their order by torch itself, but it fails on them in a graph with
activation checkpoints (2.13).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch._ops import OpOverload


def keep_order(*operators: OpOverload) -> None:
    """Makes Inductor keep these operators in the order of the program; once in a process, and only if it is in use.

    Called while a graph is traced, for which Inductor has loaded its lowerings; others do not pay for loading them.
    """
    if "torch._inductor.lowering" in sys.modules:
        _register(operators)


@lru_cache(maxsize=8)
def _register(operators: tuple[OpOverload, ...]) -> None:
    try:
        from torch._inductor import lowering
        from torch._inductor.virtualized import V
        from torch._library.utils import get_layout_constraint_tag

        def ordered(operator: OpOverload, lower: Callable[..., Any]) -> Callable[..., Any]:
            def lowered(*args: Any, **kwargs: Any) -> Any:
                before = _calls(V.graph, operators)
                found = lower(*args, **kwargs)
                if before:
                    name = _calls(V.graph, operators)[-1].get_operation_name()
                    V.graph.additional_buffer_deps[name].add(before[-1].get_name())
                return found

            return lowered

        for operator in operators:
            constraint = lowering.tag_to_layout_constraint(get_layout_constraint_tag(operator, with_default=True))
            # As for any operator that it does not know.
            lowering.make_fallback(operator, layout_constraint=constraint, warn=False)  # type: ignore[no-untyped-call]
            lower = ordered(operator, lowering.lowerings[operator])
            lowering.register_lowering(operator, type_promotion_kind=None)(lower)
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"this torch may change the order of attention calls that need nothing of each other ({error}): where "
            "ranks have different numbers of rows, set torch._inductor.config.reorder_for_peak_memory = False",
            stacklevel=2,
        )


def _calls(graph: Any, operators: tuple[OpOverload, ...]) -> list[Any]:
    """The calls of the operators so far, as what Inductor lowers them to."""
    return [call for call in graph.operations if getattr(call, "op_overload", None) in operators]
