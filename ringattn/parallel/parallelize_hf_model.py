"""Applies the axes of a mesh to dense Hugging Face models, by the tensor-parallel plan that each model provides.

The plan names a style for each module. The styles of dense models correspond to torch's parallel styles, which are
applied here, so gradients, `apply_fsdp_to_layers` and `gradient_norm` work as for our own decoder. Between its matrix
products such a model keeps all rows on each "tp" rank (no sequence parallelism). Context parallelism is left to the
model's attention, which must run on `context_mesh(mesh)`.

Not supported: pipelines, experts, and styles that split more than one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from ringattn.errors import ArgumentError
from ringattn.parallel.data_parallel import apply_fsdp_to_layers, check_zero_stage
from ringattn.parallel.mesh import axis_mesh, axis_size

if TYPE_CHECKING:  # `ringattn.parallel` works without transformers
    from transformers import PreTrainedModel

_HEAD_DIM_INDEX = 2  # the dim of heads in the input of query and key norms, (B, S, heads, head_dim)


def parallelize_hf(
    model: PreTrainedModel, mesh: DeviceMesh, *, zero: int = 3, precision: MixedPrecisionPolicy | None = None
) -> PreTrainedModel:
    """Applies tensor and data parallelism to a dense Hugging Face model, in place, and returns it.

    Collective over the mesh. As with `parallelize`, gradients are summed: each rank's loss must be its share of the
    global loss. An output head that is tied to the embedding is not split.

    Args:
        model: with the same weights on every rank.
        mesh: from `build_mesh`, without "pp" and "ep".
        zero: as in `parallelize`.
        precision: as in `parallelize`.
    Returns:
        The model. Create the optimizer after this call; with "tp", which splits only some weights, use `foreach=False`.
    Raises:
        ArgumentError: when the mesh has an axis that such models do not support, or "tp" cannot split this model;
            before anything is changed or sent.
    Communication: each weight that is split over "tp", once.
    """
    for name in ("pp", "ep"):
        if (size := axis_size(mesh, name)) > 1:
            raise ArgumentError(f"{name}={size}: {name} is not supported for Hugging Face models; leave it out")
    check_zero_stage(mesh, zero)
    tp_mesh = axis_mesh(mesh, "tp")
    if tp_mesh is not None:
        parallelize_module(model, tp_mesh, _tp_plan(model, tp_mesh.size()))
    layer_classes = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in layer_classes]
    apply_fsdp_to_layers(model, layers, mesh, zero=zero, precision=precision)
    return model


def _tp_plan(model: PreTrainedModel, tp: int) -> dict[str, ParallelStyle]:
    """Returns the torch style of each module that the model's plan splits."""
    plan = _without_tied_modules(model, model.tp_plan)
    if not plan:
        raise ArgumentError(f"tp={tp}: {type(model).__name__} has no tensor-parallel plan")
    if unknown := sorted(set(plan.values()) - set(_torch_styles())):
        raise ArgumentError(
            f"tp={tp}: the plan of {type(model).__name__} has styles that are not for dense models: {unknown}; "
            f"supported are {sorted(_torch_styles())}"
        )
    config = model.config.get_text_config()
    dims = {name: getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    dims["intermediate_size"] = getattr(config, "intermediate_size", None)
    if wrong := [f"{name}={size}" for name, size in dims.items() if size is not None and size % tp]:
        raise ArgumentError(f"tp={tp}: must divide {', '.join(wrong)}")
    return {name: _torch_styles()[style] for name, style in plan.items()}


def _torch_styles() -> Mapping[str, ParallelStyle]:
    """Maps transformers' style names to torch's styles. Styles are stateful, so each call returns new ones."""
    return {
        "colwise": ColwiseParallel(),
        "colwise_gather_output": ColwiseParallel(output_layouts=Replicate()),
        "rowwise": RowwiseParallel(),
        "rowwise_split_input": RowwiseParallel(input_layouts=Replicate()),
        "replicated_with_grad_allreduce": SequenceParallel(sequence_dim=_HEAD_DIM_INDEX, use_local_output=True),
    }


def _without_tied_modules(model: PreTrainedModel, plan: Mapping[str, str]) -> dict[str, str]:
    """Removes modules whose weight is the embedding's: splitting them would untie them."""
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    return {
        name: style
        for name, style in plan.items()
        if name not in modules or embedding is None or getattr(modules[name], "weight", None) is not embedding
    }
