"""The hooks by which the forward passes of a patched model meet a RingCache that they are given.

Before a pass, its arguments are read, and exchanged for those of this rank. After it, the logits that were asked for
are gathered.
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
    """The forward passes of one model on caches.

    Args:
        handle: of the patched model.
        model: what has `generate`, and takes `past_key_values`.
    """

    def __init__(self, handle: Handle, model: nn.Module) -> None:
        self._handle, self._model = handle, model
        self._parameters = tuple(inspect.signature(model.forward).parameters)
        self._context = ExitStack()

    def register(self) -> list[RemovableHandle]:
        """Registers the hooks on the model; returns the handles that remove them."""
        return [
            self._model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            self._model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        cache = arguments.get("past_key_values")
        if not isinstance(cache, RingCache):
            return None
        if cache.handle is not self._handle:
            raise ArgumentError("past_key_values: this RingCache was made from the handle of another model")
        self._context.close()  # of a pass that was interrupted
        cache.abandon()
        tokens = read_inputs(arguments, cache.past)
        given = cache.begin(tokens, keeps="logits_to_keep" in self._parameters)
        self._context.enter_context(self._handle.using(cache))
        for name in ("attention_mask", "cache_position"):
            arguments.pop(name, None)
        return (), {**arguments, **given}

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, RingCache):
            return None
        self._context.close()
        try:
            if output is None:  # the pass has failed
                return None
            if getattr(output, "hidden_states", None) is not None:
                raise ArgumentError("output_hidden_states: each rank has those of its own tokens; leave it out")
            output.logits = cache.finish(output.logits)
            return output
        finally:
            cache.abandon()
