"""A module that treats rows one by one, run over tiles of rows, so that one tile's activations are held at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import get_device_states, set_device_states

from ringattn.errors import ArgumentError, ArgumentTypeError, check_integer

RowWise = Callable[[Tensor], Tensor]


def tiled(
    module: nn.Module,
    x: Tensor,
    *,
    num_tiles: int,
    forward: RowWise | None = None,
) -> Tensor:
    """Returns module(x), run over `num_tiles` tiles of rows, one after the other, forward and backward.

    Only x is kept for the backward, which runs each tile again. So at any time the activations of one tile are held,
    for the time of one more forward. The module must treat each row alone: an MLP, a norm, a projection, with dropout
    or without; the result is then the same, to rounding (dropout draws other masks than in one piece).

    Parameters get their gradients once, at the end of the module's backward, so hooks of DistributedDataParallel and
    `fully_shard` fire once, as without tiles. A unit of `fully_shard` may hold the whole module, or be the module when
    this runs inside its forward; it may not be a part of it. There are always `num_tiles` tiles, if need be without
    rows, so ranks may hold different numbers of rows and yet gather their parameters in step.

    Args:
        module: takes (rows, E) and returns (rows, F), any F.
        x: (..., rows, E), any number of rows, 0 included.
        num_tiles: how many tiles there are, the same on all ranks; they differ by one row at most.
        forward: what to call for a tile, if not the module: its own forward, where its hooks fire around all tiles.
    Returns:
        (..., rows, F). Gradients of half-precision parameters are summed over tiles in fp32, and then rounded once;
        others in their own dtype.
    Raises:
        ArgumentError: when num_tiles has no meaning, the module does not return a row for each row, a part of it is a
            unit of `fully_shard`, or it holds views of parameters (FullyShardedDataParallel).
    Communication: none but that of the module.
    Source: Bekman et al. 2025 (Arctic Long Sequence Training), arXiv:2506.13996.
    """
    if not isinstance(module, nn.Module):
        raise ArgumentTypeError(f"module={module!r:.100}: must be an nn.Module, not {type(module).__name__}")
    check_integer("num_tiles", num_tiles, 1)
    if x.ndim < 2:
        raise ArgumentError(f"x has shape {tuple(x.shape)}: must be (..., rows, E)")
    _check_parameters(module)
    job = _Job(module, module if forward is None else forward, num_tiles)
    rows = x.reshape(-1, x.shape[-1])
    if not torch.is_grad_enabled():
        return _like(job.run(rows), x)
    return _like(_Tiled.apply(rows, job, *job.parameters()), x)  # type: ignore[no-untyped-call]


def _like(rows: Tensor, x: Tensor) -> Tensor:
    return rows.view(*x.shape[:-1], rows.shape[-1])


@dataclass(frozen=True)
class _Job:
    module: nn.Module
    forward: RowWise
    num_tiles: int

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def run(self, x: Tensor) -> Tensor:
        """Runs all tiles without gradients, into one result."""
        out: Tensor | None = None
        done = 0
        for tile in x.tensor_split(self.num_tiles):
            part = self.forward(tile)
            if not isinstance(part, Tensor) or part.ndim != 2 or len(part) != len(tile):
                told = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise ArgumentError(
                    f"module={type(self.module).__name__} returned {told} for {len(tile)} rows: must be a row for each"
                )
            if out is None:
                out = part.new_empty(len(x), part.shape[1])
            out[done : done + len(tile)] = part
            done += len(tile)
        assert out is not None
        return out


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, job: _Job, *parameters: nn.Parameter) -> Tensor:
        ctx.job, ctx.setting = job, _Setting.of(x)
        # The parameters are saved for autograd to notice if they change; the backward takes them from the module.
        ctx.save_for_backward(x, *parameters)
        return job.run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, *_ = ctx.saved_tensors
        job: _Job = ctx.job
        parameters = job.parameters()
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        sums: list[Tensor | None] = [None] * len(parameters)
        tiles = zip(*(whole.tensor_split(job.num_tiles) for whole in (x, dout)), strict=True)
        done = 0
        with ctx.setting.again(), torch.enable_grad():
            for rows, drows in tiles:
                rows = rows.detach().requires_grad_(dx is not None)
                leaves = ([] if dx is None else [rows]) + parameters
                gradients = list(torch.autograd.grad(job.forward(rows), leaves, drows, allow_unused=True))
                if dx is not None:
                    first = gradients.pop(0)
                    dx[done : done + len(rows)] = 0 if first is None else first
                done += len(rows)
                _add(sums, gradients)
        given = [None if total is None else total.to(p.dtype) for total, p in zip(sums, parameters, strict=True)]
        return dx, None, *given


def _add(sums: list[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    for index, gradient in enumerate(gradients):
        if gradient is None:
            continue
        total = sums[index]
        if total is None:
            sums[index] = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        else:
            total += gradient


@dataclass(frozen=True)
class _Setting:
    """What a forward must find again to be run again: autocast, and the states of the random generators."""

    device_type: str
    autocast: bool
    dtype: torch.dtype
    generator: Tensor
    devices: tuple[list[int], list[Tensor]]

    @staticmethod
    def of(x: Tensor) -> _Setting:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind)
        return _Setting(kind, torch.is_autocast_enabled(kind), dtype, torch.get_rng_state(), get_device_states(x))

    @contextmanager
    def again(self) -> Iterator[None]:
        devices, states = self.devices
        kind = self.device_type if devices else "cuda"
        with (
            torch.random.fork_rng(devices, device_type=kind),
            torch.autocast(self.device_type, self.dtype, enabled=self.autocast),
        ):
            torch.set_rng_state(self.generator)
            set_device_states(devices, states, device_type=kind)
            yield


def _check_parameters(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if name and isinstance(part, FSDPModule):
            raise ArgumentError(
                f"module={type(module).__name__}: its part {name!r} is a unit of fully_shard, whose parameters come "
                "and go with every tile; make the whole module one unit, or a part of one"
            )
        if any(isinstance(value, Tensor) and value.requires_grad for value in vars(part).values()):
            raise ArgumentError(
                f"module={type(module).__name__}: its part {name!r} holds a tensor that needs a gradient and is no "
                "parameter, as under FullyShardedDataParallel; take fully_shard instead"
            )
