"""patch: a model's attention over a group, until it is taken back; and what the model is fed meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from ringattn.attention.sharding import unshard
from ringattn.comm.topology import rank_mesh
from ringattn.errors import ArgumentError
from ringattn.geometry.layout import Layout
from ringattn.hf.attention import NAME
from ringattn.hf.attention_call import ForwardContext
from ringattn.hf.batch_sharding import BATCH, BatchSharder, MakeLayout
from ringattn.hf.causal_lm_loss import causal_lm_loss
from ringattn.hf.generate_hooks import GenerateHooks
from ringattn.hf.implicit_positions import append_max_position, counting_embeddings, drop_max_position, dynamic_rotaries
from ringattn.hf.layer_options import check_arguments
from ringattn.hf.memory import MemorySavings
from ringattn.hf.model_support import check_model, copy_configs, model_facts, text_modules, unwrap_model
from ringattn.hf.multimodal import own_rows, text_model
from ringattn.hf.sequence_batch import ShardingContext
from ringattn.types import Group


class Handle:
    """A patched model. As a context manager it takes the patch back at the end.

    Args are those of `patch`.
    """

    def __init__(
        self,
        model: nn.Module,
        group_or_mesh: Group = None,
        *,
        layout: str | MakeLayout = "zigzag",
        exchange: str = "auto",
        backend: str | None = None,
        tile_mlp: int | None = None,
        chunk_loss: int | None = None,
    ) -> None:
        self.model = model
        self.group = group_or_mesh
        self.team = rank_mesh(group_or_mesh)
        self._pretrained: PreTrainedModel = unwrap_model(model)
        self._text = text_model(self._pretrained)
        facts = model_facts(self._pretrained, merges=self._text is not None)
        self.sharding = BatchSharder(facts, self.team, group_or_mesh, layout, exchange, backend)
        self._savings = MemorySavings(model, tile_mlp=tile_mlp, chunk_loss=chunk_loss)
        self._context: ForwardContext | None = None
        self._in_progress: ForwardContext | None = None
        self._before: list[tuple[Any, str | None]] = []
        self._hooks: list[RemovableHandle] = []

    def _apply(self) -> Handle:
        check_model(self._pretrained)
        if any(isinstance(getattr(h, "__self__", None), Handle) for h in self._pretrained._forward_pre_hooks.values()):
            raise ArgumentError(f"{type(self._pretrained).__name__} is patched: call its handle's unpatch() before")
        copy_configs(self._pretrained)
        seen: set[int] = set()
        for module in text_modules(self._pretrained):
            config = getattr(module, "config", None)
            if isinstance(config, PreTrainedConfig) and id(config) not in seen:
                seen.add(id(config))
                self._before.append((config, config._attn_implementation))
                config._attn_implementation_internal = NAME
            if isinstance(module, PreTrainedModel):
                self._hooks.append(module.register_forward_pre_hook(self._tell, with_kwargs=True))
                self._hooks.append(module.register_forward_hook(self._check))
        self._hooks += GenerateHooks(self, self._pretrained).hooks()
        for module in counting_embeddings(self._pretrained):
            encodes = any(module is part for part in self._pretrained.get_encoder().modules())
            self._hooks.append(module.register_forward_pre_hook(partial(self._place, encodes), with_kwargs=True))
        for module in dynamic_rotaries(self._pretrained):
            self._hooks.append(module.register_forward_pre_hook(self._reach, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._reached))
        self._savings.apply()
        return self

    def unpatch(self) -> None:
        """Gives the model back the attention that it had. A second time does nothing."""
        for config, implementation in self._before:
            config._attn_implementation_internal = implementation
        for hook in self._hooks:
            hook.remove()
        self._before, self._hooks = [], []
        self._savings.undo()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unpatch()

    def shard(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns this rank's share of a batch that every rank has, as the model's arguments.

        Labels are shifted, and counted, before they are sharded. Padding and packed documents are read from the whole
        sequence: from attention_mask, cu_seq_lens_q/k, or else position_ids that restart. What is no (B, S, ...)
        tensor passes unchanged. The loss of the model is then this rank's share: its sum over the labels of all
        ranks. So gradients are to be summed over the group, not averaged. A model that merges images into its text is
        given the whole of both, and its text model this rank's rows.

        Args:
            batch: such as {"input_ids": (B, S), "labels": (B, S)}; the same on every rank.
        Raises:
            ArgumentError: when it has no input_ids or inputs_embeds, or its padding or packing cannot be honoured.
            LayoutError: when the layout does not fit the length.
        Communication: none.
        """
        return self.sharding.share(batch)

    @contextmanager
    def using(self, context: ForwardContext) -> Iterator[None]:
        """What the forward passes inside are about, where it cannot be one of the model's arguments."""
        before, self._context = self._context, context
        try:
            yield
        finally:
            self._context = before

    def _tell(self, module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a forward pass: adds what it is about to its arguments, from which the attention layers take it."""
        check_arguments(module, kwargs)
        if kwargs.get(BATCH) is None and self._context is not None:
            kwargs = {**kwargs, BATCH: self._context}
        told = kwargs.get(BATCH)
        if module is self._text and isinstance(told, ShardingContext) and told.merges:
            args, kwargs = (), own_rows(self._text, args, kwargs, self.sharding, told)
        self._in_progress = kwargs.get(BATCH)
        return args, kwargs

    def _check(self, module: PreTrainedModel, args: tuple[Any, ...], output: Any) -> None:
        """After a forward pass: refuses what was made of one rank's rows for the whole sequence."""
        if isinstance(self._in_progress, ShardingContext) and getattr(output, "pooler_output", None) is not None:
            raise ArgumentError(
                f"{type(module).__name__} makes a pooler_output of a whole sequence, and each rank has a part of it: "
                "run it unpatched"
            )

    def _place(self, encodes: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before positions are embedded that a model would count itself: tells them."""
        if isinstance(self._in_progress, ShardingContext):
            rows = self._in_progress.encoder if encodes else self._in_progress.rows
            assert rows is not None
            positions = rows.layout.positions(self.team.rank)
            kwargs = {**kwargs, "position_ids": torch.as_tensor(positions, device=next(module.parameters()).device)}
        return args, kwargs

    def _reach(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before rotary embeddings that follow the largest position: has them see that of all ranks."""
        told = self._in_progress
        return (
            append_max_position(told.last, args, kwargs)
            if isinstance(told, ShardingContext) and told.last is not None
            else None
        )

    def _reached(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        told = self._in_progress
        return drop_max_position(output) if isinstance(told, ShardingContext) and told.last is not None else None

    def unshard(self, x: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Returns the rows (B, S_local, ...) of all ranks as (B, S, ...), in global order; differentiable.

        Args:
            x: such as logits.
            batch: what `shard` returned.
        """
        told = sharding_context(batch)
        return unshard(x, told.rows.layout, self.group)[:, : told.num_tokens]

    def loss(self, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Returns this rank's share of the loss, for models that compute it without `num_items_in_batch`.

        Args:
            logits: (B, S_local, vocabulary).
            batch: what `shard` returned; its `shift_labels`, or else its `labels`, are predicted.
        """
        labels = batch["shift_labels"] if "shift_labels" in batch else batch["labels"]
        return causal_lm_loss(logits, labels, batch["num_items_in_batch"])

    def reduce(self, loss: Tensor) -> Tensor:
        """Returns the loss of the whole batch: the sum of the ranks' shares, without gradients, for logging."""
        total = loss.detach().clone()
        for axis in self.team.axes:
            dist.all_reduce(total, group=axis.group)
        return total


def sharding_context(share: Mapping[str, Any]) -> ShardingContext:
    """Returns what `Handle.shard` put into a batch.

    Raises:
        ArgumentError: when it is not one of those.
    """
    found = share.get(BATCH)
    if not isinstance(found, ShardingContext):
        raise ArgumentError(f"batch has no {BATCH!r}: it must be what handle.shard(batch) returned")
    return found


def patch(
    model: nn.Module,
    group_or_mesh: Group = None,
    *,
    layout: str | Callable[[int, int], Layout] = "zigzag",
    exchange: str = "auto",
    backend: str | None = None,
    tile_mlp: int | None = None,
    chunk_loss: int | None = None,
) -> Handle:
    """Lets a model's attention run over the ranks of a group; returns the handle that shards its batches.

    Only this model is changed: its configs become its own and ask for the attention implementation "ringattn", but for
    those of towers that read images or sound. What a layer asks for (causal, windows, chunks, softcap, sinks, head
    dims) is honoured, or an error says what cannot be.

    Args:
        model: a transformers model, or one inside peft's or DDP's.
        group_or_mesh: as in `context_parallel_attention`.
        layout: "contiguous", "zigzag", "striped"; "balanced" for the mask of each batch; or a function of (seq_len,
            world_size).
        exchange: as in `context_parallel_attention`.
        backend: the kernel, as in `context_parallel_attention`.
        tile_mlp: tiles of each MLP, forward and backward, so that one tile's activations are held at a time: `tiled`.
            Experts stay whole. None is one piece.
        chunk_loss: rows whose logits are held at a time wherever labels are given; the output then has no logits:
            `chunked_cross_entropy`. None is all rows.
    Raises:
        ArgumentError: when tokens are mixed by other means than attention which can be replaced.
    Communication: none; that of the attention follows with each forward pass.
    """
    handle = Handle(
        model,
        group_or_mesh,
        layout=layout,
        exchange=exchange,
        backend=backend,
        tile_mlp=tile_mlp,
        chunk_loss=chunk_loss,
    )
    return handle._apply()
