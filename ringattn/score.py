"""The score: what happens to q·k before the softmax, and to the weights after it. One value for every option.

A call makes one `Score` at the edge. It is carried whole through attention, the compiled operator, the cache and the
models, down to the kernels, which take what they support and refuse the rest by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ringattn.errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Score:
    """The options of a score. Two are equal if their numbers and their `terms` are; tensors are not compared.

    Args:
        scale: factor on q·k before the softmax, dimensionless; None is head_dim ** -0.5.
        softcap: scores become softcap * tanh(score / softcap); None leaves them.
        sink: (H,) learned logits that take part in each row's denominator; None has none. Kernels do not see it: it is
            added once, after all keys.
    """

    scale: float | None = None
    softcap: float | None = None
    sink: Tensor | None = None

    @property
    def factor(self) -> float:
        """The scale, once `resolve` has made it a number."""
        assert self.scale is not None, "a score must be resolved before a kernel takes it"
        return self.scale

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors that may require gradients, in a fixed order."""
        return (self.sink,)

    def terms(self) -> frozenset[str]:
        """Returns the names of the terms that a kernel must compute besides the scale. The sink is not one of them."""
        return frozenset() if self.softcap is None else frozenset({"softcap"})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Score) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[float | None, float | None, frozenset[str]]:
        return self.scale, self.softcap, self.terms()

    def signature(self) -> tuple[object, ...]:
        """Returns what decides a call apart from the contents of the tensors; hashable if the options are."""
        looks = (
            getattr(self.sink, "shape", None),
            getattr(self.sink, "dtype", None),
            getattr(self.sink, "device", None),
        )
        return (type(self.scale), self.scale, type(self.softcap), self.softcap, type(self.sink), looks)

    def options(self) -> dict[str, Any]:
        """Returns the options as keyword arguments of the public attention functions."""
        return {"scale": self.scale, "softcap": self.softcap, "sink": self.sink}

    def resolve(self, head_dim: int) -> Score:
        """Returns the score with numbers checked and the default scale filled in.

        Raises:
            ArgumentError: when a number is not finite, or softcap is not positive.
        """
        scale = head_dim**-0.5 if self.scale is None else check_number("scale", self.scale)
        softcap = None if self.softcap is None else check_number("softcap", self.softcap)
        if softcap is not None and softcap <= 0:
            raise ArgumentError(f"softcap={softcap}: must be positive, or None")
        return replace(self, scale=scale, softcap=softcap)

    def of_heads(self, heads: range) -> Score:
        """Returns the score of some consecutive query heads."""
        if self.sink is None:
            return self
        return replace(self, sink=self.sink[heads.start : heads.stop])

    def describe(self) -> Mapping[str, str]:
        """Returns what all ranks must have in common, as (name, text)."""
        sink = self.sink
        return {
            "scale": repr(self.scale),
            "softcap": repr(self.softcap),
            "sink": "None" if sink is None else f"{tuple(sink.shape)} {sink.dtype}",
        }


def check_number(name: str, value: object) -> float:
    """Returns `value` as a float if it is a finite number; raises ArgumentError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(f"{name}={value!r:.100}: must be a number or None, not {type(value).__name__}")
    if not math.isfinite(value):
        raise ArgumentError(f"{name}={value}: must be finite")
    return float(value)
