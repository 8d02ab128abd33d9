"""The global gradient norm over all axes of a mesh, for clipping and logging."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ringattn.parallel.mesh import axis_size


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> Tensor:
    """Returns the Euclidean norm of the gradients of the whole model, equal to the norm on one process.

    Collective over the mesh. Each rank passes the parameters of its own model parts. Each gradient element counts once,
    however many ranks hold it.

    Args:
        parameters: of this rank's model or stages, after `parallelize`.
        mesh: from `build_mesh`.
    Returns:
        () float64 for any gradient dtype, because a rank may have no gradients; the same on all ranks.
    Communication: an all-reduce of one number over each axis.
    """
    total = torch.zeros((), dtype=torch.float64, device=mesh.device_type)
    for parameter in parameters:
        if (grad := parameter.grad) is not None:
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            dtype = torch.promote_types(local.dtype, torch.float32)
            total = total + torch.linalg.vector_norm(local, dtype=dtype) ** 2 / _num_replicas(parameter, mesh)
    for group in mesh.get_all_groups():
        if group.size() > 1:
            dist.all_reduce(total, group=group)
    return total.sqrt()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], mesh: DeviceMesh, max_norm: float) -> Tensor:
    """Scales the gradients in place so that their global norm is at most max_norm.

    Args:
        parameters: as for `gradient_norm`.
        mesh: from `build_mesh`.
        max_norm: the largest norm after clipping.
    Returns:
        The norm before clipping, () float64, the same on all ranks.
    Communication: as `gradient_norm`.
    """
    parameters = list(parameters)
    norm = gradient_norm(parameters, mesh)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if (grad := parameter.grad) is not None:
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            local.mul_(factor.to(local.dtype))
    return norm


def _num_replicas(parameter: nn.Parameter, mesh: DeviceMesh) -> int:
    """Returns how many ranks hold this shard: the ranks of its stage, divided by the ranks it is sharded over."""
    stage_ranks = mesh.size() // axis_size(mesh, "pp")
    if not isinstance(parameter, DTensor):
        return stage_ranks
    num_shards = prod(
        size
        for size, placement in zip(parameter.device_mesh.shape, parameter.placements)
        if not placement.is_replicate()
    )
    return stage_ranks // num_shards
