"""One mesh for every axis of parallelism: who is whose neighbour, and which ranks share what.

    pp > dp_replicate > dp_shard > ring > ulysses > tp          slow, far apart > fast, close together

Ranks are numbered row by row, the last axis counting fastest. So the axes that talk most, in every layer, lie within a
machine, and those that talk once a step lie across machines. Axes of one rank are left out of the mesh, and have no
group; but for "ring" where "ulysses" is left out as well, since attention needs ranks to run on, be it one.

Three more meshes are made of these axes, and borrow their ranks:

    fsdp   dp_shard x ring x ulysses as one axis: ranks that see other tokens, and share out one copy of the weights
    loss   dp_replicate x fsdp as one axis: all ranks that see other tokens
    ep     fsdp, cut again into efsdp x ep: neighbouring ranks, each with other experts
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ringattn.comm.agreement import agree
from ringattn.comm.topology import rank_mesh
from ringattn.errors import ArgumentError, check_integer


@dataclass(frozen=True)
class AxisSpec:
    """What an axis of the mesh means."""

    name: str
    splits: str
    communicates: str


AXES = (
    AxisSpec("pp", "layers", "activations and their gradients, from stage to stage"),
    AxisSpec("dp_replicate", "sequences of the batch", "gradients: one all-reduce a step"),
    AxisSpec(
        "dp_shard", "sequences, weights, optimizer state", "weights: all-gather a layer; gradients: reduce-scatter"
    ),
    AxisSpec("ring", "tokens of a sequence", "keys and values, round a ring in every layer"),
    AxisSpec("ulysses", "tokens of a sequence", "heads against tokens, all-to-all in every layer"),
    AxisSpec(
        "tp", "heads and columns of weights, the vocabulary", "activations: all-gather, reduce-scatter in every layer"
    ),
)
EXPERT = AxisSpec("ep", "experts (borrows dp_shard x ring x ulysses)", "tokens to their experts and back, all-to-all")

CONTEXT = ("ring", "ulysses")
SHARDED = ("dp_shard", *CONTEXT)
TOKENS = ("dp_replicate", *SHARDED)


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
    """A mesh over all ranks, with an axis for each size above one.

    All ranks of the default group call it together. Sizes are checked, and compared between ranks, before any group is
    made. There is an axis "ring" or "ulysses" in any case, of one rank if both are 1: what attention runs on.

    Args:
        pp: stages of layers.
        dp_replicate: copies of everything, each of which sees other sequences.
        dp_shard: ranks that see other sequences, and share out one copy of the weights.
        ring: ranks among which the keys and values of a sequence go round.
        ulysses: ranks among which the heads of a sequence are dealt.
        tp: ranks that split each weight.
        ep: ranks among which experts are dealt; a divisor of dp_shard x ring x ulysses, whose ranks they are.
        device_type: "cpu" or "cuda"; None is the one that the default group's backend serves.
    Returns:
        a DeviceMesh, whose axes are those of `AXES` that are longer than one, and "ring" or "ulysses", in that order.
    Raises:
        ArgumentError: when a size is no positive integer, the sizes do not multiply to the number of ranks, or ep does
            not divide the ranks it borrows.
        DisagreementError: when the ranks ask for different sizes.
    Communication: one all-gather of a few hundred bytes, and what making the groups costs.
    """
    team = rank_mesh(None)
    sizes = {
        "pp": pp,
        "dp_replicate": dp_replicate,
        "dp_shard": dp_shard,
        "ring": ring,
        "ulysses": ulysses,
        "tp": tp,
    }

    def prepare() -> tuple[Mapping[str, str], str]:
        _check(sizes, ep, team.size)
        found = _device_type() if device_type is None else device_type
        return {"the sizes of the axes": str({**sizes, "ep": ep}), "device_type": found}, found

    device = agree(team, None, prepare)
    kept = {name: size for name, size in sizes.items() if size > 1 or (name == "ring" and ulysses == 1)}
    mesh = init_device_mesh(device, tuple(kept.values()), mesh_dim_names=tuple(kept))
    # Every rank makes the same groups in the same order: so all of them here, none on first use.
    sharded, _ = _flat(mesh, SHARDED, "fsdp"), _flat(mesh, TOKENS, "loss")
    if ep > 1:
        assert sharded is not None
        _borrow(mesh, sharded, ep)
    return mesh


def axis_size(mesh: DeviceMesh, name: str) -> int:
    """Returns how many ranks there are along an axis; 1 if the mesh does not have it.

    Args:
        mesh: from `build_mesh`, or any with axes of these names.
        name: one of `AXES`, or "ep".
    """
    if name == EXPERT.name:
        experts = expert_mesh(mesh)
        return 1 if experts is None else experts.size()
    names = mesh.mesh_dim_names or ()
    return mesh.size(names.index(name)) if name in names else 1


def axis_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh | None:
    """Returns the mesh of one axis; None where it is not longer than one."""
    return mesh[name] if axis_size(mesh, name) > 1 else None


def context_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Returns the ranks that hold one sequence: ("ring", "ulysses"), or one of the two.

    Raises:
        ArgumentError: when the mesh has neither.
    """
    names = mesh.mesh_dim_names or ()
    axes = _longer(mesh, CONTEXT) or tuple(name for name in CONTEXT if name in names)[:1]
    if not axes:
        raise ArgumentError(f"mesh={mesh}: must have an axis 'ring' or 'ulysses', be it of one rank")
    return mesh[axes]


def fsdp_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """Returns the ranks that share out one copy of the weights, dp_shard x ring x ulysses, as one axis; or None."""
    return _flat(mesh, SHARDED, "fsdp")


def loss_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """Returns the ranks that see other tokens, dp_replicate x dp_shard x ring x ulysses, as one axis; or None."""
    return _flat(mesh, TOKENS, "loss")


def expert_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """Returns the ranks among which experts are dealt, as one axis "ep"; None where there are none."""
    return _borrowed(mesh, "ep")


def expert_fsdp_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """Returns the ranks of "fsdp" that have the same experts as this one, as one axis "efsdp"; or None."""
    return _borrowed(mesh, "efsdp")


def data_parallel_rank(mesh: DeviceMesh) -> tuple[int, int]:
    """Returns which share of each batch this rank reads, and how many shares there are.

    Ranks along the other axes read the same sequences.
    """
    place, count = 0, 1
    for name in ("dp_replicate", "dp_shard"):
        if (along := axis_mesh(mesh, name)) is not None:
            place, count = place * along.size() + along.get_local_rank(), count * along.size()
    return place, count


def describe(mesh: DeviceMesh) -> str:
    """Returns a table of the axes: size, what each splits, and what it communicates.

    Args:
        mesh: from `build_mesh`.
    """
    sizes = {axis: axis_size(mesh, axis.name) for axis in (*AXES, EXPERT)}
    rows = [("axis", "ranks", "splits", "communicates")]
    rows += [(axis.name, str(size), axis.splits, axis.communicates) for axis, size in sizes.items() if size > 1]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _check(sizes: Mapping[str, int], ep: int, world_size: int) -> None:
    for name, size in {**sizes, "ep": ep}.items():
        check_integer(name, size, 1)
    if (product := prod(sizes.values())) != world_size:
        told = " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "no axis"
        raise ArgumentError(
            f"{told} is {product} ranks, but {world_size} were started: the sizes must multiply to the number of ranks"
        )
    if (lent := prod(sizes[name] for name in SHARDED)) % ep:
        told = " x ".join(f"{name}={sizes[name]}" for name in SHARDED)
        raise ArgumentError(f"ep={ep}: must divide the ranks that it borrows, {told} = {lent}")


def _device_type() -> str:
    return "cuda" if torch.cuda.is_available() and "nccl" in dist.get_backend_config() else "cpu"


def _longer(mesh: DeviceMesh, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if axis_size(mesh, name) > 1)


def _flat(mesh: DeviceMesh, names: tuple[str, ...], flat_name: str) -> DeviceMesh | None:
    """These axes as one. The mesh keeps it, so that asking again gives the same group."""
    axes = _longer(mesh, names)
    if not axes:
        return None
    if len(axes) == 1:
        return mesh[axes[0]]
    if axes == _longer(mesh, SHARDED):
        flat_name = "fsdp"
    return mesh[axes]._flatten(flat_name)


def _borrow(mesh: DeviceMesh, sharded: DeviceMesh, ep: int) -> None:
    """Cuts the axis "fsdp" again, into efsdp x ep, and has the mesh keep both."""
    replicas = sharded.size() // ep
    if replicas == 1:
        sharded._flatten("ep")
        return
    cut = sharded._unflatten(0, (replicas, ep), ("efsdp", "ep"))
    # torch keeps the meshes made by _flatten in this table, but those made by _unflatten nowhere.
    mesh._flatten_mapping.update(efsdp=cut["efsdp"], ep=cut["ep"])


def _borrowed(mesh: DeviceMesh, name: str) -> DeviceMesh | None:
    return mesh._get_root_mesh()._flatten_mapping.get(name)
