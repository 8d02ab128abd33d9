"""Data parallelism: the copies of the weights, and who keeps which part of them.

Ranks that see other tokens, be it of other sequences or of the same one, have the same weights to learn. So the ranks
along dp_shard x ring x ulysses share out one copy of them (`fully_shard`), and those along dp_replicate have copies
(HSDP; plain replicas where there is nothing to share out). How much is shared out is ZeRO's stage:

    zero  parameters             gradients                          optimizer state
    3     whole in a layer only  shared out after each micro-batch  shared out
    2     whole until backward   shared out after each micro-batch  shared out
    1     whole until the step   whole until the last micro-batch   shared out
    0     whole                  whole, all-reduced                 whole

Stage 1 is a way to run micro-batches: either of the two above, with `no_sync` around all of them but the last.

Gradients are summed, never averaged: a rank's loss is its share of the global loss (loss.py), so the sum of the ranks'
gradients is the gradient. torch's own division is undone.

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
from ringattn.parallel.mesh import EXPERT, axis_mesh, axis_size, expert_fsdp_mesh, fsdp_mesh, loss_mesh


def check_data(mesh: DeviceMesh, zero: int) -> None:
    """Checks the stage of ZeRO.

    Raises:
        ArgumentError: when there is no such stage, it says nothing of weights, or "dp_shard" contradicts it.
    """
    if isinstance(zero, bool) or zero not in (0, 2, 3):
        told = ": for ZeRO-1 take 2, and hold_gradients around every micro-batch but the last" if zero == 1 else ""
        raise ArgumentError(f"zero={zero!r:.100}: must be 0, 2 or 3{told}")
    if zero == 0 and (size := axis_size(mesh, "dp_shard")) > 1:
        raise ArgumentError(f"zero=0 keeps all weights whole, but dp_shard={size} shares them out: take dp_replicate")


def apply_fsdp(model: Decoder, mesh: DeviceMesh, *, zero: int, precision: MixedPrecisionPolicy | None = None) -> None:
    """Has the ranks that see other tokens share out the weights of a decoder, or of a stage, and sum its gradients.

    Experts are spread over "ep" already: what there is to share out or to sum lies between the ranks that have the same
    ones, "efsdp".

    Args:
        model: with its weights split over "tp", if at all.
        mesh: from `build_mesh`.
        zero: 3, 2, or 0; see the file's own text.
        precision: dtypes of computing and of summing gradients; None is that of the weights.
    Communication: none here. A step: with 3, each weight all-gathered in forward and in backward, else once; each
        gradient reduce-scattered, and its shard all-reduced over dp_replicate. With 0, each gradient all-reduced.
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
    """Does what `apply_fsdp` does, for any model of which the layers are told: each is gathered by itself.

    Args are those of `apply_fsdp`, but for `layers`: modules of the model, none within another.
    """
    policy = MixedPrecisionPolicy() if precision is None else precision
    spread = {parameter for parameter in model.parameters() if _is_spread(parameter)}
    apart = [module for module in model.modules() if not spread.isdisjoint(module.parameters(recurse=False))]
    _apply_fsdp(apart, spread, _expert_ranks(mesh, zero), zero, policy)
    _apply_fsdp([*layers, model], set(model.parameters()) - spread, _ranks(mesh, zero), zero, policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Within it, backward adds gradients up on each rank and sends nothing, and weights stay whole: ZeRO-1.

    For all micro-batches of a step but the last, whose backward then sums what all of them gave.

    Args:
        model: from `parallelize`.
    Communication: none; the weights' all-gathers fall away from the second micro-batch on.
    """
    _set_last(model, False)
    try:
        yield
    finally:
        _set_last(model, True)


class _FsdpRanks(NamedTuple):
    """The ranks that have the same weights to learn: `shard` share out one copy, `copies` have copies of that."""

    copies: DeviceMesh | None
    shard: DeviceMesh | None


def _ranks(mesh: DeviceMesh, zero: int) -> _FsdpRanks:
    return _FsdpRanks(axis_mesh(mesh, "dp_replicate"), fsdp_mesh(mesh)) if zero else _FsdpRanks(loss_mesh(mesh), None)


def _expert_ranks(mesh: DeviceMesh, zero: int) -> _FsdpRanks:
    copies, shard = axis_mesh(mesh, "dp_replicate"), expert_fsdp_mesh(mesh)
    if zero or shard is None:
        return _FsdpRanks(copies, shard)
    if copies is None:
        return _FsdpRanks(shard, None)
    return _FsdpRanks(DeviceMesh._concatenate([copies, shard])._flatten("expert_copies"), None)


def _is_spread(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) and EXPERT.name in (parameter.device_mesh.mesh_dim_names or ())


def _apply_fsdp(
    parts: Sequence[nn.Module], owned: set[nn.Parameter], ranks: _FsdpRanks, zero: int, policy: MixedPrecisionPolicy
) -> None:
    """Shares the parts out, inner ones before outer ones, but only the parameters that are meant."""
    for part in parts:
        others = set(part.parameters()) - owned
        if ranks.shard is not None:
            both = ranks.shard if ranks.copies is None else DeviceMesh._concatenate([ranks.copies, ranks.shard])
            fully_shard(part, mesh=both, reshard_after_forward=zero == 3, mp_policy=policy, ignored_params=others)
        elif ranks.copies is not None:
            replicate(part, mesh=ranks.copies, mp_policy=policy, ignored_params=others)
    if ranks == (None, None):
        _finish_gradients(owned)


def _set_last(model: nn.Module, last: bool) -> None:
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(last)
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)


def _finish_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Has gradients summed over "tp" as soon as they are there, where rows lie on several ranks, as those of norms.

    `fully_shard` and `replicate` do it themselves.
    """
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            parameter.register_post_accumulate_grad_hook(_finish)  # type: ignore[no-untyped-call]


def _finish(parameter: Tensor) -> None:
    assert isinstance(parameter, DTensor)
    grad = parameter.grad
    assert isinstance(grad, DTensor)
    if grad.placements != parameter.placements:
        parameter.grad = grad.redistribute(placements=parameter.placements)
