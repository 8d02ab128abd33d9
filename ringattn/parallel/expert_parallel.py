"""Expert parallelism: the experts of each mixture-of-experts layer sharded over the axis "ep"."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ringattn.errors import ArgumentError
from ringattn.parallel.decoder import DecoderConfig
from ringattn.parallel.mesh import axis_mesh, axis_size, expert_mesh, loss_mesh
from ringattn.parallel.moe import MixtureOfExperts


def check_ep(config: DecoderConfig, mesh: DeviceMesh) -> None:
    """Checks that the experts of a decoder can be sharded over the axis "ep".

    Raises:
        ArgumentError: when there are none, or ep does not divide their number.
    """
    ep = axis_size(mesh, "ep")
    if ep > 1 and config.moe is None:
        raise ArgumentError(f"ep={ep}: the model has no experts to shard; leave ep out")
    if config.moe is not None and config.moe.num_experts % ep:
        raise ArgumentError(f"ep={ep}: must divide num_experts={config.moe.num_experts}")


def apply_ep(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shards the experts of every `MixtureOfExperts` in a model over the axis "ep", in place.

    The expert weights become DTensors over "ep", so checkpoints store them as parts of one tensor. An expert's gradient
    already counts the tokens of all "ep" ranks; what remains is the sum over the ranks with the same expert, "efsdp"
    and dp_replicate, which `apply_fsdp` adds. Along "tp", where each rank has different rows of a sequence, the layer's
    backward sums the gradients of router and experts.

    Args:
        model: any module, with the same weights on every rank.
        mesh: from `build_mesh`; must pass `check_ep`.
    Communication: none.
    """
    tokens, tp_mesh = loss_mesh(mesh), axis_mesh(mesh, "tp")
    grad_group = None if tp_mesh is None else tp_mesh.get_group()
    batch_groups = [ranks.get_group() for ranks in (tokens, tp_mesh) if ranks is not None]
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.shard_experts(expert_mesh(mesh), batch_groups=batch_groups, grad_group=grad_group)
