"""patch: runs the attention of a transformers model over the ranks of a group."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ringattn.comm.topology import rank_mesh
from ringattn.errors import ArgumentError
from ringattn.geometry.layout import Layout
from ringattn.hf.attention_interface import IMPLEMENTATION
from ringattn.hf.batch_sharding import BatchSharder
from ringattn.hf.forward_hooks import ForwardHooks
from ringattn.hf.generate_hooks import GenerateHooks
from ringattn.hf.handle import Handle
from ringattn.hf.memory_savings import MemorySavings
from ringattn.hf.model_support import check_model, copy_configs, model_facts, text_modules, unwrap_model
from ringattn.hf.multimodal import find_text_model
from ringattn.types import Group


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
    """Runs a model's attention over the ranks of a group; returns the handle that shards its batches.

    Only this model changes: it gets copies of its configs, which select the attention implementation "ringattn".
    Vision and audio towers keep their attention. The mask pattern (causal, window, chunks), softcap, sinks and head
    dims of each layer are honoured; an error names what is not supported.

    Args:
        model: a transformers model, or a peft or DDP wrapper of one.
        group_or_mesh: as in `context_parallel_attention`.
        layout: "contiguous", "zigzag" or "striped"; "balanced" for the mask of each batch; or a function of
            (seq_len, world_size).
        exchange: as in `context_parallel_attention`.
        backend: the kernel, as in `context_parallel_attention`.
        tile_mlp: number of tiles of each MLP, forward and backward; one tile's activations are held at a time, as in
            `tiled`. Experts are not tiled. None does not tile.
        chunk_loss: number of rows whose logits are held at a time when labels are given, as in
            `chunked_cross_entropy`; the output then has no logits. None holds all logits.
    Raises:
        ArgumentError: when the model mixes tokens by anything but attention that can be replaced, or is patched
            already.
    Communication: none. Each forward pass then communicates in its attention layers.
    """
    pretrained = unwrap_model(model)
    text_model = find_text_model(pretrained)
    facts = model_facts(pretrained, is_multimodal=text_model is not None)
    sharder = BatchSharder(facts, rank_mesh(group_or_mesh), group_or_mesh, layout, exchange, backend)
    savings = MemorySavings(model, tile_mlp=tile_mlp, chunk_loss=chunk_loss)
    check_model(pretrained)
    _check_unpatched(pretrained)

    handle = Handle(model, sharder)
    copy_configs(pretrained)
    _select_attention(pretrained, handle.undo)
    hooks = [*ForwardHooks(handle, pretrained, text_model).register(), *GenerateHooks(handle, pretrained).register()]
    for hook in hooks:
        handle.undo.callback(hook.remove)
    savings.apply()
    handle.undo.callback(savings.undo)
    return handle


def _check_unpatched(model: PreTrainedModel) -> None:
    hooks = model._forward_pre_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), ForwardHooks) for hook in hooks):
        raise ArgumentError(f"model={type(model).__name__}: is patched already; call its handle's unpatch() first")


def _select_attention(model: PreTrainedModel, undo: ExitStack) -> None:
    """Selects our attention implementation in the configs of the model; `undo` selects the previous one."""
    configs = [getattr(module, "config", None) for module in text_modules(model)]
    for config in {id(config): config for config in configs if isinstance(config, PreTrainedConfig)}.values():
        undo.callback(setattr, config, "_attn_implementation_internal", config._attn_implementation)
        config._attn_implementation_internal = IMPLEMENTATION
