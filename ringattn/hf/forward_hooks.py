"""Hooks that pass the context of each forward pass to the attention layers and positions of a patched model."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ringattn.attention.sharding import position_ids
from ringattn.errors import ArgumentError
from ringattn.hf.attention_call import ForwardContext
from ringattn.hf.batch_sharding import CONTEXT_KEY
from ringattn.hf.handle import Handle
from ringattn.hf.implicit_positions import (
    append_max_position,
    drop_max_position,
    dynamic_rotary_embeddings,
    learned_position_embeddings,
)
from ringattn.hf.layer_options import check_model_options
from ringattn.hf.model_support import text_modules
from ringattn.hf.multimodal import shard_text_inputs
from ringattn.hf.sequence_batch import ShardingContext


class ForwardHooks:
    """The hooks around the forward passes of one patched model.

    Args:
        handle: the handle of the model; its context is used where the model's arguments have none.
        model: the transformers model.
        text_model: the part whose input is sharded, if the model merges images or sound into its text; else None.
    """

    def __init__(self, handle: Handle, model: PreTrainedModel, text_model: PreTrainedModel | None) -> None:
        self._handle, self._model, self._text_model = handle, model, text_model
        self._active: ForwardContext | None = None

    def register(self) -> list[RemovableHandle]:
        """Registers the hooks on the model and its parts; returns the handles that remove them."""
        hooks: list[RemovableHandle] = []
        for module in text_modules(self._model):
            if isinstance(module, PreTrainedModel):
                hooks.append(module.register_forward_pre_hook(self._inject_context, with_kwargs=True))
                hooks.append(module.register_forward_hook(self._check_output))
        for module in learned_position_embeddings(self._model):
            in_encoder = any(module is part for part in self._model.get_encoder().modules())
            inject = partial(self._inject_positions, in_encoder)
            hooks.append(module.register_forward_pre_hook(inject, with_kwargs=True))
        for module in dynamic_rotary_embeddings(self._model):
            hooks.append(module.register_forward_pre_hook(self._append_max_position, with_kwargs=True))
            hooks.append(module.register_forward_hook(self._drop_max_position))
        return hooks

    def _inject_context(self, module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Adds the context to a model's arguments; transformers passes it on to the attention layers."""
        check_model_options(module, kwargs)
        if kwargs.get(CONTEXT_KEY) is None and self._handle.context is not None:
            kwargs = {**kwargs, CONTEXT_KEY: self._handle.context}
        context = kwargs.get(CONTEXT_KEY)
        if module is self._text_model and isinstance(context, ShardingContext) and context.shards_in_text_model:
            args, kwargs = (), shard_text_inputs(self._text_model, args, kwargs, self._handle.sharder, context)
        self._active = kwargs.get(CONTEXT_KEY)
        return args, kwargs

    def _check_output(self, module: PreTrainedModel, args: tuple[Any, ...], output: Any) -> None:
        """Refuses an output that the model pools from the whole sequence."""
        if isinstance(self._active, ShardingContext) and getattr(output, "pooler_output", None) is not None:
            raise ArgumentError(
                f"pooler_output: {type(module).__name__} pools a whole sequence, but each rank has a part of it; run "
                "it unpatched"
            )

    def _inject_positions(
        self, in_encoder: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Adds position_ids to the arguments of an embedding that would count the local rows from 0."""
        if isinstance(self._active, ShardingContext):
            rows = self._active.encoder_rows if in_encoder else self._active.rows
            assert rows is not None
            device = next(module.parameters()).device
            kwargs = {**kwargs, "position_ids": position_ids(rows.layout, self._handle.rank_mesh.rank, device=device)}
        return args, kwargs

    def _append_max_position(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Passes the global maximum position to a rotary embedding whose frequencies depend on it."""
        context = self._active
        if not isinstance(context, ShardingContext) or context.max_position is None:
            return None
        return append_max_position(context.max_position, args, kwargs)

    def _drop_max_position(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Removes the row of the appended position from the output of a rotary embedding."""
        context = self._active
        if not isinstance(context, ShardingContext) or context.max_position is None:
            return None
        return drop_max_position(output)
