"""A row-wise module, such as an MLP, run over tiles of rows: only one tile's activations are in memory at a time."""

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
    """Returns module(x), computed over `num_tiles` tiles of rows, one after the other, in forward and backward.

    Only x is saved for the backward, which runs the forward of each tile again. So at any time the activations of one
    tile are in memory, for the cost of one more forward. The module must process each row independently: an MLP, a
    norm, a projection, with or without dropout. The result is then the same up to rounding, except that dropout draws
    other masks than without tiles.

    Parameters receive their gradients once, at the end of the module's backward, so hooks of DistributedDataParallel
    and `fully_shard` run once, as without tiles. A unit of `fully_shard` may contain the module, or be the module when
    this runs inside its forward; it may not be a submodule of it. There are always `num_tiles` tiles, some without rows
    if need be, so ranks with different numbers of rows gather their parameters the same number of times.

    Args:
        module: maps (rows, E) to (rows, F), for any F.
        x: (..., rows, E), any number of rows, including 0.
        num_tiles: number of tiles, the same on all ranks; their sizes differ by at most one row.
        forward: the function to call for a tile; None for the module itself. Pass the module's own forward where its
            hooks must run once, around all tiles.
    Returns:
        (..., rows, F). Gradients of half-precision parameters are summed over tiles in fp32 and rounded once; others
        are summed in their own dtype.
    Raises:
        ArgumentError: when num_tiles is invalid, the module does not return one row per row, a submodule is a unit of
            `fully_shard`, or the module holds views of parameters (FullyShardedDataParallel).
    Communication: none but the module's.
    Source: Bekman et al. 2025 (Arctic Long Sequence Training), arXiv:2506.13996.
    """
    if not isinstance(module, nn.Module):
        raise ArgumentTypeError(f"module={module!r:.100}: must be an nn.Module, not {type(module).__name__}")
    check_integer("num_tiles", num_tiles, 1)
    if x.ndim < 2:
        raise ArgumentError(f"x has shape {tuple(x.shape)}: must be (..., rows, E)")
    _check_parameters(module)
    tiled_forward = _TiledForward(module, module if forward is None else forward, num_tiles)
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled():
        out: Tensor = _TiledFunction.apply(rows, tiled_forward, *tiled_forward.parameters())  # type: ignore[no-untyped-call]
    else:
        out = tiled_forward.run(rows)
    return out.view(*x.shape[:-1], out.shape[-1])


@dataclass(frozen=True)
class _TiledForward:
    """A module's forward, and the number of tiles to run it over."""

    module: nn.Module
    forward: RowWise
    num_tiles: int

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def run(self, x: Tensor) -> Tensor:
        """Runs all tiles into one preallocated output."""
        out: Tensor | None = None
        stop = 0
        for tile in x.tensor_split(self.num_tiles):
            tile_out = self.forward(tile)
            if not isinstance(tile_out, Tensor) or tile_out.ndim != 2 or len(tile_out) != len(tile):
                found = tuple(tile_out.shape) if isinstance(tile_out, Tensor) else type(tile_out).__name__
                raise ArgumentError(
                    f"module={type(self.module).__name__} returned {found} for {len(tile)} rows: must return one row "
                    "per row"
                )
            if out is None:
                out = tile_out.new_empty(len(x), tile_out.shape[1])
            start, stop = stop, stop + len(tile)
            out[start:stop] = tile_out
        assert out is not None
        return out


class _TiledFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tiled_forward: _TiledForward, *parameters: nn.Parameter) -> Tensor:
        ctx.tiled_forward, ctx.random_and_autocast = tiled_forward, _RandomAndAutocastState.capture(x)
        # Saving the parameters lets autograd detect in-place changes; the backward reads them from the module.
        ctx.save_for_backward(x, *parameters)
        return tiled_forward.run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, *_ = ctx.saved_tensors
        tiled_forward: _TiledForward = ctx.tiled_forward
        parameters = tiled_forward.parameters()
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        totals: list[Tensor | None] = [None] * len(parameters)
        tiles = zip(*(tensor.tensor_split(tiled_forward.num_tiles) for tensor in (x, dout)), strict=True)
        stop = 0
        with ctx.random_and_autocast.restore(), torch.enable_grad():
            for tile, dtile_out in tiles:
                tile = tile.detach().requires_grad_(dx is not None)
                leaves = ([] if dx is None else [tile]) + parameters
                grads = list(torch.autograd.grad(tiled_forward.forward(tile), leaves, dtile_out, allow_unused=True))
                start, stop = stop, stop + len(tile)
                if dx is not None:
                    dtile = grads.pop(0)
                    dx[start:stop] = 0 if dtile is None else dtile
                _accumulate(totals, grads)
        pairs = zip(totals, parameters, strict=True)
        return dx, None, *(None if total is None else total.to(p.dtype) for total, p in pairs)


def _accumulate(totals: list[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    """Adds gradients to totals, in fp32 for half precision."""
    for index, grad in enumerate(grads):
        if grad is None:
            continue
        total = totals[index]
        if total is None:
            totals[index] = grad.to(torch.promote_types(grad.dtype, torch.float32))
        else:
            total += grad


@dataclass(frozen=True)
class _RandomAndAutocastState:
    """The autocast setting and the states of the random generators, which a recomputed forward needs unchanged."""

    device_type: str
    autocast_enabled: bool
    autocast_dtype: torch.dtype
    cpu_rng_state: Tensor
    device_rng_states: tuple[list[int], list[Tensor]]  # (device indices, states)

    @staticmethod
    def capture(x: Tensor) -> _RandomAndAutocastState:
        device_type = x.device.type
        return _RandomAndAutocastState(
            device_type,
            torch.is_autocast_enabled(device_type),
            torch.get_autocast_dtype(device_type),
            torch.get_rng_state(),
            get_device_states(x),
        )

    @contextmanager
    def restore(self) -> Iterator[None]:
        devices, states = self.device_rng_states
        fork_type = self.device_type if devices else "cuda"
        with (
            torch.random.fork_rng(devices, device_type=fork_type),
            torch.autocast(self.device_type, self.autocast_dtype, enabled=self.autocast_enabled),
        ):
            torch.set_rng_state(self.cpu_rng_state)
            set_device_states(devices, states, device_type=fork_type)
            yield


def _check_parameters(module: nn.Module) -> None:
    for name, submodule in module.named_modules():
        if name and isinstance(submodule, FSDPModule):
            raise ArgumentError(
                f"module={type(module).__name__}: its submodule {name!r} is a unit of fully_shard, which would gather "
                "and free its parameters for every tile; make the whole module one unit, or part of a larger one"
            )
        if any(isinstance(value, Tensor) and value.requires_grad for value in vars(submodule).values()):
            raise ArgumentError(
                f"module={type(module).__name__}: its submodule {name!r} holds a tensor that requires a gradient and "
                "is not a parameter, as under FullyShardedDataParallel; use fully_shard instead"
            )
