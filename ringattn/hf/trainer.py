"""transformers' Trainer over ranks that share their sequences."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map_only
from transformers import Trainer

from ringattn.errors import ArgumentError
from ringattn.hf.accelerate_config import RingParallelism
from ringattn.hf.handle import Handle
from ringattn.hf.patching import patch

# The mixin stands before a Trainer, whose methods it calls.
if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class RingMixin(_Base):
    """Makes a Trainer, or a class of its kind, honour ParallelismConfig(cp_size=N) by ring attention.

    `class RingSFTTrainer(RingMixin, SFTTrainer)` is all that a trainer needs; `RingTrainer` is the one of transformers.
    The model is patched while a step runs, forward and backward, and is itself in between: what is saved, or generates,
    knows nothing of it. Losses, gradients and their norms are those of one process. DistributedDataParallel and
    FSDP2 average gradients over all ranks; Trainer makes up for it in the loss.

    Override `patched` for other options than those of `patch`.
    """

    _share: dict[str, Any] | None = None

    def patched(self, model: nn.Module, mesh: DeviceMesh) -> Handle:
        """Returns the model's handle; `mesh` is the axis of the ranks that share a sequence."""
        return patch(model, mesh)

    @cached_property
    def ring(self) -> Handle:
        """The handle that shares out batches; it is not applied: each step patches the model anew."""
        handle = self._patched()
        handle.unpatch()
        self._check(handle)
        return handle

    def _patched(self) -> Handle:
        assert self.model is not None
        return self.patched(self.model, self.accelerator.torch_device_mesh["cp"])

    def _build_accelerator_args(self, **options: Any) -> dict[str, Any]:
        # The signature is Trainer's.
        arguments: dict[str, Any] = super()._build_accelerator_args(**options)
        config = arguments.get("parallelism_config")
        if config is not None and config.cp_size > 1:
            arguments["parallelism_config"] = RingParallelism.of(config)
        return arguments

    def create_accelerator_and_postprocess(self) -> None:
        """In Trainer's place: of what evaluation gathers, ranks that share their sequences have the same."""
        super().create_accelerator_and_postprocess()
        if self.get_cp_size() > 1:
            self.gather_function = self._gather_once

    def _gather_once(self, data: Any) -> Any:
        """Returns what the ranks have, of each sequence once, without the repetitions that fill up the last batch."""
        state, mesh = self.accelerator.gradient_state, self.accelerator.torch_device_mesh
        first = mesh.mesh.select(mesh.mesh_dim_names.index("cp"), 0).flatten()
        rows = state.remainder if state.end_of_dataloader and state.remainder > 0 else None

        def once(x: Tensor) -> Tensor:
            by_rank = x.view(mesh.size(), -1, *x.shape[1:])
            return by_rank[first.to(x.device)].flatten(0, 1)[:rows]

        return tree_map_only(Tensor, once, self.accelerator.gather(data))

    def _prepare_context_parallel_inputs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Callable[[], AbstractContextManager[Any]], dict[str, Any]]:
        """In Trainer's place, around a step: returns what is entered, and the inputs of this rank."""
        if self.get_cp_size() == 1:
            return super()._prepare_context_parallel_inputs(model, inputs)
        self._share = self.ring.shard(inputs)
        return self._patched, self._share

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Returns loss, logits and labels of a batch, each rank those of the whole sequences.

        A batch without labels is computed by each rank for itself.
        """
        self._share = None
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if isinstance(logits, tuple) and not logits:
            logits = None  # chunk_loss leaves none
        share = self._share
        if share is None or loss is None:
            return loss, logits, labels
        sizes = share["labels"].shape

        def whole(x: Tensor) -> Tensor:
            return self.ring.unshard(x, share) if x.shape[:2] == sizes else x  # not what is of images, say

        return self.ring.reduce(loss) / self.get_cp_size(), tree_map_only(Tensor, whole, logits), labels

    def _check(self, handle: Handle) -> None:
        """Refuses what would count labels, or rows, of one rank for those of all."""
        refused = {
            "label_smoothing_factor": (self.label_smoother is not None, "labels are shifted before they are sharded"),
            "compute_loss_func": (self.compute_loss_func is not None, "it would see a part of each sequence"),
            "average_tokens_across_devices=False": (
                not self.args.average_tokens_across_devices,
                "the loss is that of all ranks' tokens",
            ),
            "eval_use_gather_object": (self.args.eval_use_gather_object, "tensors are gathered, of each sequence once"),
            "a model whose loss takes no num_items_in_batch": (
                not (self.model_accepts_loss_kwargs and handle.sharder.facts.takes_num_items),
                "its loss is a mean over the tokens of one rank; write a loop with handle.loss",
            ),
        }
        for name, (asked, reason) in refused.items():
            if asked:
                raise ArgumentError(f"{name} cannot be had with cp_size={self.get_cp_size()}: {reason}")


class RingTrainer(RingMixin, Trainer):
    """transformers.Trainer with ring attention over the axis "cp": see `RingMixin`.

    Args are those of Trainer; `TrainingArguments(parallelism_config=ParallelismConfig(cp_size=N))` asks for it.
    """
