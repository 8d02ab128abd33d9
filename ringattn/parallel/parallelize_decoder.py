"""A decoder made parallel on every axis of a mesh."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from ringattn.errors import ArgumentError
from ringattn.parallel.data_parallel import apply_fsdp, check_data
from ringattn.parallel.decoder import Decoder
from ringattn.parallel.expert_parallel import apply_ep, check_experts
from ringattn.parallel.mesh import axis_size
from ringattn.parallel.tensor_parallel import apply_tp, check_tensor


def parallelize(
    model: Decoder, mesh: DeviceMesh, *, zero: int = 3, precision: MixedPrecisionPolicy | None = None
) -> Decoder:
    """Makes a decoder parallel on every axis of a mesh, in place, and returns it.

    All ranks of the mesh call it together. Context parallelism changes nothing of the model: it lies in the attention
    (`attend_over`) and in the shares of a batch (`share_of`) that the model is given.

    Args:
        model: with the same weights on every rank.
        mesh: from `build_mesh`.
        zero: how much the ranks that see other tokens share out of one copy of the weights. 3: weights, gradients and
            optimizer state; 2: weights are whole from forward to backward; 0: nothing, gradients are all-reduced.
        precision: dtypes of computing and of summing gradients; None is that of the weights.
    Returns:
        the decoder. Its parameters are DTensors where they are split or shared out: make the optimizer after this.
    Raises:
        ArgumentError: when the mix is wrong, before anything is changed or sent.
    Communication: each weight that is split over "tp", once.
    """
    check_mix(model, mesh, zero)
    apply_tp(model, mesh)
    apply_ep(model, mesh)
    apply_fsdp(model, mesh, zero=zero, precision=precision)
    return model


def check_mix(model: Decoder, mesh: DeviceMesh, zero: int) -> None:
    """Checks that a decoder, or a stage of one, can be made parallel on a mesh.

    Raises:
        ArgumentError: when it cannot.
    """
    check_tensor(model.config, mesh)
    check_experts(model.config, mesh)
    check_data(mesh, zero)
    if (stages := axis_size(mesh, "pp")) > 1 and len(model.layers) == model.config.num_layers:
        raise ArgumentError(f"pp={stages}: the model has all its {len(model.layers)} layers; cut it into stages first")
