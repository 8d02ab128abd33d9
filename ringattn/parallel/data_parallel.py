"""Data parallelism: which ranks replicate the weights, which shard them (FSDP), and how gradients are summed.

Ranks with different tokens, of the same sequence or of different ones, train the same weights. The ranks along
dp_shard x ring x ulysses shard one copy of them (`fully_shard`), and the ranks along dp_replicate hold replicas of that
copy: HSDP, or plain replicas where nothing is sharded. `zero` selects the ZeRO stage:

    zero  parameters                      gradients                               optimizer state
    3     sharded outside of a layer      sharded after each micro-batch          sharded
    2     gathered, forward to backward   sharded after each micro-batch          sharded
    1     gathered until optimizer step   accumulated, sharded after the last     sharded
    0     replicated                      all-reduced                             replicated

Stage 1 is not a value of `zero` but a way to run micro-batches: zero=2, with `no_sync` around all of them but the last.

Gradients are summed, not averaged. Each rank's loss is its share of the global loss (`vocab_parallel_loss`), so the
gradient of the global loss is the sum of the ranks' gradients. FSDP's own division is turned off.

Source: Rajbhandari et al. 2020, arXiv:1910.02054; Zhao et al. 2023, arXiv:2304.11277.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ringattn.errors import ArgumentError
from ringattn.parallel.decoder import Decoder
from ringattn.parallel.mesh import EXPERT_AXIS, axis_mesh, axis_size, expert_fsdp_mesh, fsdp_mesh, loss_mesh


def check_zero_stage(mesh: DeviceMesh, zero: int) -> None:
    """Checks the ZeRO stage against the mesh.

    Raises:
        ArgumentError: when `zero` is not 0, 2 or 3, or it is 0 and the mesh has "dp_shard".
    """
    if isinstance(zero, bool) or zero not in (0, 2, 3):
        hint = ": for ZeRO-1 pass 2, and use no_sync around every micro-batch but the last" if zero == 1 else ""
        raise ArgumentError(f"zero={zero!r:.100}: must be 0, 2 or 3{hint}")
    if zero == 0 and (size := axis_size(mesh, "dp_shard")) > 1:
        raise ArgumentError(f"zero=0 replicates all weights, but dp_shard={size} shards them: use dp_replicate")


def apply_fsdp(model: Decoder, mesh: DeviceMesh, *, zero: int, precision: MixedPrecisionPolicy | None = None) -> None:
    """Shards and replicates the weights of a decoder, or of one of its stages, and sums its gradients; in place.

    Experts are already sharded over "ep"; they are sharded further over the ranks with the same experts, "efsdp".

    Args:
        model: after `apply_tp` and `apply_ep`.
        mesh: from `build_mesh`.
        zero: 3, 2, or 0; see the table in the module docstring.
        precision: dtypes of computation and of gradient reduction; None takes the dtype of the weights.
    Communication: none here. Per step: zero=3 all-gathers each weight in forward and in backward, zero=2 once; each
        gradient is reduce-scattered, and its shard all-reduced over dp_replicate. zero=0 all-reduces each gradient.
    """
    apply_fsdp_to_layers(model, list(model.layers.values()), mesh, zero=zero, precision=precision)


def apply_fsdp_to_layers(
    model: nn.Module,
    layers: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    zero: int,
    precision: MixedPrecisionPolicy | None = None,
) -> None:
    """Applies FSDP as `apply_fsdp` does, to any model: each layer is one FSDP unit, the rest of the model another.

    Args:
        model: after its weights were split over "tp", if they are.
        layers: submodules of the model, none inside another.
        mesh: from `build_mesh`.
        zero: as in `apply_fsdp`.
        precision: as in `apply_fsdp`.
    Communication: as `apply_fsdp`.
    """
    policy = MixedPrecisionPolicy() if precision is None else precision
    expert_params = {parameter for parameter in model.parameters() if _is_expert(parameter)}
    expert_modules = [m for m in model.modules() if not expert_params.isdisjoint(m.parameters(recurse=False))]
    _apply_fsdp(expert_modules, expert_params, _expert_meshes(mesh, zero), zero, policy)
    _apply_fsdp([*layers, model], set(model.parameters()) - expert_params, _dense_meshes(mesh, zero), zero, policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Accumulates gradients locally: inside, backward reduces no gradients and keeps the weights gathered (ZeRO-1).

    Use it around all micro-batches of a step but the last. The backward of the last one reduces the accumulated sum.

    Args:
        model: from `parallelize`.
    Communication: none for gradients; weights are all-gathered for the first micro-batch only.
    """
    _set_is_last_micro_batch(model, False)
    try:
        yield
    finally:
        _set_is_last_micro_batch(model, True)


class _DataParallelMeshes(NamedTuple):
    """The ranks that train the same weights: sharded over `shard`, and the shards replicated over `replicate`."""

    replicate: DeviceMesh | None
    shard: DeviceMesh | None


def _dense_meshes(mesh: DeviceMesh, zero: int) -> _DataParallelMeshes:
    if zero == 0:
        return _DataParallelMeshes(loss_mesh(mesh), None)
    return _DataParallelMeshes(axis_mesh(mesh, "dp_replicate"), fsdp_mesh(mesh))


def _expert_meshes(mesh: DeviceMesh, zero: int) -> _DataParallelMeshes:
    replicas, shards = axis_mesh(mesh, "dp_replicate"), expert_fsdp_mesh(mesh)
    if zero or shards is None:
        return _DataParallelMeshes(replicas, shards)
    if replicas is None:
        return _DataParallelMeshes(shards, None)
    return _DataParallelMeshes(DeviceMesh._concatenate([replicas, shards])._flatten("expert_replicate"), None)


def _is_expert(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) and EXPERT_AXIS.name in (parameter.device_mesh.mesh_dim_names or ())


def _apply_fsdp(
    modules: Sequence[nn.Module],
    parameters: set[nn.Parameter],
    meshes: _DataParallelMeshes,
    zero: int,
    policy: MixedPrecisionPolicy,
) -> None:
    """Makes each module an FSDP unit, inner modules before outer ones, of the given parameters only."""
    for module in modules:
        ignored = set(module.parameters()) - parameters
        if meshes.shard is not None:
            hsdp = meshes.shard
            if meshes.replicate is not None:
                hsdp = DeviceMesh._concatenate([meshes.replicate, meshes.shard])
            fully_shard(module, mesh=hsdp, reshard_after_forward=zero == 3, mp_policy=policy, ignored_params=ignored)
        elif meshes.replicate is not None:
            replicate(module, mesh=meshes.replicate, mp_policy=policy, ignored_params=ignored)
    if meshes == (None, None):
        _register_partial_gradient_hooks(parameters)


def _set_is_last_micro_batch(model: nn.Module, last: bool) -> None:
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(last)
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)


def _register_partial_gradient_hooks(parameters: Iterable[nn.Parameter]) -> None:
    """Registers hooks that sum partial gradients over "tp", such as the norms' where rows are sharded over "tp".

    `fully_shard` and `replicate` reduce them themselves.
    """
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            parameter.register_post_accumulate_grad_hook(_reduce_partial_gradient)  # type: ignore[no-untyped-call]


def _reduce_partial_gradient(parameter: Tensor) -> None:
    assert isinstance(parameter, DTensor)
    grad = parameter.grad
    assert isinstance(grad, DTensor)
    if grad.placements != parameter.placements:
        parameter.grad = grad.redistribute(placements=parameter.placements)
