"""Hooks around the forward passes of a patched model whose past_key_values is a RingCache.

The pre-hook replaces the arguments by the local ones of this rank; the hook replaces the logits by the gathered ones.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ringattn.errors import ArgumentError
from ringattn.hf.generation_inputs import read_inputs
from ringattn.hf.handle import Handle
from ringattn.hf.ring_cache import RingCache


class GenerateHooks:
    """The hooks of one patched model.

    Args:
        handle: the handle of the model.
        model: the model that has `generate`.
    """

    def __init__(self, handle: Handle, model: nn.Module) -> None:
        self._handle, self._model = handle, model
        self._parameters = tuple(inspect.signature(model.forward).parameters)
        self._active_context = ExitStack()

    def register(self) -> list[RemovableHandle]:
        """Registers the hooks on the model; returns the handles that remove them."""
        return [
            self._model.register_forward_pre_hook(self._begin_forward, with_kwargs=True, prepend=True),
            self._model.register_forward_hook(self._finish_forward, with_kwargs=True, always_call=True),
        ]

    def _begin_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        cache = arguments.get("past_key_values")
        if not isinstance(cache, RingCache):
            return None
        if cache.handle is not self._handle:
            raise ArgumentError(
                "past_key_values: this RingCache was made from the handle of another model; make one from the handle "
                "of this model"
            )
        self._active_context.close()  # of a pass that was interrupted before its hook ran
        cache.abort_forward()
        inputs = read_inputs(arguments, cache.past)
        local_inputs = cache.begin_forward(inputs, takes_logits_to_keep="logits_to_keep" in self._parameters)
        self._active_context.enter_context(self._handle.using(cache))
        for name in ("attention_mask", "cache_position"):
            arguments.pop(name, None)
        return (), {**arguments, **local_inputs}

    def _finish_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, RingCache):
            return None
        self._active_context.close()
        try:
            if output is None:  # the forward raised
                return None
            if getattr(output, "hidden_states", None) is not None:
                raise ArgumentError(
                    "output_hidden_states=True: not supported with a RingCache, since each rank has the hidden states "
                    "of its own tokens; leave it out"
                )
            output.logits = cache.finish_forward(output.logits)
            return output
        finally:
            cache.abort_forward()
