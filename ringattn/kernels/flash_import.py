"""Finding what is installed of FlashAttention, when it is asked for and not before."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

# Names of functions, each with the parameters that tell its interface from older ones.
Functions = tuple[tuple[str, tuple[str, ...]], ...]


def installed(package: str) -> bool:
    """Returns whether a top-level package is there, without importing it."""
    try:
        return find_spec(package) is not None
    except ValueError:
        # Somebody's stand-in, which tells nothing of where it comes from.
        return False


@cache
def import_flash(module: str) -> ModuleType:
    """Returns a module, imported once.

    Raises:
        ImportError: when it is absent, or broken in whatever way.
    """
    package = module.partition(".")[0]
    if not installed(package):
        raise ImportError(f"{package} is not installed")
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        # The package of flash-attn 2 may hold flash-attn 4 alone, and the other way round.
        raise ImportError(f"{error.name} is not installed") from error
    except Exception as error:
        told = str(error).strip().partition("\n")[0]
        raise ImportError(f"importing {module} fails: {type(error).__name__}: {told}") from error


def missing_parts(module: str, functions: Functions) -> str | None:
    """Returns why these functions of a module cannot be called with these parameters, if so; imports it."""
    try:
        found = import_flash(module)
    except ImportError as error:
        return str(error)
    for name, wanted in functions:
        function = getattr(found, name, None)
        if function is None:
            return f"{module} has no {name}: this is another version than ringattn knows"
        taken = _parameters(function)
        for parameter in wanted:
            if taken is not None and parameter not in taken:
                return f"{module}.{name} has no {parameter}: this is another version than ringattn knows"
    return None


def _parameters(function: Callable[..., object]) -> frozenset[str] | None:
    """The names of a function's parameters; None if they cannot be told."""
    # torch's custom operators take anything, and hold the function they were made of.
    parameters = inspect.signature(getattr(function, "_init_fn", function)).parameters.values()
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return None if open_ended else frozenset(p.name for p in parameters)
