"""float64 throughout: models of transformers compute norms, softmax and losses in fp32, whatever their dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Exact(TorchFunctionMode):
    """A torch function mode in which casts to fp32 become casts to float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        given = {name: _exact(value) for name, value in (kwargs or {}).items()}
        return func(*map(_exact, args), **given)


def exact_in(dtype: torch.dtype) -> AbstractContextManager[object]:
    """Returns `Exact` for float64, and a context that changes nothing for other dtypes."""
    return Exact() if dtype is torch.float64 else nullcontext()


def _exact(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
