"""Applies every axis of a mesh to a decoder."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from ringattn.errors import ArgumentError
from ringattn.parallel.data_parallel import apply_fsdp, check_zero_stage
from ringattn.parallel.decoder import Decoder
from ringattn.parallel.expert_parallel import apply_ep, check_ep
from ringattn.parallel.mesh import axis_size
from ringattn.parallel.tensor_parallel import apply_tp, check_tp


def parallelize(
    model: Decoder, mesh: DeviceMesh, *, zero: int = 3, precision: MixedPrecisionPolicy | None = None
) -> Decoder:
    """Applies tensor, expert and data parallelism to a decoder or to a stage of one, in place, and returns it.

    Collective over the mesh. Context parallelism does not change the model: pass it the attention function of
    `make_cp_attention` and batches of `local_batch`. For pipelines, cut the decoder by `cut_stages` first, and call
    this for each stage.

    Args:
        model: with the same weights on every rank.
        mesh: from `build_mesh`.
        zero: the ZeRO stage over the ranks with different tokens. 3 shards weights, gradients and optimizer state; 2
            keeps weights gathered from forward to backward; 0 shards nothing, and all-reduces gradients.
        precision: dtypes of computation and of gradient reduction; None takes the dtype of the weights.
    Returns:
        The decoder. Split or sharded parameters are DTensors: create the optimizer after this call.
    Raises:
        ArgumentError: when model, mesh and zero do not fit together, before anything is changed or sent.
    Communication: each weight that is split over "tp", once.
    """
    check_parallelizable(model, mesh, zero)
    apply_tp(model, mesh)
    apply_ep(model, mesh)
    apply_fsdp(model, mesh, zero=zero, precision=precision)
    return model


def check_parallelizable(model: Decoder, mesh: DeviceMesh, zero: int) -> None:
    """Checks that `parallelize` supports this decoder, or stage of one, on this mesh.

    Raises:
        ArgumentError: when it does not.
    """
    check_tp(model.config, mesh)
    check_ep(model.config, mesh)
    check_zero_stage(mesh, zero)
    if (pp := axis_size(mesh, "pp")) > 1 and len(model.layers) == model.config.num_layers:
        raise ArgumentError(f"pp={pp}: the model has all its {len(model.layers)} layers; cut it into stages first")
