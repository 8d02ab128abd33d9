"""Cross-entropy of a linear output head in chunks of rows, so that the logits are never held whole.

At a long context the logits, (rows, V), are the largest tensor of a training step.
"""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.errors import ArgumentError, ArgumentTypeError, check_integer

Reduction = Literal["mean", "sum"]

# Vocabulary entries per matrix product: bounds the temporary copies of weights and of their gradients in another dtype.
VOCAB_CHUNK = 16384


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
    """Returns F.cross_entropy(F.linear(hidden, weight, bias), labels), with the logits of `chunk` rows at a time.

    The forward also computes the gradients, chunk by chunk, while a chunk's logits are in memory, so no matrix product
    is computed twice. Until the backward it holds one gradient of the size of `hidden`, and one of `weight` in fp32.
    Inputs that require no gradient cost nothing.

    Each rank calls it for its own rows. With num_items set to the number of valid labels on all ranks, the sum of the
    ranks' losses is the loss of the whole batch, and a rank without a valid label contributes 0.

    Under autocast, hidden, weight and bias are cast as for a linear layer.

    Args:
        hidden: (..., rows, E), fp16/bf16/fp32/fp64; any number of rows, including 0.
        weight: (V, E), hidden.dtype.
        labels: (..., rows), integers in [0, V), or ignore_index.
        bias: (V,), hidden.dtype.
        chunk: number of rows whose logits are held at a time: a buffer of chunk * V in fp32 (float64 for float64), and
            a second one with softcap.
        ignore_index: the label of rows that do not count.
        reduction: "sum", or "mean": the sum divided by num_items.
        num_items: the divisor of "mean"; None for the number of valid labels in `labels`, at least 1.
        scale: a factor on the logits (Cohere, Granite).
        softcap: logits become softcap * tanh(logits / softcap), after the scale (Gemma 2).
    Returns:
        The loss, a scalar in fp32 (float64 for float64). Exact; sums over rows are in fp32.
    Raises:
        ArgumentError: when shapes or dtypes do not match, or an option is invalid.
    Communication: none.
    Source: gradients computed with the loss, chunk by chunk, are the idea of Hsu et al. 2024, arXiv:2410.10989.
    """
    _check(hidden, weight, labels, bias, chunk)
    if reduction not in get_args(Reduction):
        raise ArgumentError(f"reduction={reduction!r}: must be one of {', '.join(get_args(Reduction))}")
    if reduction == "sum" and num_items is not None:
        raise ArgumentError(f'num_items={num_items!r}: reduction="sum" does not divide; pass reduction="mean"')
    if softcap is not None and not softcap > 0:
        raise ArgumentError(f"softcap={softcap!r}: must be positive, or None")
    labels = labels.reshape(-1).long()
    total = cast(
        Tensor,
        _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            bias,
            labels,
            _ChunkLoss(chunk, ignore_index, scale, softcap),
            torch.is_grad_enabled(),
        ),
    )
    if reduction == "sum":
        return total
    if num_items is None:
        num_items = (labels != ignore_index).sum().clamp_(min=1)
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


class _ChunkLoss:
    """The loss of one chunk of rows, and its gradient with respect to the logits."""

    def __init__(self, chunk: int, ignore_index: int, scale: float, softcap: float | None) -> None:
        self.chunk, self.ignore_index, self.scale, self.softcap = chunk, ignore_index, scale, softcap

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sum of the losses, and its gradient with respect to `logits`, which overwrites `logits`."""
        softcap_grad: Tensor | None = None
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_()
            softcap_grad = 1 - logits.square()
            logits.mul_(self.softcap)
        valid = labels != self.ignore_index
        target = labels.where(valid, 0)[:, None]
        target_logit = logits.gather(1, target)
        max_logit = logits.amax(1, keepdim=True)
        # One buffer holds, in turn, logits, exponentials, probabilities and gradients.
        sum_exp = logits.sub_(max_logit).exp_().sum(1, keepdim=True)
        losses = max_logit + sum_exp.log() - target_logit
        loss_sum = losses[:, 0].where(valid, 0).sum()
        logits.div_(sum_exp).scatter_add_(1, target, torch.full_like(target_logit, -1.0))
        if softcap_grad is not None:
            logits.mul_(softcap_grad)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return loss_sum, logits.masked_fill_(~valid[:, None], 0)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of the losses of all valid rows. The forward computes the gradients; the backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk_loss: _ChunkLoss,
        grad_enabled: bool,
    ) -> Tensor:
        device = hidden.device
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device.type)
        acc_dtype = torch.promote_types(dtype, torch.float32)
        needs_grad = [grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        dhidden = torch.empty_like(hidden) if needs_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=acc_dtype) if needs_grad[1] else None
        dbias = torch.zeros_like(bias, dtype=acc_dtype) if needs_grad[2] and bias is not None else None
        loss_sum = torch.zeros((), dtype=acc_dtype, device=device)
        vocab_chunks = [slice(start, start + VOCAB_CHUNK) for start in range(0, len(weight), VOCAB_CHUNK)]
        with torch.autocast(device.type, enabled=False):
            for start in range(0, len(hidden), chunk_loss.chunk):
                rows = slice(start, start + chunk_loss.chunk)
                x = hidden[rows].to(dtype)
                logits = torch.empty(len(x), len(weight), dtype=acc_dtype, device=device)
                for vocab in vocab_chunks:
                    _multiply(logits[:, vocab], x, weight[vocab].T, dtype, beta=0.0)
                if bias is not None:
                    logits += bias.to(dtype)
                loss, dlogits = chunk_loss(logits, labels[rows])
                loss_sum += loss
                if dbias is not None:
                    dbias += dlogits.sum(0)
                if dweight is not None:
                    for vocab in vocab_chunks:
                        _multiply(dweight[vocab], dlogits[:, vocab].T, x, dtype)
                if dhidden is not None:
                    dx = torch.zeros_like(x, dtype=acc_dtype)
                    for vocab in vocab_chunks:
                        _multiply(dx, dlogits[:, vocab], weight[vocab], dtype)
                    dhidden[rows] = dx
        ctx.gradients = (dhidden, dweight, dbias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of chunked_cross_entropy were freed by the first backward")
        # Scale half precision in fp32: 1 / num_items for a million tokens underflows in fp16.
        scaled = [
            None if x is None else (x.mul_(grad) if x.dtype == grad.dtype else x.to(grad.dtype).mul_(grad)).to(dtype)
            for x, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return *scaled, None, None, None


def _multiply(total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, beta: float = 1.0) -> None:
    """Computes total = beta * total + a @ b in place, with factors in `dtype` and the sum in total.dtype."""
    if a.is_cuda and dtype != total.dtype:
        product = torch.mm(a.to(dtype), b.to(dtype), out_dtype=total.dtype)
        if beta:
            total += product
        else:
            total.copy_(product)
        return
    # Without out_dtype, a half-precision product would be rounded; on CPU it is not faster either.
    total.addmm_(a.to(total.dtype), b.to(dtype).to(total.dtype), beta=beta)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, chunk: int) -> None:
    given = {"hidden": hidden, "weight": weight, "labels": labels} | ({} if bias is None else {"bias": bias})
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise ArgumentTypeError(f"{name}={x!r:.100}: must be a tensor, not {type(x).__name__}")
    check_integer("chunk", chunk, 1)
    if not hidden.is_floating_point() or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ArgumentError(
            f"hidden is {hidden.dtype} and labels are {labels.dtype}: must be floating-point, and integers"
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
