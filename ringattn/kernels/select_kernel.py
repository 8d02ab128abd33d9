"""Choosing a kernel: the first of a table that can run a call, or the one that was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

from ringattn.errors import BackendError
from ringattn.kernels.contract import ProblemSpec


class Selectable(Protocol):
    """What a choice asks of a kernel."""

    def available(self) -> list[str]: ...

    def unsupported(self, call: ProblemSpec) -> list[str]: ...


Kernel = TypeVar("Kernel", bound=Selectable)


def reasons_against(kernel: Selectable, call: ProblemSpec) -> list[str]:
    """Returns every reason why a kernel cannot run `call`: of this machine, else of the call; empty if it can."""
    return kernel.available() or kernel.unsupported(call)


def select_from(table: Mapping[str, Kernel], backend: str | None, call: ProblemSpec) -> Kernel:
    """Returns the kernel for a call.

    Args:
        table: kernels by name, the preferred ones first.
        backend: a key of the table, which is taken or refused but never replaced; None takes the first that can.
        call: what is to be run.
    Raises:
        BackendError: when the backend is unknown, or cannot run the call, with every reason.
    """
    if backend is not None and backend not in table:
        raise BackendError(f"backend={backend!r}: must be one of {', '.join(map(repr, table))}, or None")
    names = list(table) if backend is None else [backend]
    reasons = {name: reasons_against(table[name], call) for name in names}
    for name in names:
        if not reasons[name]:
            return table[name]
    told = "; ".join(f"{name}: {' and '.join(why)}" for name, why in reasons.items())
    raise BackendError(
        f"backend={backend!r} cannot run this call ({told}). "
        "Pass backend=None for the first kernel that can, or change what it refuses"
    )
