"""Which ranks take part in a call: the ranks of one process group, or of a mesh with one process group per axis."""

from __future__ import annotations

import os
from ast import literal_eval
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from ringattn.errors import ArgumentError, ArgumentTypeError

# What `mesh_name` calls the group of one process without torch.distributed.
_SINGLE_RANK = "this process alone"


@dataclass(frozen=True)
class MeshAxis:
    """One axis of a mesh, as this rank sees it.

    Args:
        group: the process group of the ranks along the axis.
        ranks: the rank in `group` at each coordinate of the axis.
        coordinate: this rank's coordinate on the axis: `ranks[coordinate] == group.rank()`.
    """

    group: dist.ProcessGroup
    ranks: tuple[int, ...]
    coordinate: int


@dataclass(frozen=True)
class RankMesh:
    """The ranks that make a call together, as a mesh of one or more axes.

    Ranks are numbered row by row: the last axis counts fastest. A process group is a mesh of one axis.

    Args:
        axes: slow to fast.
    """

    axes: tuple[MeshAxis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of ranks along each axis."""
        return tuple(len(axis.ranks) for axis in self.axes)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return prod(self.shape)

    @property
    def rank(self) -> int:
        """The number of this rank in the mesh."""
        number = 0
        for axis in self.axes:
            number = number * len(axis.ranks) + axis.coordinate
        return number

    def route(self, peer: int) -> tuple[int, int]:
        """Returns the axis that connects this rank to `peer`, and the rank of `peer` in the process group of that axis.

        Raises:
            ValueError: if `peer` differs from this rank along no axis, or along several.
        """
        own, other = self._coordinates(self.rank), self._coordinates(peer)
        differing = [axis for axis, pair in enumerate(zip(own, other, strict=True)) if len(set(pair)) > 1]
        if len(differing) != 1:
            raise ValueError(f"rank {peer} lies on no axis of rank {self.rank} in a mesh of {self.shape}")
        (axis,) = differing
        return axis, self.axes[axis].ranks[other[axis]]

    def _coordinates(self, rank: int) -> list[int]:
        coordinates = []
        for length in reversed(self.shape):
            rank, coordinate = divmod(rank, length)
            coordinates.append(coordinate)
        return coordinates[::-1]


def mesh_name(mesh: RankMesh) -> str:
    """Returns a text from which `mesh_from_name` rebuilds the mesh in this process."""
    return repr(tuple((_group_name(axis.group), axis.ranks, axis.coordinate) for axis in mesh.axes))


def _group_name(group: dist.ProcessGroup) -> str:
    return _SINGLE_RANK if group is _single_rank_group() else group.group_name


def mesh_from_name(name: str) -> RankMesh:
    """Returns the mesh that `mesh_name` described.

    Raises:
        ArgumentError: if one of its process groups no longer exists or has other ranks.
    """
    return RankMesh(tuple(_axis_from_name(*axis) for axis in _parse_axes(name)))


@lru_cache(maxsize=64)
def _parse_axes(name: str) -> tuple[tuple[str, tuple[int, ...], int], ...]:
    axes: tuple[tuple[str, tuple[int, ...], int], ...] = literal_eval(name)
    return axes


def _axis_from_name(group_name: str, ranks: tuple[int, ...], coordinate: int) -> MeshAxis:
    try:
        alone = group_name == _SINGLE_RANK
        group = resolve_group(None) if alone else _resolve_process_group(group_name)  # type: ignore[arg-type]
    except ArgumentError:
        raise
    except (RuntimeError, ValueError) as error:
        raise ArgumentError(
            f"the group {group_name!r} that this was compiled for is no longer there; compile again"
        ) from error
    if (group.size(), group.rank()) != (len(ranks), ranks[coordinate]):
        raise ArgumentError(
            f"the group {group_name!r} that this was compiled for had {len(ranks)} ranks, with this process as rank "
            f"{ranks[coordinate]}; it now has {group.size()}, with this process as rank {group.rank()}; compile again"
        )
    return MeshAxis(group, ranks, coordinate)


def rank_mesh(group: object, axes: tuple[str, ...] = ()) -> RankMesh:
    """Returns the mesh for the `group` argument of a public function.

    Args:
        group: a ProcessGroup, a DeviceMesh of one or two dims, or None for the default group; without
            torch.distributed initialised, None is this process alone.
        axes: the required names of the dims of a two-dimensional mesh, slow to fast; () accepts any names.
    Raises:
        ArgumentTypeError: if `group` has another type.
        ArgumentError: if the group does not exist, this process is not in it, or the mesh has other axes.
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
    mesh_axes = []
    for dim in range(2):
        global_ranks = group.mesh.select(1 - dim, coordinate[1 - dim]).tolist()
        axis_group = group.get_group(dim)
        group_ranks = tuple(dist.get_group_rank(axis_group, rank) for rank in global_ranks)
        mesh_axes.append(MeshAxis(axis_group, group_ranks, coordinate[dim]))
    return RankMesh(tuple(mesh_axes))


def resolve_group(group: object) -> dist.ProcessGroup:
    """Returns the process group for the `group` argument of a public function.

    Args:
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the default group; without torch.distributed
            initialised, None is a group of this process alone.
    Raises:
        ArgumentTypeError: if `group` has another type.
        ArgumentError: if the group does not exist, or this process is not in it; or if the environment says that more
            processes than this one were started, and torch.distributed is not initialised.
    """
    if not dist.is_initialized():
        # Without init_process_group, a program started on several ranks would compute a part of the result on each.
        one_process = group is None and os.environ.get("WORLD_SIZE", "1") == "1"
        if not one_process and group is not _single_rank_group():
            check_initialized(f"group={group!r}")
        return _single_rank_group()
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


@lru_cache(maxsize=1)
def _single_rank_group() -> dist.ProcessGroup:
    """Returns a group of this process alone. It has no backend and no name, and torch.distributed does not know it."""
    return dist.ProcessGroup(dist.HashStore(), 0, 1)  # type: ignore[attr-defined]


def check_initialized(what: str) -> None:
    """Raises ArgumentError if torch.distributed is not initialised; the message begins with `what`."""
    if not dist.is_initialized():
        started = os.environ.get("WORLD_SIZE")
        raise ArgumentError(
            f"{what}: torch.distributed is not initialised{f', and WORLD_SIZE is {started}' if started else ''}; start "
            "the program with torchrun and call torch.distributed.init_process_group() first"
        )
