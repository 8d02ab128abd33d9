"""Two ways to say that tensors agree: a fixed tolerance, and a rule that follows what the dtype allows."""

from __future__ import annotations

import torch
from torch import Tensor

# Roundings of the largest value that a result may be off by, however exact plain PyTorch is: in float64 it is
# the oracle itself, and a correct merge of three blocks measures up to 5 there, in the gradient of q.
FLOOR_FACTOR = 16.0


def assert_close(actual: Tensor, expected: Tensor, *, atol: float, name: str, check_dtype: bool = True) -> None:
    """Fail unless every element is within `atol`. NaN never passes; an infinity must be met exactly."""
    __tracebackhide__ = True
    _check_comparable(actual, expected, name=name, check_dtype=check_dtype)
    _check_error(actual, expected, atol, name=name, rule=f"atol = {atol:.3g}")


def assert_within_rule(
    actual: Tensor,
    expected64: Tensor,
    plain: Tensor,
    *,
    name: str,
    floor_factor: float = FLOOR_FACTOR,
    check_dtype: bool = True,
    terms: Tensor | None = None,
) -> None:
    """Fail unless max|actual - expected64| <= 2 max|plain - expected64| + floor_factor eps max|expected64|.

    `plain` is what plain PyTorch gives in the same dtype, and eps is that of `actual`'s dtype. With
    `check_dtype=False`, `actual` may have another dtype than `plain` (an fp32 lse of bf16 inputs). Where terms cancel,
    plain PyTorch may be exact by luck: then `terms`, the sizes of what is summed up, stand for `expected64` in the
    floor, and the factor is 1.
    """
    __tracebackhide__ = True
    _check_comparable(actual, plain, name=name, check_dtype=check_dtype)
    _check_comparable(plain, expected64, name=f"plain {name}", check_dtype=False)
    if expected64.dtype != torch.float64:
        raise AssertionError(f"{name}: expected64 must be float64, is {expected64.dtype}")
    plain_error = float(_errors(plain, expected64).max()) if plain.numel() else 0.0
    if not plain_error < torch.inf:
        raise AssertionError(f"{name}: plain PyTorch is not finite where the oracle is, so anything would be allowed")
    finite = expected64[expected64.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    floor = floor_factor * torch.finfo(actual.dtype).eps * largest
    if terms is not None and terms.numel():
        floor = max(floor, torch.finfo(actual.dtype).eps * float(terms.max()))
    rule = f"2 x plain's {plain_error:.3g} + floor {floor:.3g}"
    _check_error(actual, expected64, 2 * plain_error + floor, name=name, rule=rule)


def _check_comparable(actual: Tensor, expected: Tensor, *, name: str, check_dtype: bool) -> None:
    __tracebackhide__ = True
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if check_dtype and actual.dtype != expected.dtype:
        raise AssertionError(f"{name}: dtype {actual.dtype}, expected {expected.dtype}")
    if expected.isnan().any():
        raise AssertionError(f"{name}: what it is compared with has NaN, which proves nothing")


def _check_error(actual: Tensor, expected: Tensor, allowed: float, *, name: str, rule: str) -> None:
    __tracebackhide__ = True
    if not actual.numel():
        return
    errors = _errors(actual, expected)
    flat = int(errors.argmax())
    if float(errors.flatten()[flat]) <= allowed:
        return
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), errors.shape))
    wrong = int((errors > allowed).sum())
    raise AssertionError(
        f"{name}{list(where)} = {float(actual[where]):.9g}, expected {float(expected[where]):.9g}: "
        f"error {float(errors[where]):.3g}, allowed {allowed:.3g} ({rule}); "
        f"{wrong} of {actual.numel()} elements are off, the worst is shown"
    )


def _errors(actual: Tensor, expected: Tensor) -> Tensor:
    """|actual - expected| in float64 on the CPU; inf where there is NaN, or an infinity on one side only."""
    a, b = actual.detach().cpu().double(), expected.detach().cpu().double()
    return torch.where(a == b, 0.0, (a - b).abs().nan_to_num(nan=torch.inf, posinf=torch.inf))
