"""Bytes that a rank sends in a training step, by axis: counted where torch hands them to a process group.

Counted is what leaves a rank if collectives go round a ring, as they do for large tensors, n ranks being in the group:

    message           its bytes
    all-gather        (n - 1) x what this rank gives
    reduce-scatter    (n - 1) / n x what this rank gives
    all-reduce        2 (n - 1) / n x the tensor
    all-to-all        what goes to others
    broadcast         (n - 1) / n x the tensor
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ringattn.parallel import axis_mesh, expert_fsdp_mesh, expert_mesh, fsdp_mesh, loss_mesh
from ringattn.parallel.mesh import AXES

MESSAGE, GATHER, SCATTER, REDUCE, TRADE, BROADCAST = (
    "message",
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "broadcast",
)
OPERATIONS: Mapping[str, str] = {
    "send": MESSAGE,
    "_allgather_base_": GATHER,
    "allgather_": GATHER,
    "all_gather_into_tensor": GATHER,
    "all_gather_into_tensor_out": GATHER,
    "_reduce_scatter_base_": SCATTER,
    "reduce_scatter_tensor": SCATTER,
    "allreduce_": REDUCE,
    "all_reduce": REDUCE,
    "all_reduce_": REDUCE,
    "alltoall_base_": TRADE,
    "all_to_all_single": TRADE,
    "broadcast_": BROADCAST,
    "broadcast": BROADCAST,
}
SILENT = ("recv_", "barrier", "wait_tensor", "_wrap_tensor_autograd")
# A group may serve several axes: that of "ring" is that of "fsdp", too, where there is no other axis to share weights
# out on. What is done there tells them apart: attention and stages send messages, and only experts trade.
SERVES: Mapping[str, tuple[str, ...]] = {MESSAGE: ("pp", "ring", "ulysses"), TRADE: ("ep",)}
OTHERS = ("tp", "fsdp", "efsdp", "dp_replicate", "loss", "pp")


def send_factor(operation: str, size: int) -> float:
    """Returns how many bytes leave a rank for each byte that it gives; what stays at home in an all-to-all apart."""
    others = (size - 1) / size
    return {GATHER: size - 1.0, SCATTER: others, REDUCE: 2 * others, BROADCAST: others}.get(operation, 1.0)


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, what this rank sends is added up in `sent`: bytes by axis and operation."""

    def __init__(self, mesh: DeviceMesh) -> None:
        """Makes it for the groups of a mesh from `build_mesh`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._axes: dict[tuple[int, ...], list[str]] = defaultdict(list)
        meshes = {axis.name: axis_mesh(mesh, axis.name) for axis in AXES}
        meshes |= {"fsdp": fsdp_mesh(mesh), "loss": loss_mesh(mesh)}
        meshes |= {"ep": expert_mesh(mesh), "efsdp": expert_fsdp_mesh(mesh)}
        for name, along in meshes.items():
            if along is not None:
                self._axes[_ranks_of(along.get_group())].append(name)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Counts an operation, and does it."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor first: what it comes down to is counted
        namespace, name = func.name().split("::")
        name = name.split(".")[0]
        if namespace in ("c10d", "_c10d_functional") and name not in SILENT:
            self._count(name, {x.name: value for x, value in zip(func._schema.arguments, args, strict=False)})
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, given: Mapping[str, Any]) -> None:
        if name not in OPERATIONS:
            raise NotImplementedError(f"{name}: not known how many bytes it sends")
        operation, group = OPERATIONS[name], _group_of(given)
        axes = self._axes.get(_ranks_of(group), ["other"])
        axis = next((axis for axis in SERVES.get(operation, OTHERS) if axis in axes), axes[0])
        tensors = _inputs(given)
        num_bytes = sum(x.nbytes for x in tensors)
        if operation == TRADE:
            num_bytes -= _kept(tensors[0], given, group)
        self.sent[axis][operation] += round(num_bytes * send_factor(operation, group.size()))


def _ranks_of(group: dist.ProcessGroup) -> tuple[int, ...]:
    """What a group is known by: torch may take one of the same ranks, made for an earlier mesh."""
    return tuple(dist.get_process_group_ranks(group))


def _group_of(given: Mapping[str, Any]) -> dist.ProcessGroup:
    if "process_group" in given:
        return dist.ProcessGroup.unbox(given["process_group"])
    named: Any = given["group_name"]
    return named if isinstance(named, dist.ProcessGroup) else _resolve_process_group(named)


def _inputs(given: Mapping[str, Any]) -> list[Tensor]:
    """What this rank gives."""
    names = ("input_tensors", "input_tensor", "input", "tensors")
    found: Tensor | list[Tensor] = next(given[name] for name in names if name in given)
    return [found] if isinstance(found, Tensor) else found


def _kept(rows: Tensor, given: Mapping[str, Any], group: dist.ProcessGroup) -> int:
    """Bytes of an all-to-all that a rank gives to itself."""
    splits = given["input_split_sizes"]
    part = splits[group.rank()] if splits else rows.shape[0] // group.size()
    return int(part * rows[0].nbytes) if rows.shape[0] else 0
