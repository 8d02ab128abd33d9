"""RingTrainer and RingMixin: transformers' Trainer with sequences sharded over ranks."""

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

# The mixin is combined with a Trainer, whose methods it calls.
if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class RingMixin(_Base):
    """Runs `ParallelismConfig(cp_size=N)` by ringattn in a Trainer or a subclass of it.

    Another trainer needs only `class RingSFTTrainer(RingMixin, SFTTrainer)`; `RingTrainer` is the combination with
    Trainer. The model is patched during each step, forward and backward, and unpatched in between, so that saving and
    generating work unchanged. Losses, gradients and gradient norms are the same as on one process.
    DistributedDataParallel and FSDP2 average gradients over all ranks; Trainer scales the loss accordingly.

    Override `patched` to pass other options to `patch`.
    """

    _local_batch: dict[str, Any] | None = None

    def patched(self, model: nn.Module, mesh: DeviceMesh) -> Handle:
        """Patches the model over `mesh`, the "cp" axis of the device mesh; returns the handle."""
        return patch(model, mesh)

    @cached_property
    def ring(self) -> Handle:
        """A handle that shards batches; it is unpatched, since each step patches the model anew."""
        handle = self._patch_model()
        handle.unpatch()
        self._check_options(handle)
        return handle

    def _patch_model(self) -> Handle:
        assert self.model is not None
        return self.patched(self.model, self.accelerator.torch_device_mesh["cp"])

    def _build_accelerator_args(self, **options: Any) -> dict[str, Any]:
        # Overrides Trainer's.
        arguments: dict[str, Any] = super()._build_accelerator_args(**options)
        config = arguments.get("parallelism_config")
        if config is not None and config.cp_size > 1:
            arguments["parallelism_config"] = RingParallelism.of(config)
        return arguments

    def create_accelerator_and_postprocess(self) -> None:
        """Overrides Trainer's, so that evaluation gathers the results of each sequence once."""
        super().create_accelerator_and_postprocess()
        if self.get_cp_size() > 1:
            self.gather_function = self._gather_sequences

    def _gather_sequences(self, data: Any) -> Any:
        """Gathers tensors (rows, ...) from all ranks; of the ranks along "cp", which have equal ones, from the first.

        Rows that repeat the data set to fill up the last batch are dropped.
        """
        state, mesh = self.accelerator.gradient_state, self.accelerator.torch_device_mesh
        first_ranks = mesh.mesh.select(mesh.mesh_dim_names.index("cp"), 0).flatten()
        num_rows = state.remainder if state.end_of_dataloader and state.remainder > 0 else None

        def select(x: Tensor) -> Tensor:
            by_rank = x.view(mesh.size(), -1, *x.shape[1:])
            return by_rank[first_ranks.to(x.device)].flatten(0, 1)[:num_rows]

        return tree_map_only(Tensor, select, self.accelerator.gather(data))

    def _prepare_context_parallel_inputs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Callable[[], AbstractContextManager[Any]], dict[str, Any]]:
        """Overrides Trainer's: returns what patches the model around a step, and this rank's part of the inputs."""
        if self.get_cp_size() == 1:
            return super()._prepare_context_parallel_inputs(model, inputs)
        self._local_batch = self.ring.shard(inputs)
        return self._patch_model, self._local_batch

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Returns loss, logits and labels of a batch, of the whole sequences on every rank.

        Every rank computes a batch without labels by itself.
        """
        self._local_batch = None
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if isinstance(logits, tuple) and not logits:
            logits = None  # with chunk_loss, there are none
        local_batch = self._local_batch
        if local_batch is None or loss is None:
            return loss, logits, labels
        local_shape = local_batch["labels"].shape

        def unshard(x: Tensor) -> Tensor:
            return self.ring.unshard(x, local_batch) if x.shape[:2] == local_shape else x  # not features of images

        return self.ring.reduce(loss) / self.get_cp_size(), tree_map_only(Tensor, unshard, logits), labels

    def _check_options(self, handle: Handle) -> None:
        """Refuses options that would use the labels or rows of one rank as if they were complete."""
        unsupported = {
            "label_smoothing_factor": (self.label_smoother is not None, "labels are shifted before they are sharded"),
            "compute_loss_func": (self.compute_loss_func is not None, "it would get a part of each sequence"),
            "average_tokens_across_devices=False": (
                not self.args.average_tokens_across_devices,
                "the loss is normalised by the tokens of all ranks",
            ),
            "eval_use_gather_object": (self.args.eval_use_gather_object, "results of each sequence are gathered once"),
            "a model whose loss takes no num_items_in_batch": (
                not (self.model_accepts_loss_kwargs and handle.sharder.facts.takes_num_items),
                "its loss is a mean over the tokens of one rank; write a loop with handle.loss",
            ),
        }
        for name, (is_set, reason) in unsupported.items():
            if is_set:
                raise ArgumentError(f"{name}: not supported with cp_size={self.get_cp_size()}: {reason}")


class RingTrainer(RingMixin, Trainer):
    """transformers.Trainer with ring attention over the axis "cp", as described in `RingMixin`.

    The arguments are the same as for Trainer. `TrainingArguments(parallelism_config=ParallelismConfig(cp_size=N))` sets
    the number of ranks that share a sequence.
    """
