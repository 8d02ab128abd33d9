"""What links and devices are worth: the few numbers by which the time of a plan is predicted.

They are values that the caller holds and passes. Nothing is measured, and nothing is kept, behind their back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from ringattn.errors import ArgumentError, ArgumentTypeError, check_integer


@dataclass(frozen=True)
class Link:
    """The way from one rank to another: a message of n bytes takes latency_s + n / bytes_per_s.

    Args:
        latency_s: seconds until the first byte is there.
        bytes_per_s: bytes per second, in each direction.
    Raises:
        ArgumentError: when the latency is negative or infinite, or the bandwidth not positive.
    """

    latency_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        _check(self, may_be_zero=("latency_s",))

    def __str__(self) -> str:
        return f"{self.latency_s * 1e6:.3g} µs, {self.bytes_per_s / 1e9:.3g} GB/s"


@dataclass(frozen=True)
class Compute:
    """What one rank computes in a second.

    Args:
        flops_per_s: of the forward kernel, two for a multiplication and an addition, of allowed pairs only.
        backward_flops_per_s: the same of the backward kernel.
        copy_bytes_per_s: of copies within the device's memory.
        launch_s: seconds that a kernel call takes however small it is.
    Raises:
        ArgumentError: when a rate is not positive, or launch_s is negative.
    """

    flops_per_s: float
    backward_flops_per_s: float
    copy_bytes_per_s: float
    launch_s: float

    def __post_init__(self) -> None:
        _check(self, may_be_zero=("launch_s",))

    def __str__(self) -> str:
        return f"{self.flops_per_s / 1e12:.3g} TFLOP/s forward, {self.backward_flops_per_s / 1e12:.3g} backward"


@dataclass(frozen=True)
class CostModel:
    """What predictions are made from: the links, the device, and the memory there is for what is received.

    Args:
        link: between the ranks of a group; of a mesh of two axes, along the last one, which is the fast one.
        compute: of each rank.
        outer_link: along the first axis of a mesh; None is the same as `link`.
        buffer_bytes: how much a rank may hold of what it receives and sends; None is without limit.
    Raises:
        ArgumentError: when an argument has another type, or buffer_bytes is negative.
    """

    link: Link
    compute: Compute
    outer_link: Link | None = None
    buffer_bytes: int | None = None
    # From which `parse_cost_model` makes it again. A plain attribute: tracing guards what it reads.
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, kind in (("link", Link), ("compute", Compute), ("outer_link", Link)):
            value = getattr(self, name)
            if not isinstance(value, kind) and not (name == "outer_link" and value is None):
                raise ArgumentTypeError(f"{name}={value!r:.100}: must be a {kind.__name__}")
        limit = self.buffer_bytes
        if limit is not None:
            check_integer("buffer_bytes", limit, 0)
        parts: list[Link | Compute] = [self.link, self.compute]
        parts += [] if self.outer_link is None else [self.outer_link]
        numbers = [" ".join(float(getattr(part, f.name)).hex() for f in fields(part)) for part in parts]
        object.__setattr__(self, "text", "; ".join([str(limit), *numbers]))

    @property
    def links(self) -> tuple[Link, Link]:
        """The links of the (fast, slow) axis."""
        return self.link, self.link if self.outer_link is None else self.outer_link

    def __str__(self) -> str:
        outer = "" if self.outer_link is None else f"; outer link {self.outer_link}"
        limit = "" if self.buffer_bytes is None else f"; at most {self.buffer_bytes / 2**20:,.0f} MiB of buffers"
        return f"link {self.link}{outer}; {self.compute}{limit}"


def parse_cost_model(text: str) -> CostModel:
    """Returns the model whose text this is."""
    limit, *parts = text.split("; ")
    link, compute, *outer = ([float.fromhex(number) for number in part.split()] for part in parts)
    outer_link = Link(*outer[0]) if outer else None
    return CostModel(Link(*link), Compute(*compute), outer_link, None if limit == "None" else int(limit))


def _check(value: Link | Compute, may_be_zero: tuple[str, ...]) -> None:
    for entry in fields(value):
        number = getattr(value, entry.name)
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ArgumentTypeError(f"{entry.name}={number!r:.100}: must be a number, not {type(number).__name__}")
        if entry.name in may_be_zero and not (number >= 0 and math.isfinite(number)):
            raise ArgumentError(f"{entry.name}={number}: must be finite, 0 or more")
        if entry.name not in may_be_zero and not number > 0:
            raise ArgumentError(f"{entry.name}={number}: must be positive")
