"""Selecting a kernel: the named one, or the first of a table that can run the problem."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

from ringattn.errors import BackendError
from ringattn.kernels.contract import ProblemSpec


class Selectable(Protocol):
    """The part of a kernel that its selection needs."""

    def available(self) -> list[str]: ...

    def unsupported(self, problem: ProblemSpec) -> list[str]: ...


Kernel = TypeVar("Kernel", bound=Selectable)


def reasons_against(kernel: Selectable, problem: ProblemSpec) -> list[str]:
    """Returns every reason why a kernel cannot run a problem: reasons of this machine, else of the problem."""
    return kernel.available() or kernel.unsupported(problem)


def select_from(table: Mapping[str, Kernel], backend: str | None, problem: ProblemSpec) -> Kernel:
    """Returns the kernel for a problem.

    Args:
        table: kernels by name, in order of preference.
        backend: a key of the table, taken or refused but never replaced; None takes the first that can run it.
        problem: properties of the call, equal on all ranks.
    Raises:
        BackendError: when the backend is unknown, or cannot run the problem, with every reason.
    """
    if backend is not None and backend not in table:
        raise BackendError(f"backend={backend!r}: must be one of {', '.join(map(repr, table))}, or None")
    names = list(table) if backend is None else [backend]
    reasons = {name: reasons_against(table[name], problem) for name in names}
    for name in names:
        if not reasons[name]:
            return table[name]
    listed = "; ".join(f"{name}: {' and '.join(why)}" for name, why in reasons.items())
    raise BackendError(
        f"backend={backend!r} cannot run this call ({listed}). "
        "Pass backend=None for the first kernel that can, or change what it refuses"
    )
