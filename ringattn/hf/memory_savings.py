"""Memory around attention, in a model of transformers: MLPs in tiles, the loss without logits."""

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
    """What a model does with less memory, between `apply` and `undo`.

    Args:
        model: a transformers model, or one inside peft's or DDP's.
        tile_mlp: tiles of each MLP, forward and backward; None leaves them whole. See `tiled`. Experts are left as they
            are.
        chunk_loss: rows whose logits are held at a time wherever labels are given; None for all of them. The model's
            output then has a loss and no logits. See `chunked_cross_entropy`.
    Raises:
        ArgumentError: when the model has no MLP that can be tiled, or no loss that can be chunked.
    """

    def __init__(self, model: nn.Module, *, tile_mlp: int | None = None, chunk_loss: int | None = None) -> None:
        self._model = unwrap_model(model)
        self._num_tiles, self._chunk = tile_mlp, chunk_loss
        self._mlps = [] if tile_mlp is None else list(_mlps(self._model))
        self._head = None if chunk_loss is None else _head(self._model)
        self._computes_loss = False
        self._before: list[tuple[nn.Module, Callable[..., Any] | None]] = []
        self._hooks: list[RemovableHandle] = []

    def apply(self) -> None:
        """Changes the model; nothing else."""
        if self._num_tiles is not None:
            for mlp in self._mlps:
                self._set_forward(mlp, partial(tiled, mlp, num_tiles=self._num_tiles, forward=mlp.forward))
        if self._head is not None:
            self._set_forward(self._head, partial(self._defer, self._head, self._head.forward))
            self._model.loss_function = partial(self._loss, self._model.loss_function)
            self._hooks = [
                self._model.register_forward_pre_hook(self._begin, with_kwargs=True),
                self._model.register_forward_hook(self._end, always_call=True),
            ]

    def undo(self) -> None:
        """Takes it all back. A second time does nothing."""
        for module, before in self._before:
            del module.forward
            if before is not None:
                module.forward = before
        if self._hooks:
            del self._model._loss_function
        for hook in self._hooks:
            hook.remove()
        self._before, self._hooks = [], []

    def _set_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Puts a forward of its own before that of a module's class: the module's hooks fire around it, once."""
        self._before.append((module, vars(module).get("forward")))
        module.forward = forward

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
        self._computes_loss = given.get("labels") is not None

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Takes the logits, which were never there, out of what the model returns."""
        self._computes_loss = False
        if isinstance(output, ModelOutput):
            return type(output)(**{name: x for name, x in output.items() if not isinstance(x, ChunkedLogits)})
        if isinstance(output, tuple):
            return tuple(x for x in output if not isinstance(x, ChunkedLogits))
        return output

    def _defer(self, head: nn.Linear, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor | ChunkedLogits:
        return ChunkedLogits(hidden, head) if self._computes_loss else forward(hidden)

    def _loss(
        self, original: Callable[..., Tensor], logits: Tensor | ChunkedLogits, labels: Tensor, *args: Any, **kw: Any
    ) -> Any:
        """In the place of the model's loss function; what else that one is given, it does not use either."""
        if not isinstance(logits, ChunkedLogits):
            return original(logits, labels, *args, **kw)
        words: Tensor | None = kw.get("shift_labels")
        if words is None:
            words = labels
            if original is ForCausalLMLoss:
                words = torch.full_like(labels, IGNORED_LABEL)
                words[..., :-1] = labels[..., 1:]
        assert self._chunk is not None
        return logits.cross_entropy(
            words, self._chunk, kw.get("ignore_index", IGNORED_LABEL), kw.get("num_items_in_batch")
        )


class ChunkedLogits:
    """Logits that are not computed: what they would be made of, and what the model has done to them since.

    They are slope * hidden @ weight.T + bias, or cap * tanh of that.
    """

    def __init__(self, hidden: Tensor, head: nn.Linear, slope: float = 1.0, cap: float | None = None) -> None:
        self.hidden, self.head, self.slope, self.cap = hidden, head, slope, cap

    def __mul__(self, factor: float) -> ChunkedLogits:
        if isinstance(factor, Tensor) and factor.requires_grad:
            _refuse("a product with a trained factor")
        if self.cap is None:
            return ChunkedLogits(self.hidden, self.head, self.slope * float(factor))
        return ChunkedLogits(self.hidden, self.head, self.slope, self.cap * float(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> ChunkedLogits:
        return self * (1 / divisor)

    def float(self) -> ChunkedLogits:
        """Returns the same: the loss is computed in fp32."""
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> ChunkedLogits:
        (logits, *others) = args
        if func is not torch.tanh or others or kwargs or logits.cap is not None:
            _refuse(f"torch.{getattr(func, '__name__', func)}")
        return ChunkedLogits(logits.hidden, logits.head, logits.slope, 1.0)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        _refuse(name)

    def __getitem__(self, index: object) -> NoReturn:
        _refuse("a part of them")

    def cross_entropy(self, labels: Tensor, chunk: int, ignore_index: int, num_items: Any) -> Tensor:
        """Returns the loss, by chunks of rows."""
        weight = self.head.weight
        if isinstance(weight, DTensor):
            raise ArgumentError(
                f"chunk_loss={chunk}: the output head is a unit of fully_shard by itself, and its weight is gone when "
                "the loss is computed; leave it to the root, fully_shard(model)"
            )
        return chunked_cross_entropy(
            self.hidden,
            weight,
            labels.to(self.hidden.device),
            bias=self.head.bias,
            chunk=chunk,
            ignore_index=ignore_index,
            num_items=num_items,
            scale=self.slope if self.cap is None else self.slope * self.cap,
            softcap=self.cap,
        )


def _refuse(what: str) -> NoReturn:
    raise ArgumentError(
        f"chunk_loss is on, and the model asks its logits for {what}: they are never held, only scaled, capped and "
        "given to the loss; patch this model without chunk_loss"
    )


def _mlps(model: PreTrainedModel) -> Iterator[nn.Module]:
    seen = []
    found = False
    for module in text_modules(model):
        name = type(module).__name__
        if not name.endswith(("MLP", "FeedForward")):
            continue
        seen.append(name)
        if _takes_rows(module):
            found = True
            yield module
    if not found:
        raise ArgumentError(
            f"tile_mlp: {type(model).__name__} has no MLP made of linear layers alone (found {sorted(set(seen))}); "
            "leave tile_mlp out, and use ringattn.memory.tiled in the model's own code"
        )


def _takes_rows(module: nn.Module) -> bool:
    """Whether a module is made of linear layers alone, and takes one tensor."""
    parameters = inspect.signature(module.forward).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    holders = [part for part in module.modules() if next(part.parameters(recurse=False), None) is not None]
    return len(needed) == 1 and all(isinstance(part, (nn.Linear, Conv1D)) for part in holders)


def _head(model: PreTrainedModel) -> nn.Linear:
    name = type(model).__name__
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is not nn.Linear:
        raise ArgumentError(
            f"chunk_loss: the output head of {name} is {type(head).__name__}, and must be nn.Linear; leave chunk_loss "
            "out, or leave the head out of what peft adapts"
        )
    if model.loss_function not in (ForCausalLMLoss, ForMaskedLMLoss) or not model_facts(model).takes_num_items:
        raise ArgumentError(
            f"chunk_loss: {name} does not take its loss from transformers' cross-entropy over words; leave chunk_loss "
            "out, and use ringattn.memory.chunked_cross_entropy on its hidden states"
        )
    return head
