"""Bytes that a rank sends in a training step, by mesh axis, counted where torch passes them to a process group.

A collective counts as the bytes that leave a rank in a ring of n ranks, as for large tensors:

    message           its bytes
    all-gather        (n - 1) x this rank's input
    reduce-scatter    (n - 1) / n x this rank's input
    all-reduce        2 (n - 1) / n x the tensor
    all-to-all        the parts for other ranks
    broadcast         (n - 1) / n x the tensor
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.internals import Start, replaced_start
from ringattn.comm.messages import Operation, PendingMessage
from ringattn.parallel import axis_mesh, expert_fsdp_mesh, expert_mesh, fsdp_mesh, loss_mesh
from ringattn.parallel.mesh import AXES

OPERATORS: Mapping[str, tuple[str, ...]] = {
    "message": ("send",),
    "all-gather": ("_allgather_base_", "allgather_", "all_gather_into_tensor", "all_gather_into_tensor_out"),
    "reduce-scatter": ("_reduce_scatter_base_", "reduce_scatter_tensor"),
    "all-reduce": ("allreduce_", "all_reduce", "all_reduce_"),
    "all-to-all": ("alltoall_base_", "all_to_all_single"),
    "broadcast": ("broadcast_", "broadcast"),
}
SILENT = ("recv_", "barrier", "wait_tensor", "_wrap_tensor_autograd")
# Several axes may share a group: "ring" and "fsdp" do if no other axis shards the weights. The operation tells them
# apart: attention and stages send messages, and only experts use all-to-all.
AXES_OF: Mapping[str, tuple[str, ...]] = {"message": ("pp", "ring", "ulysses"), "all-to-all": ("ep",)}
OTHER_AXES = ("tp", "fsdp", "efsdp", "dp_replicate", "loss", "pp")


def _sent(operation: str, tensors: list[Tensor], given: Mapping[str, Any], group: dist.ProcessGroup) -> int:
    """Returns the bytes that leave this rank."""
    size, num_bytes = group.size(), sum(x.nbytes for x in tensors)
    if operation == "all-to-all":
        rows, splits = tensors[0], given["input_split_sizes"]
        kept = splits[group.rank()] if splits else rows.shape[0] // size
        return num_bytes - (int(kept * rows[0].nbytes) if rows.shape[0] else 0)
    others = (size - 1) / size
    factors = {"all-gather": size - 1.0, "reduce-scatter": others, "all-reduce": 2 * others, "broadcast": others}
    return round(num_bytes * factors.get(operation, 1.0))


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes that this rank sends within it, in `sent`: by axis and operation.

    Args:
        mesh: from `build_mesh`.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._paused = False
        self.sent: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        # By the ranks of a group, because torch may reuse a group of an earlier mesh.
        self._axes: dict[tuple[int, ...], list[str]] = defaultdict(list)
        meshes = {axis.name: axis_mesh(mesh, axis.name) for axis in AXES}
        meshes |= {"fsdp": fsdp_mesh(mesh), "loss": loss_mesh(mesh)}
        meshes |= {"ep": expert_mesh(mesh), "efsdp": expert_fsdp_mesh(mesh)}
        for name, submesh in meshes.items():
            if submesh is not None:
                self._axes[tuple(dist.get_process_group_ranks(submesh.get_group()))].append(name)

    def __enter__(self) -> Traffic:
        self._messages = replaced_start(self._counting)
        self._messages.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._messages.__exit__(*error)

    def _counting(self, original: Start) -> Start:
        """Counts the messages of attention, which may bypass the dispatcher."""

        def start(group: dist.ProcessGroup, operations: Sequence[Operation]) -> list[PendingMessage]:
            for is_send, message in operations:
                if is_send:
                    self._add("message", [message.tensor], {}, group)
            self._paused = True
            try:
                return original(group, operations)
            finally:
                self._paused = False

        return start

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Counts an operator, and runs it."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor comes first; the operators that it calls are counted
        namespace, name = func.name().split("::")
        name = name.split(".")[0]
        if namespace in ("c10d", "_c10d_functional") and name not in SILENT and not self._paused:
            self._count(name, {x.name: value for x, value in zip(func._schema.arguments, args, strict=False)})
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, given: Mapping[str, Any]) -> None:
        operation = next((operation for operation, names in OPERATORS.items() if name in names), None)
        if operation is None:
            raise NotImplementedError(f"{name}: its bytes are unknown")
        if "process_group" in given:
            group = dist.ProcessGroup.unbox(given["process_group"])
        else:
            named: Any = given["group_name"]
            group = named if isinstance(named, dist.ProcessGroup) else _resolve_process_group(named)
        names = ("input_tensors", "input_tensor", "input", "tensors")
        inputs: Tensor | list[Tensor] = next(given[name] for name in names if name in given)
        tensors = [inputs] if isinstance(inputs, Tensor) else inputs
        self._add(operation, tensors, given, group)

    def _add(self, operation: str, tensors: list[Tensor], given: Mapping[str, Any], group: dist.ProcessGroup) -> None:
        axes = self._axes.get(tuple(dist.get_process_group_ranks(group)), ["other"])
        axis = next((axis for axis in AXES_OF.get(operation, OTHER_AXES) if axis in axes), axes[0])
        self.sent[axis][operation] += _sent(operation, tensors, given, group)
