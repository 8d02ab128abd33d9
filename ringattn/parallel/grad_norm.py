"""The norm of all gradients, whoever has them; for clipping, and for logs."""

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
    """The Euclidean norm of the gradients of the whole model, as one process would find it.

    All ranks of the mesh call it together, each with the parameters that it has a part of. Each number counts once,
    however many ranks have it.

    Args:
        parameters: of this rank's stage or stages, as `parallelize` left them.
        mesh: from `build_mesh`.
    Returns:
        () float64, whatever the gradients are, since a rank may have none; the same on all ranks.
    Communication: an all-reduce of one number over each axis.
    """
    total = torch.zeros((), dtype=torch.float64, device=mesh.device_type)
    for parameter in parameters:
        if (grad := parameter.grad) is not None:
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            dtype = torch.promote_types(local.dtype, torch.float32)
            total = total + torch.linalg.vector_norm(local, dtype=dtype) ** 2 / _copies(parameter, mesh)
    for group in mesh.get_all_groups():
        if group.size() > 1:
            dist.all_reduce(total, group=group)
    return total.sqrt()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], mesh: DeviceMesh, max_norm: float) -> Tensor:
    """Scales the gradients so that their norm, over all ranks, is at most max_norm; returns what it was.

    Args, communication: as for `gradient_norm`.
    """
    owned = list(parameters)
    norm = gradient_norm(owned, mesh)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in owned:
        if (grad := parameter.grad) is not None:
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            local.mul_(factor.to(local.dtype))
    return norm


def _copies(parameter: nn.Parameter, mesh: DeviceMesh) -> int:
    """How many ranks have this part of a parameter: all of its stage, over those that it is sharded on."""
    ranks = mesh.size() // axis_size(mesh, "pp")
    if not isinstance(parameter, DTensor):
        return ranks
    spread = prod(
        size
        for size, placement in zip(parameter.device_mesh.shape, parameter.placements)
        if not placement.is_replicate()
    )
    return ranks // spread
