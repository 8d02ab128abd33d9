"""One device mesh with an axis for each kind of parallelism, and the process groups derived from it.

    pp > dp_replicate > dp_shard > ring > ulysses > tp          slowest links, outermost > fastest links, innermost

Ranks are numbered in row-major order: the last axis varies fastest. Axes that communicate in every layer (tp, ulysses)
therefore stay within a machine, and axes that communicate once per step (pp, dp_replicate) cross machines. The mesh
omits axes of size 1, except that it always has "ring" or "ulysses", because attention needs a group to run on.

Three more groups are derived from these axes and reuse their ranks:

    fsdp   dp_shard x ring x ulysses, flattened: ranks with different tokens that shard one copy of the weights
    loss   dp_replicate x fsdp, flattened: all ranks with different tokens
    ep     fsdp reshaped to efsdp x ep: ep ranks are neighbours and hold different experts
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ringattn.comm.agreement import agree
from ringattn.comm.topology import check_initialized, rank_mesh
from ringattn.errors import ArgumentError, check_integer


@dataclass(frozen=True)
class AxisSpec:
    """What a mesh axis splits, and what its ranks communicate."""

    name: str
    splits: str
    communicates: str


AXES = (
    AxisSpec("pp", "layers", "activations and their gradients, from stage to stage"),
    AxisSpec("dp_replicate", "sequences of the batch", "gradients: one all-reduce per step"),
    AxisSpec(
        "dp_shard", "sequences, weights, optimizer state", "weights: all-gather per layer; gradients: reduce-scatter"
    ),
    AxisSpec("ring", "tokens of a sequence", "keys and values, around a ring in every layer"),
    AxisSpec("ulysses", "tokens of a sequence", "tokens for heads, all-to-all in every layer"),
    AxisSpec(
        "tp", "heads, weight columns, the vocabulary", "activations: all-gather and reduce-scatter in every layer"
    ),
)
EXPERT_AXIS = AxisSpec("ep", "experts (on the ranks of dp_shard x ring x ulysses)", "tokens, all-to-all and back")

CONTEXT_AXES = ("ring", "ulysses")
FSDP_AXES = ("dp_shard", *CONTEXT_AXES)
LOSS_AXES = ("dp_replicate", *FSDP_AXES)


def build_mesh(
    *,
    pp: int = 1,
    dp_replicate: int = 1,
    dp_shard: int = 1,
    ring: int = 1,
    ulysses: int = 1,
    tp: int = 1,
    ep: int = 1,
    device_type: str | None = None,
) -> DeviceMesh:
    """Builds a mesh over all ranks, with one axis for each size above 1.

    Collective over the default group. Sizes are checked, and compared between ranks, before any group is created. The
    mesh always has an axis "ring" or "ulysses", of size 1 if both sizes are 1, because attention needs a group.

    Args:
        pp: pipeline stages: ranks with different layers.
        dp_replicate: replicas of all weights; each sees different sequences.
        dp_shard: ranks that see different sequences and shard one copy of the weights.
        ring: ranks that pass the keys and values of a sequence around a ring.
        ulysses: ranks that exchange tokens for heads within a sequence.
        tp: ranks that split each weight matrix.
        ep: ranks that hold different experts; a divisor of dp_shard x ring x ulysses, whose ranks it reuses.
        device_type: "cpu" or "cuda"; None takes the one that the default group's backend serves.
    Returns:
        A DeviceMesh with the axes of `AXES` larger than 1, and "ring" or "ulysses", in the order of `AXES`.
    Raises:
        ArgumentError: when torch.distributed is not initialised, a size is not a positive integer, the product of the
            sizes is not the number of ranks, or ep does not divide dp_shard x ring x ulysses.
        DisagreementError: when ranks pass different sizes.
    Communication: one all-gather of a few hundred bytes, and the creation of the groups.
    """
    check_initialized("build_mesh")
    world = rank_mesh(None)
    sizes = {
        "pp": pp,
        "dp_replicate": dp_replicate,
        "dp_shard": dp_shard,
        "ring": ring,
        "ulysses": ulysses,
        "tp": tp,
    }

    def prepare() -> tuple[Mapping[str, str], str]:
        _check_sizes(sizes, ep, world.size)
        device = _default_device_type() if device_type is None else device_type
        return {"the sizes of the axes": str({**sizes, "ep": ep}), "device_type": device}, device

    device = agree(world, None, prepare)
    axes = {name: size for name, size in sizes.items() if size > 1 or (name == "ring" and ulysses == 1)}
    mesh = init_device_mesh(device, tuple(axes.values()), mesh_dim_names=tuple(axes))
    # All ranks must create the same groups in the same order: create all of them here, and none on first use.
    fsdp, _ = _flattened(mesh, FSDP_AXES, "fsdp"), _flattened(mesh, LOSS_AXES, "loss")
    if ep > 1:
        assert fsdp is not None
        _create_expert_meshes(mesh, fsdp, ep)
    return mesh


def axis_size(mesh: DeviceMesh, name: str) -> int:
    """Returns the size of an axis; 1 if the mesh does not have it.

    Args:
        mesh: from `build_mesh`, or any mesh with axes of these names.
        name: the name of an axis in `AXES`, or "ep".
    """
    if name == EXPERT_AXIS.name:
        experts = expert_mesh(mesh)
        return 1 if experts is None else experts.size()
    names = mesh.mesh_dim_names or ()
    return mesh.size(names.index(name)) if name in names else 1


def axis_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh | None:
    """Returns the one-dimensional submesh of an axis; None if its size is 1.

    Args:
        mesh: from `build_mesh`.
        name: the name of an axis in `AXES`.
    """
    return mesh[name] if axis_size(mesh, name) > 1 else None


def context_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Returns the submesh over which a sequence is sharded: ("ring", "ulysses"), or one of the two.

    Args:
        mesh: from `build_mesh`, or any mesh with one of these axes.
    Raises:
        ArgumentError: when the mesh has neither axis.
    """
    names = mesh.mesh_dim_names or ()
    axes = _axes_above_one(mesh, CONTEXT_AXES) or tuple(name for name in CONTEXT_AXES if name in names)[:1]
    if not axes:
        raise ArgumentError(f"mesh={mesh}: must have an axis 'ring' or 'ulysses', even if its size is 1")
    return mesh[axes]


def fsdp_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """Returns dp_shard x ring x ulysses, flattened: the ranks that shard one copy of the weights. None if one.

    Args:
        mesh: from `build_mesh`.
    """
    return _flattened(mesh, FSDP_AXES, "fsdp")


def loss_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """Returns dp_replicate x dp_shard x ring x ulysses, flattened: the ranks with different tokens. None if one.

    Args:
        mesh: from `build_mesh`.
    """
    return _flattened(mesh, LOSS_AXES, "loss")


def expert_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """Returns the axis "ep": the ranks that hold different experts; None if ep is 1.

    Args:
        mesh: from `build_mesh`.
    """
    return _derived_mesh(mesh, "ep")


def expert_fsdp_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """Returns the axis "efsdp": the ranks of "fsdp" that hold the same experts as this rank; None if one rank.

    Args:
        mesh: from `build_mesh`.
    """
    return _derived_mesh(mesh, "efsdp")


def data_parallel_rank(mesh: DeviceMesh) -> tuple[int, int]:
    """Returns this rank's index along dp_replicate x dp_shard, and the size of that product.

    The index selects the sequences that this rank reads. Ranks along the other axes read the same sequences.

    Args:
        mesh: from `build_mesh`.
    """
    rank, size = 0, 1
    for name in ("dp_replicate", "dp_shard"):
        if (axis := axis_mesh(mesh, name)) is not None:
            rank, size = rank * axis.size() + axis.get_local_rank(), size * axis.size()
    return rank, size


def describe_mesh(mesh: DeviceMesh) -> str:
    """Returns a text table of the axes above size 1: name, size, what each splits and communicates.

    Args:
        mesh: from `build_mesh`.
    """
    sizes = {axis: axis_size(mesh, axis.name) for axis in (*AXES, EXPERT_AXIS)}
    rows = [("axis", "ranks", "splits", "communicates")]
    rows += [(axis.name, str(size), axis.splits, axis.communicates) for axis, size in sizes.items() if size > 1]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _check_sizes(sizes: Mapping[str, int], ep: int, world_size: int) -> None:
    for name, size in {**sizes, "ep": ep}.items():
        check_integer(name, size, 1)
    if (product := prod(sizes.values())) != world_size:
        factors = " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "no axis"
        raise ArgumentError(
            f"{factors} is {product} ranks, but {world_size} were started: the product of the sizes must be the number "
            "of ranks"
        )
    if (fsdp_size := prod(sizes[name] for name in FSDP_AXES)) % ep:
        factors = " x ".join(f"{name}={sizes[name]}" for name in FSDP_AXES)
        raise ArgumentError(f"ep={ep}: must divide the number of FSDP ranks, {factors} = {fsdp_size}")


def _default_device_type() -> str:
    return "cuda" if torch.cuda.is_available() and "nccl" in dist.get_backend_config() else "cpu"


def _axes_above_one(mesh: DeviceMesh, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if axis_size(mesh, name) > 1)


def _flattened(mesh: DeviceMesh, names: tuple[str, ...], flat_name: str) -> DeviceMesh | None:
    """Returns these axes as one. The mesh caches it, so later calls return the same group."""
    axes = _axes_above_one(mesh, names)
    if not axes:
        return None
    if len(axes) == 1:
        return mesh[axes[0]]
    if axes == _axes_above_one(mesh, FSDP_AXES):
        flat_name = "fsdp"
    return mesh[axes]._flatten(flat_name)


def _create_expert_meshes(mesh: DeviceMesh, fsdp: DeviceMesh, ep: int) -> None:
    """Reshapes the axis "fsdp" to efsdp x ep, and stores both in the mesh."""
    efsdp_size = fsdp.size() // ep
    if efsdp_size == 1:
        fsdp._flatten("ep")
        return
    unflattened = fsdp._unflatten(0, (efsdp_size, ep), ("efsdp", "ep"))
    # torch stores meshes created by _flatten in this table, and meshes created by _unflatten nowhere.
    mesh._flatten_mapping.update(efsdp=unflattened["efsdp"], ep=unflattened["ep"])


def _derived_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh | None:
    return mesh._get_root_mesh()._flatten_mapping.get(name)
