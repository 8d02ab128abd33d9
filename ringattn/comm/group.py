"""Process groups: telling which one is meant, and making its ranks agree before anything is sent.

A rank that raised alone would leave the others waiting, and ranks that mean different things would exchange
garbage. So the first call of every signature compares notes: each rank tells what it asks for, or what it found wrong,
and all of them go on, or all of them raise the same error. Later calls of that signature cost a dictionary look-up.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringattn import errors
from ringattn.errors import ArgumentError, ArgumentTypeError, DisagreementError, RingAttnError

Result = TypeVar("Result")

# What the ranks of a group have agreed on. Every rank makes the same calls, so all forget the same ones.
_AGREED: WeakKeyDictionary[dist.ProcessGroup, OrderedDict[Hashable, Any]] = WeakKeyDictionary()
_REMEMBERED = 256


def resolve(group: object) -> dist.ProcessGroup:
    """Returns the process group that a caller means.

    Args:
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the default group.
    Raises:
        ArgumentTypeError: when it is something else.
        ArgumentError: when there is no such group, or this process is not in it.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ArgumentError(
            f"group={group!r}: torch.distributed is not initialised; start the program with torchrun and call "
            "torch.distributed.init_process_group() first (one process alone is a group of one rank)"
        )
    found: object
    if group is None:
        found = dist.group.WORLD
    elif isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ArgumentError(
                f"group={group!r}: a mesh of {group.ndim} dimensions; pass one of them, such as mesh['ring']"
            )
        if group.get_coordinate() is None:
            raise ArgumentError(f"group={group!r}: this process is not a member of the mesh")
        found = group.get_group()
    else:
        found = group
    if found == dist.GroupMember.NON_GROUP_MEMBER:
        raise ArgumentError(f"group={group!r}: this process is not a member of the group")
    if not isinstance(found, dist.ProcessGroup):
        raise ArgumentTypeError(
            f"group={group!r}: must be a ProcessGroup, a 1-D DeviceMesh, or None for the default group"
        )
    if dist.get_rank(found) < 0:
        raise ArgumentError(f"group={group!r}: this process is not a member of the group")
    return found


def agreed(group: dist.ProcessGroup, key: Hashable, prepare: Callable[[], tuple[Mapping[str, str], Result]]) -> Result:
    """Returns what `prepare` makes, once every rank of the group has made the same of it.

    Args:
        group: all its ranks call this together when the key is new to them.
        key: the signature of the call, as this rank sees it; None is never remembered.
        prepare: checks the arguments and returns what all ranks must have in common (name: value, as text), and
            the result, which may differ from rank to rank.
    Raises:
        RingAttnError: what `prepare` raised on the first rank where it did, on every rank.
        DisagreementError: when the ranks' texts differ, on every rank.
    Communication: one all-gather of a few hundred bytes on the first call of a signature; nothing afterwards, and
        nothing for a group of one rank.
    """
    memory = _AGREED.get(group)
    if memory is None:
        memory = _AGREED[group] = OrderedDict()
    if key is not None and key in memory:
        memory.move_to_end(key)
        found: Result = memory[key]
        return found
    if group.size() == 1:
        _, result = prepare()
    else:
        result = _compare(group, prepare)
    if key is not None:
        memory[key] = result
        if len(memory) > _REMEMBERED:
            memory.popitem(last=False)
    return result


def _compare(group: dist.ProcessGroup, prepare: Callable[[], tuple[Mapping[str, str], Result]]) -> Result:
    told: Mapping[str, str] = {}
    error: Exception | None = None
    try:
        told, result = prepare()
    except Exception as problem:  # whatever it is, the other ranks must not be left waiting
        error = problem
    note = (dict(told), None if error is None else _described(error))
    notes: list[Any] = [None] * group.size()
    dist.all_gather_object(notes, note, group=group)
    failures = [(rank, *problem) for rank, (_, problem) in enumerate(notes) if problem is not None]
    if failures:
        rank, kind, message = failures[0]
        everywhere = len(failures) == len(notes) and len({failure[1:] for failure in failures}) == 1
        where = "" if everywhere else f"on rank {rank} of {len(notes)}: "
        raise _error_class(kind)(where + message) from error
    views = [view for view, _ in notes]
    for name in dict.fromkeys(name for view in views for name in view):
        values = [view.get(name) for view in views]
        if len(set(values)) > 1:
            by_rank = "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            raise DisagreementError(f"the ranks of the group disagree on {name} ({by_rank})")
    return result


def _described(error: Exception) -> tuple[str, str]:
    """An error as text that another rank can raise again; one that is not ours is told with its type."""
    kind = type(error).__name__
    return (kind, str(error)) if isinstance(error, RingAttnError) else (RingAttnError.__name__, f"{kind}: {error}")


def _error_class(name: str) -> type[RingAttnError]:
    found = getattr(errors, name, None)
    return found if isinstance(found, type) and issubclass(found, RingAttnError) else RingAttnError
