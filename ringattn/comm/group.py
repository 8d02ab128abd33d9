"""Which ranks are meant, by a group or a mesh; and making them agree before anything is sent.

A rank that raised alone would leave the others waiting, and ranks that mean different things would exchange
garbage. So the first call of every signature compares notes: each rank tells what it asks for, or what it found wrong,
and all of them go on, or all of them raise the same error. Later calls of that signature cost a dictionary look-up.
"""

from __future__ import annotations

from ast import literal_eval
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from ringattn import errors
from ringattn.errors import ArgumentError, ArgumentTypeError, DisagreementError, RingAttnError

Result = TypeVar("Result")

# What the ranks of a team have agreed on, by its first group. Every rank makes the same calls, so all forget the same
# ones.
_AGREEMENTS: WeakKeyDictionary[dist.ProcessGroup, OrderedDict[Hashable, Any]] = WeakKeyDictionary()
_MAX_AGREEMENTS = 256


@dataclass(frozen=True)
class MeshAxis:
    """One group of a team, and the rank in it of each place along the axis."""

    group: dist.ProcessGroup
    members: tuple[int, ...]
    place: int  # this rank's own


@dataclass(frozen=True)
class RankMesh:
    """The ranks that make a call together: those of one group, or of a mesh whose axes are groups, the slow one first.

    Ranks are numbered by their places, the last axis counting fastest.
    """

    axes: tuple[MeshAxis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """How many ranks there are along each axis."""
        return tuple(len(axis.members) for axis in self.axes)

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return prod(self.shape)

    @property
    def rank(self) -> int:
        """The number of this rank."""
        number = 0
        for axis in self.axes:
            number = number * len(axis.members) + axis.place
        return number

    def along(self, axis: int) -> RankMesh:
        """Returns the ranks that differ from this one along one axis only."""
        return RankMesh((self.axes[axis],))

    def route(self, peer: int) -> tuple[int, int]:
        """Returns which axis leads to another rank, and its rank in that axis' group.

        Raises:
            ValueError: when it lies on none of this rank's axes.
        """
        here, there = self._places(self.rank), self._places(peer)
        differing = [axis for axis, places in enumerate(zip(here, there, strict=True)) if len(set(places)) > 1]
        if len(differing) != 1:
            raise ValueError(f"rank {peer} lies on no axis of rank {self.rank} in a mesh of {self.shape}")
        (axis,) = differing
        return axis, self.axes[axis].members[there[axis]]

    def _places(self, rank: int) -> list[int]:
        places = []
        for length in reversed(self.shape):
            rank, place = divmod(rank, length)
            places.append(place)
        return places[::-1]


def mesh_name(team: RankMesh) -> str:
    """Returns a text from which `mesh_from_name` finds the team again, in this process."""
    return repr(tuple((axis.group.group_name, axis.members, axis.place) for axis in team.axes))


def mesh_from_name(text: str) -> RankMesh:
    """Returns the team whose text this is.

    Raises:
        ArgumentError: when its groups are no longer there.
    """
    return RankMesh(tuple(_axis_named(*axis) for axis in _axes_named(text)))


@lru_cache(maxsize=64)
def _axes_named(text: str) -> tuple[tuple[str, tuple[int, ...], int], ...]:
    found: tuple[tuple[str, tuple[int, ...], int], ...] = literal_eval(text)
    return found


def _axis_named(name: str, members: tuple[int, ...], place: int) -> MeshAxis:
    try:
        group = _resolve_process_group(name)  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as gone:
        raise ArgumentError(
            f"the group {name!r} that this was compiled for is no longer there; compile again"
        ) from gone
    if (group.size(), group.rank()) != (len(members), members[place]):
        raise ArgumentError(
            f"the group {name!r} that this was compiled for had {len(members)} ranks, this one being rank "
            f"{members[place]}, and now is another; compile again"
        )
    return MeshAxis(group, members, place)


def rank_mesh(group: object, axes: tuple[str, ...] = ()) -> RankMesh:
    """Returns the ranks that a caller means.

    Args:
        group: a ProcessGroup, a DeviceMesh of one or two dims, or None for the default group.
        axes: what the dims of a two-dimensional mesh must be called, slow to fast; () lets them have any name.
    Raises:
        ArgumentTypeError: when it is something else.
        ArgumentError: when there is no such group, this process is not in it, or the mesh has other axes.
    """
    if not isinstance(group, DeviceMesh) or group.ndim != 2:
        found = resolve_group(group)
        return RankMesh((MeshAxis(found, tuple(range(found.size())), found.rank()),))
    if axes and group.mesh_dim_names != axes:
        raise ArgumentError(
            f"group={group!r}: a mesh of two dims must have the axes {axes}, in this order, not "
            f"{group.mesh_dim_names}; or pass one of them, such as mesh['{axes[0]}']"
        )
    coordinate = group.get_coordinate()
    if coordinate is None:
        raise ArgumentError(f"group={group!r}: this process is not a member of the mesh")
    found_axes = []
    for dim in range(2):
        along = group.mesh.select(1 - dim, coordinate[1 - dim]).tolist()
        axis_group = group.get_group(dim)
        members = tuple(dist.get_group_rank(axis_group, rank) for rank in along)
        found_axes.append(MeshAxis(axis_group, members, coordinate[dim]))
    return RankMesh(tuple(found_axes))


def resolve_group(group: object) -> dist.ProcessGroup:
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


def agree(team: RankMesh, key: Hashable, prepare: Callable[[], tuple[Mapping[str, str], Result]]) -> Result:
    """Returns what `prepare` makes, once every rank of the team has made the same of it.

    Args:
        team: all its ranks call this together when the key is new to them.
        key: the signature of the call, as this rank sees it; None is never remembered.
        prepare: checks the arguments and returns what all ranks must have in common (name: value, as text), and
            the result, which may differ from rank to rank.
    Raises:
        RingAttnError: what `prepare` raised on the first rank where it did, on every rank.
        DisagreementError: when the ranks' texts differ, on every rank.
    Communication: one all-gather of a few hundred bytes for each axis on the first call of a signature; nothing
        afterwards, and nothing for a team of one rank.
    """
    memory, key = _memory(team, key)
    if key is not None and key in memory:
        memory.move_to_end(key)
        found: Result = memory[key]
        return found
    if team.size == 1:
        _, result = prepare()
    else:
        result = _compare(team, prepare)
    if key is not None:
        memory[key] = result
        if len(memory) > _MAX_AGREEMENTS:
            memory.popitem(last=False)
    return result


def recall(team: RankMesh, key: Hashable, prepare: Callable[[], tuple[Mapping[str, str], Result]]) -> Result:
    """Returns what the ranks have agreed on before: nothing is compared, sent or remembered.

    So it does not matter that some ranks ask again and others do not, or that it has been forgotten meanwhile.
    """
    memory, key = _memory(team, key)
    if key is not None and key in memory:
        found: Result = memory[key]
        return found
    return prepare()[1]


def _memory(team: RankMesh, key: Hashable) -> tuple[OrderedDict[Hashable, Any], Hashable]:
    """Returns what the ranks of a team have agreed on, and what a key is called there."""
    first, *others = (axis.group for axis in team.axes)
    memory = _AGREEMENTS.get(first)
    if memory is None:
        memory = _AGREEMENTS[first] = OrderedDict()
    return memory, None if key is None else (*others, key)


def _compare(team: RankMesh, prepare: Callable[[], tuple[Mapping[str, str], Result]]) -> Result:
    told: Mapping[str, str] = {}
    error: Exception | None = None
    try:
        told, result = prepare()
    except Exception as problem:  # whatever it is, the other ranks must not be left waiting
        error = problem
    note = (dict(told), None if error is None else _describe(error))
    numbered = [(team.rank, note)]
    for axis in reversed(team.axes):
        heard: list[Any] = [None] * len(axis.members)
        dist.all_gather_object(heard, numbered, group=axis.group)
        numbered = [entry for entries in heard for entry in entries]
    notes = [note for _, note in sorted(numbered, key=lambda entry: entry[0])]
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


def _describe(error: Exception) -> tuple[str, str]:
    """An error as text that another rank can raise again; one that is not ours is told with its type."""
    kind = type(error).__name__
    return (kind, str(error)) if isinstance(error, RingAttnError) else (RingAttnError.__name__, f"{kind}: {error}")


def _error_class(name: str) -> type[RingAttnError]:
    found = getattr(errors, name, None)
    return found if isinstance(found, type) and issubclass(found, RingAttnError) else RingAttnError
