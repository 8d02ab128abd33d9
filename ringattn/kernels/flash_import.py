"""Import of the installed FlashAttention packages on first use, with a check of their interface."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

# Names of functions, each with the parameters that distinguish its interface from older ones.
Functions = tuple[tuple[str, tuple[str, ...]], ...]


def is_installed(package: str) -> bool:
    """Returns whether a top-level package can be found, without importing it."""
    try:
        return find_spec(package) is not None
    except ValueError:
        # A stand-in in sys.modules without a __spec__.
        return False


@cache
def import_flash(module: str) -> ModuleType:
    """Returns a module, imported once.

    Raises:
        ImportError: when it is absent, or its import fails with any exception.
    """
    package = module.partition(".")[0]
    if not is_installed(package):
        raise ImportError(f"{package} is not installed")
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        # The package flash_attn may contain version 2 alone, or version 4 alone.
        raise ImportError(f"{error.name} is not installed") from error
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        raise ImportError(f"importing {module} fails: {type(error).__name__}: {message}") from error


def interface_mismatch(module: str, functions: Functions) -> str | None:
    """Returns why a module's functions cannot be called with these parameters, or None if they can; imports it."""
    try:
        imported = import_flash(module)
    except ImportError as error:
        return str(error)
    for name, required in functions:
        function = getattr(imported, name, None)
        if function is None:
            return f"{module} has no {name}: this is another version than ringattn knows"
        accepted = _parameters(function)
        for parameter in required:
            if accepted is not None and parameter not in accepted:
                return f"{module}.{name} has no {parameter}: this is another version than ringattn knows"
    return None


def _parameters(function: Callable[..., object]) -> frozenset[str] | None:
    """The names of a function's parameters; None if it takes any."""
    # Custom operators of torch take any arguments; `_init_fn` is the wrapped function.
    parameters = inspect.signature(getattr(function, "_init_fn", function)).parameters.values()
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return None if open_ended else frozenset(p.name for p in parameters)
