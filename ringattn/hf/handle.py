"""Handle: shards the batches of a patched model, and gathers its outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ringattn.attention.sharding import unshard
from ringattn.comm.topology import RankMesh
from ringattn.errors import ArgumentError
from ringattn.hf.attention_call import ForwardContext
from ringattn.hf.batch_sharding import CONTEXT_KEY, BatchSharder
from ringattn.hf.causal_lm_loss import causal_lm_loss
from ringattn.hf.sequence_batch import ShardingContext
from ringattn.types import Group


class Handle:
    """A patched model. `patch` returns it; as a context manager, it undoes the patch on exit.

    Args:
        model: the patched model, or a peft or DDP wrapper of it.
        sharder: shards the batches of the model.
    """

    def __init__(self, model: nn.Module, sharder: BatchSharder) -> None:
        self.model = model
        self.sharder = sharder
        self.undo = ExitStack()  # `patch` adds what takes its changes back
        self.context: ForwardContext | None = None

    @property
    def group(self) -> Group:
        """The group or mesh that was given to `patch`."""
        return self.sharder.group

    @property
    def rank_mesh(self) -> RankMesh:
        """The ranks of the group."""
        return self.sharder.rank_mesh

    def unpatch(self) -> None:
        """Undoes the patch: the model gets its own attention back. A second call does nothing."""
        self.undo.close()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unpatch()

    def shard(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns this rank's part of a batch, as keyword arguments of the model.

        Labels are shifted and counted before they are sharded. Padding and packed documents are read from the whole
        sequence: from attention_mask, from cu_seq_lens_q/k, or from position_ids that restart. Values that are not
        (B, S, ...) tensors pass unchanged. A model that merges images into its text gets the whole sequence; its text
        model gets this rank's rows.

        The loss of the model is then this rank's part of the loss: the sum over its labels, divided by the number of
        labels on all ranks. So gradients must be summed over the group, not averaged.

        Args:
            batch: the whole batch, such as {"input_ids": (B, S), "labels": (B, S)}; equal on every rank.
        Raises:
            ArgumentError: when the batch has neither input_ids nor inputs_embeds, or its padding or packing is not
                supported.
            LayoutError: when the layout does not fit the length.
        Communication: none.
        """
        return self.sharder.shard(batch)

    @contextmanager
    def using(self, context: ForwardContext) -> Iterator[None]:
        """Gives `context` to the forward passes inside the block whose arguments have none."""
        before, self.context = self.context, context
        try:
            yield
        finally:
            self.context = before

    def unshard(self, x: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Gathers the rows of all ranks, (B, S_local, ...), into (B, S, ...) in global order; differentiable.

        Args:
            x: this rank's rows, for example its logits.
            batch: what `shard` returned.
        Raises:
            ArgumentError: when `batch` does not come from `shard`.
        Communication: one all-gather.
        """
        context = sharding_context(batch)
        return unshard(x, context.rows.layout, self.group)[:, : context.num_tokens]

    def loss(self, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Returns this rank's part of the loss, for models whose own loss ignores `num_items_in_batch`.

        Args:
            logits: (B, S_local, vocabulary).
            batch: what `shard` returned; its `shift_labels` are the targets, or else its `labels`.
        Communication: none.
        """
        labels = batch["shift_labels"] if "shift_labels" in batch else batch["labels"]
        return causal_lm_loss(logits, labels, batch["num_items_in_batch"])

    def reduce(self, loss: Tensor) -> Tensor:
        """Returns the loss of the whole batch, detached, for logging: the sum of the losses of all ranks.

        Communication: one all-reduce of a scalar per mesh axis.
        """
        total = loss.detach().clone()
        for axis in self.rank_mesh.axes:
            if len(axis.ranks) > 1:
                dist.all_reduce(total, group=axis.group)
        return total


def sharding_context(batch: Mapping[str, Any]) -> ShardingContext:
    """Returns the context that `Handle.shard` added to a batch.

    Raises:
        ArgumentError: when it has none.
    """
    context = batch.get(CONTEXT_KEY)
    if not isinstance(context, ShardingContext):
        raise ArgumentError(f"batch has no {CONTEXT_KEY!r}: pass what handle.shard(batch) returned")
    return context
