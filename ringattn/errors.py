"""The errors of ringattn, as a tree.

    RingAttnError
    ├── ArgumentError (also a ValueError)     an argument has a value that is not allowed
    │   ├── ArgumentTypeError (also a TypeError)  ... or a type that is not
    │   ├── LayoutError                       a layout does not fit: its world size, its length, its rows
    │   ├── MaskError                         a mask does not fit: its parameters, or the sequence it meets
    │   └── SequenceError                     a cache has no such sequence, or not the tokens that are meant
    ├── BackendError (also a ValueError)      the kernel that was asked for cannot run this call: every reason
    ├── DisagreementError (also a ValueError) the ranks of one group did not ask for the same thing
    ├── OutOfPagesError                       a cache has no room for what was to be added; nothing was added
    ├── SnapshotError (also a ValueError)     a saved cache is not there, not whole, or does not fit
    └── CheckpointError (also a ValueError)   a checkpoint does not fit the model, or is in the way

Everything that a caller can get wrong is raised before anything is sent, on every rank of the group alike:
what one rank finds wrong with its own arguments, the others raise too, naming that rank.
"""

from __future__ import annotations

import numpy as np


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


class SequenceError(ArgumentError):
    """A cache has no such sequence, or the sequence has not the tokens that are meant."""


class BackendError(RingAttnError, ValueError):
    """No kernel, or not the one that was asked for, can run this call; the message holds every reason."""


class DisagreementError(RingAttnError, ValueError):
    """The ranks of one group asked for different things; the message says who asked for what."""


class OutOfPagesError(RingAttnError):
    """A cache has no room for what was to be added; nothing was added, on any rank."""


class SnapshotError(RingAttnError, ValueError):
    """A saved cache is not there, not whole, or does not fit the cache that it was to become."""


class CheckpointError(RingAttnError, ValueError):
    """A checkpoint does not fit what is to be trained on, or stands where another was to be saved."""


def check_integer(name: str, value: object, minimum: int, error: type[ArgumentError] = ArgumentError) -> int:
    """Returns `value` as an int if it is an integer of `minimum` or more; numpy integers count, bools do not.

    Args:
        name: of the argument, for the message.
        value: what the caller passed.
        minimum: the smallest value that is allowed.
        error: what is raised.
    Raises:
        ArgumentError: or `error`, when it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
        raise error(f"{name}={value!r:.100}: must be an integer of {minimum} or more")
    return int(value)
