"""The errors of ringattn, as a tree.

    RingAttnError
    ├── ArgumentError (also a ValueError)     an argument has a value that is not allowed
    │   ├── ArgumentTypeError (also a TypeError)  ... or a type that is not
    │   ├── LayoutError                       a layout does not fit: its world size, its length, its rows
    │   └── MaskError                         a mask does not fit: its parameters, or the sequence it meets
    ├── BackendError (also a ValueError)      the kernel that was asked for cannot run this call: every reason
    └── DisagreementError (also a ValueError) the ranks of one group did not ask for the same thing

Everything that a caller can get wrong is raised before anything is sent, on every rank of the group alike:
what one rank finds wrong with its own arguments, the others raise too, naming that rank.
"""

from __future__ import annotations


class RingAttnError(Exception):
    """The root of everything that this package raises on purpose."""


class ArgumentError(RingAttnError, ValueError):
    """An argument has a value that is not allowed; the message names it, its value and what is allowed."""


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument has a type that is not allowed."""


class LayoutError(ArgumentError):
    """A layout does not fit the group, the tensors, or itself."""


class MaskError(ArgumentError):
    """A mask does not fit the sequence, the batch, or itself."""


class BackendError(RingAttnError, ValueError):
    """No kernel, or not the one that was asked for, can run this call; the message holds every reason."""


class DisagreementError(RingAttnError, ValueError):
    """The ranks of one group asked for different things; the message says who asked for what."""
