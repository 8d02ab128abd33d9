"""Cross-entropy of a linear head without its logits, which at a long context are the largest tensor of all."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.errors import ArgumentError, ArgumentTypeError, check_integer

Reduction = Literal["mean", "sum"]

# Words that are multiplied at once, lest gradients, or weights in another dtype, be held twice.
WORDS_AT_ONCE = 16384


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int = 1024,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_items: Tensor | float | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Returns F.cross_entropy(F.linear(hidden, weight, bias), labels), holding the logits of `chunk` rows at a time.

    The gradients are computed along with the loss, while a chunk's logits are there: no product is done twice.
    Until the backward they take the place of hidden and weight once more, the weight's in fp32. What needs no gradient
    costs none. Each rank calls it for its own rows. Give it the number of valid labels of all ranks: then the sum of
    the ranks' losses is the loss of the whole batch, and a rank without a valid label adds 0.

    Under autocast, hidden, weight and bias are cast as for a linear layer.

    Args:
        hidden: (..., rows, E), fp16/bf16/fp32/fp64; any number of rows, 0 included.
        weight: (V, E), hidden.dtype.
        labels: (..., rows), integers: which word is right, or ignore_index.
        bias: (V,), hidden.dtype.
        chunk: rows whose logits are held at a time: chunk * V of them, in fp32 (float64 for float64), and one more
            such buffer with a softcap.
        ignore_index: the label of rows that do not count.
        reduction: "sum", or "mean": the sum divided by num_items.
        num_items: what "mean" divides by; None for the number of valid labels here, or 1 if there is none.
        scale: a factor on the logits (Cohere, Granite).
        softcap: logits become softcap * tanh(logits / softcap), after the scale (Gemma 2).
    Returns:
        The loss, a scalar in fp32 (float64 for float64). Exact; sums over rows are in fp32.
    Raises:
        ArgumentError: when shapes or dtypes do not go together, or an option has no meaning.
    Communication: none.
    Source: the idea of chunks whose gradients are made along with the loss is that of Hsu et al. 2024,
        arXiv:2410.10989.
    """
    _check(hidden, weight, labels, bias, chunk)
    if reduction not in get_args(Reduction):
        raise ArgumentError(f"reduction={reduction!r}: must be one of {', '.join(get_args(Reduction))}")
    if reduction == "sum" and num_items is not None:
        raise ArgumentError(f'num_items={num_items!r}: a sum is not divided; give reduction="mean"')
    if softcap is not None and not softcap > 0:
        raise ArgumentError(f"softcap={softcap!r}: must be positive, or None")
    labels = labels.reshape(-1).long()
    total = cast(
        Tensor,
        _Sum.apply(  # type: ignore[no-untyped-call]
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            bias,
            labels,
            _Terms(chunk, ignore_index, scale, softcap),
            torch.is_grad_enabled(),
        ),
    )
    if reduction == "sum":
        return total
    if num_items is None:
        num_items = (labels != ignore_index).sum().clamp_(min=1)
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


class _Terms:
    """The loss of one chunk, and how its logits should change."""

    def __init__(self, chunk: int, ignore_index: int, scale: float, softcap: float | None) -> None:
        self.chunk, self.ignore_index, self.scale, self.softcap = chunk, ignore_index, scale, softcap

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sum of the losses, and its gradient by the logits, which it overwrites."""
        slope: Tensor | None = None
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_()
            slope = 1 - logits.square()
            logits.mul_(self.softcap)
        valid = labels != self.ignore_index
        words = labels.where(valid, 0)[:, None]
        right = logits.gather(1, words)
        top = logits.amax(1, keepdim=True)
        # One buffer all along: logits, exponentials, probabilities, gradients.
        sums = logits.sub_(top).exp_().sum(1, keepdim=True)
        losses = top + sums.log() - right
        total = losses[:, 0].where(valid, 0).sum()
        logits.div_(sums).scatter_add_(1, words, torch.full_like(right, -1.0))
        if slope is not None:
            logits.mul_(slope)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return total, logits.masked_fill_(~valid[:, None], 0)


class _Sum(torch.autograd.Function):
    """The sum over all valid rows; its gradients are those of an incoming gradient of 1, and scaled when it comes."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        terms: _Terms,
        training: bool,
    ) -> Tensor:
        device = hidden.device
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device.type)
        acc = torch.promote_types(dtype, torch.float32)
        wanted = [training and needed for needed in ctx.needs_input_grad[:3]]
        dhidden = torch.empty_like(hidden) if wanted[0] else None
        dweight = torch.zeros_like(weight, dtype=acc) if wanted[1] else None
        dbias = torch.zeros_like(bias, dtype=acc) if wanted[2] and bias is not None else None
        total = torch.zeros((), dtype=acc, device=device)
        blocks = [slice(start, start + WORDS_AT_ONCE) for start in range(0, len(weight), WORDS_AT_ONCE)]
        with torch.autocast(device.type, enabled=False):
            for start in range(0, len(hidden), terms.chunk):
                rows = slice(start, start + terms.chunk)
                x = hidden[rows].to(dtype)
                logits = torch.empty(len(x), len(weight), dtype=acc, device=device)
                for words in blocks:
                    _multiply(logits[:, words], x, weight[words].T, dtype, beta=0.0)
                if bias is not None:
                    logits += bias.to(dtype)
                loss, dlogits = terms(logits, labels[rows])
                total += loss
                if dbias is not None:
                    dbias += dlogits.sum(0)
                if dweight is not None:
                    for words in blocks:
                        _multiply(dweight[words], dlogits[:, words].T, x, dtype)
                if dhidden is not None:
                    dx = torch.zeros_like(x, dtype=acc)
                    for words in blocks:
                        _multiply(dx, dlogits[:, words], weight[words], dtype)
                    dhidden[rows] = dx
        ctx.gradients = (dhidden, dweight, dbias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of chunked_cross_entropy were freed by the first backward")
        # Half precision is scaled in fp32: the factor of a loss over a million tokens has no place in fp16.
        scaled = [
            None if x is None else (x.mul_(grad) if x.dtype == grad.dtype else x.to(grad.dtype).mul_(grad)).to(dtype)
            for x, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return *scaled, None, None, None


def _multiply(total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, beta: float = 1.0) -> None:
    """Makes total = beta * total + a @ b of factors in `dtype`: logits are never rounded to half precision."""
    if a.is_cuda and dtype != total.dtype:
        product = torch.mm(a.to(dtype), b.to(dtype), out_dtype=total.dtype)
        if beta:
            total += product
        else:
            total.copy_(product)
        return
    # Elsewhere half precision is not faster, or its product is rounded.
    total.addmm_(a.to(total.dtype), b.to(dtype).to(total.dtype), beta=beta)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, chunk: int) -> None:
    given = {"hidden": hidden, "weight": weight, "labels": labels} | ({} if bias is None else {"bias": bias})
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise ArgumentTypeError(f"{name}={x!r:.100}: must be a tensor, not {type(x).__name__}")
    check_integer("chunk", chunk, 1)
    if not hidden.is_floating_point() or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ArgumentError(
            f"hidden is {hidden.dtype} and labels are {labels.dtype}: must be of a floating dtype, and integers"
        )
    if hidden.ndim < 1 or weight.ndim != 2 or weight.shape[1:] != hidden.shape[-1:]:
        raise ArgumentError(
            f"weight has shape {tuple(weight.shape)} for hidden of shape {tuple(hidden.shape)}: must be (V, E) for "
            "(..., rows, E)"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ArgumentError(f"labels have shape {tuple(labels.shape)}: must be {tuple(hidden.shape[:-1])}, as hidden")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ArgumentError(f"bias has shape {tuple(bias.shape)}: must be {tuple(weight.shape[:1])}, as weight")
    dtypes = {name: x.dtype for name, x in given.items() if name != "labels"}
    if len(set(dtypes.values())) > 1 and not torch.is_autocast_enabled(hidden.device.type):
        raise ArgumentError(f"dtypes differ, without autocast: {', '.join(f'{n} {d}' for n, d in dtypes.items())}")
