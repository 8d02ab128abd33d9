"""Saves memory around the attention of a transformers model: tiled MLPs, and a loss that never holds all logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import ModelOutput

from ringattn.attention.sharding import IGNORED_LABEL
from ringattn.errors import ArgumentError
from ringattn.hf.model_support import model_facts, text_modules, unwrap_model
from ringattn.memory import chunked_cross_entropy, tiled


class MemorySavings:
    """Tiles the MLPs of a model and chunks its loss, between `apply` and `undo`.

    Args:
        model: a transformers model, or a peft or DDP wrapper of one.
        tile_mlp: number of tiles of each MLP, forward and backward, as in `tiled`; None does not tile. Experts are not
            tiled.
        chunk_loss: number of rows whose logits are held at a time when labels are given, as in
            `chunked_cross_entropy`; the model's output then has no logits. None holds all logits.
    Raises:
        ArgumentError: when the model has no MLP that can be tiled, or no loss that can be chunked.
    """

    def __init__(self, model: nn.Module, *, tile_mlp: int | None = None, chunk_loss: int | None = None) -> None:
        self._model = unwrap_model(model)
        self._num_tiles, self._chunk_size = tile_mlp, chunk_loss
        self._mlps = [] if tile_mlp is None else list(_find_mlps(self._model))
        self._output_head = None if chunk_loss is None else _find_output_head(self._model)
        self._computes_loss = False
        self._original_forwards: list[tuple[nn.Module, Callable[..., Any] | None]] = []
        self._hooks: list[RemovableHandle] = []

    def apply(self) -> None:
        """Changes the model."""
        if self._num_tiles is not None:
            for mlp in self._mlps:
                self._set_forward(mlp, partial(tiled, mlp, num_tiles=self._num_tiles, forward=mlp.forward))
        if self._output_head is not None:
            self._set_forward(
                self._output_head, partial(self._defer_logits, self._output_head, self._output_head.forward)
            )
            self._model.loss_function = partial(self._chunked_loss, self._model.loss_function)
            self._hooks = [
                self._model.register_forward_pre_hook(self._begin_forward, with_kwargs=True),
                self._model.register_forward_hook(self._end_forward, always_call=True),
            ]

    def undo(self) -> None:
        """Restores the model. A second call does nothing."""
        for module, original in self._original_forwards:
            del module.forward
            if original is not None:
                module.forward = original
        if self._hooks:
            del self._model._loss_function
        for hook in self._hooks:
            hook.remove()
        self._original_forwards, self._hooks = [], []

    def _set_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Overrides the forward of one module; its hooks still run, once."""
        self._original_forwards.append((module, vars(module).get("forward")))
        module.forward = forward

    def _begin_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
        self._computes_loss = arguments.get("labels") is not None

    def _end_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Removes the placeholder of the logits from the model's output."""
        self._computes_loss = False
        if isinstance(output, ModelOutput):
            return type(output)(**{name: x for name, x in output.items() if not isinstance(x, ChunkedLogits)})
        if isinstance(output, tuple):
            return tuple(x for x in output if not isinstance(x, ChunkedLogits))
        return output

    def _defer_logits(
        self, head: nn.Linear, forward: Callable[[Tensor], Tensor], hidden: Tensor
    ) -> Tensor | ChunkedLogits:
        return ChunkedLogits(hidden, head) if self._computes_loss else forward(hidden)

    def _chunked_loss(
        self,
        loss_function: Callable[..., Tensor],
        logits: Tensor | ChunkedLogits,
        labels: Tensor,
        *args: Any,
        **kw: Any,
    ) -> Any:
        """Replaces the model's loss function; arguments that it ignores are ignored here, too."""
        if not isinstance(logits, ChunkedLogits):
            return loss_function(logits, labels, *args, **kw)
        targets: Tensor | None = kw.get("shift_labels")
        if targets is None:
            targets = labels
            if loss_function is ForCausalLMLoss:
                targets = torch.full_like(labels, IGNORED_LABEL)
                targets[..., :-1] = labels[..., 1:]
        assert self._chunk_size is not None
        return logits.cross_entropy(
            targets, self._chunk_size, kw.get("ignore_index", IGNORED_LABEL), kw.get("num_items_in_batch")
        )


class ChunkedLogits:
    """A placeholder of logits that are not computed. It records how the model scales and caps them.

    The logits are scale * head(hidden), or softcap * tanh(scale * head(hidden)).

    Args:
        hidden: (B, rows, hidden_size), the input of the output head.
        head: the output head.
        scale: factor on the output of the head.
        softcap: factor on tanh; None if there is no tanh.
    """

    def __init__(self, hidden: Tensor, head: nn.Linear, scale: float = 1.0, softcap: float | None = None) -> None:
        self.hidden, self.head, self.scale, self.softcap = hidden, head, scale, softcap

    def __mul__(self, factor: float) -> ChunkedLogits:
        if isinstance(factor, Tensor) and factor.requires_grad:
            _raise_unsupported("a product with a trained factor")
        if self.softcap is None:
            return ChunkedLogits(self.hidden, self.head, self.scale * float(factor))
        return ChunkedLogits(self.hidden, self.head, self.scale, self.softcap * float(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> ChunkedLogits:
        return self * (1 / divisor)

    def float(self) -> ChunkedLogits:
        """Returns itself: the loss is computed in fp32 anyway."""
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> ChunkedLogits:
        (logits, *others) = args
        if func is not torch.tanh or others or kwargs or logits.softcap is not None:
            _raise_unsupported(f"torch.{getattr(func, '__name__', func)}")
        return ChunkedLogits(logits.hidden, logits.head, logits.scale, 1.0)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        _raise_unsupported(name)

    def __getitem__(self, index: object) -> NoReturn:
        _raise_unsupported("a slice")

    def cross_entropy(self, labels: Tensor, chunk_size: int, ignore_index: int, num_items: Any) -> Tensor:
        """Returns the loss, computed in chunks of rows.

        Args:
            labels: (B, rows), already shifted.
            chunk_size: rows whose logits are held at a time.
            ignore_index: label that is ignored.
            num_items: what the sum is divided by; None is the number of valid labels.
        Raises:
            ArgumentError: when FSDP shards the output head as a unit of its own.
        """
        weight = self.head.weight
        if isinstance(weight, DTensor):
            raise ArgumentError(
                f"chunk_loss={chunk_size}: the output head is a unit of fully_shard by itself, so its weight is "
                "sharded again when the loss is computed; leave it to the root, fully_shard(model)"
            )
        return chunked_cross_entropy(
            self.hidden,
            weight,
            labels.to(self.hidden.device),
            bias=self.head.bias,
            chunk=chunk_size,
            ignore_index=ignore_index,
            num_items=num_items,
            scale=self.scale if self.softcap is None else self.scale * self.softcap,
            softcap=self.softcap,
        )


def _raise_unsupported(operation: str) -> NoReturn:
    raise ArgumentError(
        f"chunk_loss: the model asks its logits for {operation}, but they are never held as a whole, only scaled, "
        "capped and passed to the loss; patch this model without chunk_loss"
    )


def _find_mlps(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Yields the MLPs that can be tiled; raises ArgumentError if there is none."""
    names = []
    found = False
    for module in text_modules(model):
        name = type(module).__name__
        if not name.endswith(("MLP", "FeedForward")):
            continue
        names.append(name)
        if _is_row_wise(module):
            found = True
            yield module
    if not found:
        raise ArgumentError(
            f"tile_mlp: {type(model).__name__} has no MLP made of linear layers alone (found {sorted(set(names))}); "
            "leave tile_mlp out, and use ringattn.memory.tiled in the model's own code"
        )


def _is_row_wise(module: nn.Module) -> bool:
    """Returns whether a module takes one tensor, and has no parameters outside linear layers."""
    parameters = inspect.signature(module.forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    parts = [part for part in module.modules() if next(part.parameters(recurse=False), None) is not None]
    return len(required) == 1 and all(isinstance(part, (nn.Linear, Conv1D)) for part in parts)


def _find_output_head(model: PreTrainedModel) -> nn.Linear:
    """Returns the output head of a model whose loss can be chunked; raises ArgumentError if it cannot."""
    name = type(model).__name__
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is not nn.Linear:
        raise ArgumentError(
            f"chunk_loss: the output head of {name} is {type(head).__name__}, but must be nn.Linear; leave chunk_loss "
            "out, or exclude the head from the modules that peft adapts"
        )
    if model.loss_function not in (ForCausalLMLoss, ForMaskedLMLoss) or not model_facts(model).takes_num_items:
        raise ArgumentError(
            f"chunk_loss: {name} does not take its loss from ForCausalLMLoss or ForMaskedLMLoss of transformers; leave "
            "chunk_loss out, and use ringattn.memory.chunked_cross_entropy on its hidden states"
        )
    return head
