"""Hugging Face models on the same mesh: dense ones, split by the tensor-parallel plan that they bring along.

A model's plan names a style for each module. The styles of dense models mean the same as torch's styles, which are
applied, so that gradients, `apply_fsdp_to_layers` and `gradient_norm` are the same as for our own decoder. Between its
weights such a model keeps all rows on each rank of "tp". Context parallelism is left to the model's attention,
which is to run on `context_mesh(mesh)`.

Not here: pipelines and experts, and styles that split anything else than one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

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
from transformers import PreTrainedModel

from ringattn.errors import ArgumentError
from ringattn.parallel.data_parallel import apply_fsdp_to_layers, check_data
from ringattn.parallel.mesh import axis_mesh, axis_size

_HEADS = 2  # the dim of heads in what the norms of queries and keys get, (B, S, heads, head_dim)


def parallelize_hf(
    model: PreTrainedModel, mesh: DeviceMesh, *, zero: int = 3, precision: MixedPrecisionPolicy | None = None
) -> PreTrainedModel:
    """Makes a dense Hugging Face model parallel on the axes of a mesh, in place, and returns it.

    All ranks of the mesh call it together. As with `parallelize`, gradients are summed: the loss of a rank is to be its
    share of the global loss. A head that is tied to the embedding stays whole.

    Args:
        model: with the same weights on every rank.
        mesh: from `build_mesh`, with neither "pp" nor "ep".
        zero: as in `parallelize`.
        precision: as in `parallelize`.
    Returns:
        the model. Make the optimizer after this; with "tp", whose axis only some weights are on, by `foreach=False`.
    Raises:
        ArgumentError: when the mesh has an axis that is not for such models, or "tp" cannot split this one; before
            anything is changed or sent.
    Communication: each weight that is split over "tp", once.
    """
    for name in ("pp", "ep"):
        if (size := axis_size(mesh, name)) > 1:
            raise ArgumentError(f"{name}={size}: Hugging Face models are not spread over {name} here; leave it out")
    check_data(mesh, zero)
    along = axis_mesh(mesh, "tp")
    if along is not None:
        parallelize_module(model, along, _plan(model, along.size()))
    layers = [module for module in model.modules() if type(module).__name__ in _layer_names(model)]
    apply_fsdp_to_layers(model, layers, mesh, zero=zero, precision=precision)
    return model


def _plan(model: PreTrainedModel, tp: int) -> dict[str, ParallelStyle]:
    """The style of each module that its plan splits."""
    named = _without_tied(model, model.tp_plan)
    if not named:
        raise ArgumentError(f"tp={tp}: {type(model).__name__} brings no tensor-parallel plan along")
    if unknown := sorted(set(named.values()) - set(_styles())):
        raise ArgumentError(
            f"tp={tp}: the plan of {type(model).__name__} has styles that are not for dense models: {unknown}; "
            f"there are {sorted(_styles())}"
        )
    config = model.config.get_text_config()
    counts = {name: getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    counts["intermediate_size"] = getattr(config, "intermediate_size", None)
    if wrong := [f"{name}={count}" for name, count in counts.items() if count is not None and count % tp]:
        raise ArgumentError(f"tp={tp}: must divide {', '.join(wrong)}")
    return {name: _styles()[style] for name, style in named.items()}


def _styles() -> Mapping[str, ParallelStyle]:
    """What the styles of transformers are in torch. A style has state: each call makes new ones."""
    return {
        "colwise": ColwiseParallel(),
        "colwise_gather_output": ColwiseParallel(output_layouts=Replicate()),
        "rowwise": RowwiseParallel(),
        "rowwise_split_input": RowwiseParallel(input_layouts=Replicate()),
        "replicated_with_grad_allreduce": SequenceParallel(sequence_dim=_HEADS, use_local_output=True),
    }


def _without_tied(model: PreTrainedModel, plan: Mapping[str, str]) -> dict[str, str]:
    """The plan, less modules whose weight is the embedding's as well: split, they would no longer be tied to it."""
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    return {
        name: style
        for name, style in plan.items()
        if name not in modules or embedding is None or getattr(modules[name], "weight", None) is not embedding
    }


def _layer_names(model: PreTrainedModel) -> set[str]:
    return set(model._no_split_modules or ())
