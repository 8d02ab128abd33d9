"""The one place where benchmarks call kernels, the planner and the executor, whose interfaces are not public."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

import ringattn
from benchmarks.inputs import Shape
from ringattn.attention.auto_exchange import prepare
from ringattn.attention.autograd import AttentionFunction
from ringattn.attention.validate import AttentionCall
from ringattn.comm import buffer_pool, messages
from ringattn.comm.topology import RankMesh
from ringattn.errors import BackendError
from ringattn.geometry.tiles import Tiles, tiles_of_rank
from ringattn.kernels import (
    BACKENDS,
    BackwardQueries,
    BlockKernel,
    Gradients,
    Keys,
    ProblemSpec,
    Queries,
    State,
    refusals,
)  # fmt: skip
from ringattn.kernels.paged import PagedKernel, PageTables, Pools, VisibleKeys, select_paged
from ringattn.kernels.reference import ReferenceKernel
from ringattn.plan.exchanges import Ring, build_plan
from ringattn.score import Score
from ringattn.softmax import accumulation_dtype, empty_state

QKV = tuple[Tensor, Tensor, Tensor]


def _problem(shape: Shape, device: torch.device, backward: bool) -> ProblemSpec:
    heads, dim = (shape.heads, shape.kv_heads), shape.head_dim
    return ProblemSpec(device.type, shape.torch_dtype, *heads, dim, dim, backward, Score(dim**-0.5))


def kernel_by_name(name: str, shape: Shape, device: torch.device, backward: bool) -> BlockKernel:
    """Returns a kernel of the table; raises BackendError with every reason why it cannot run the problem."""
    if reasons := refusals(name, _problem(shape, device, backward)):
        raise BackendError("; ".join(reasons))
    return BACKENDS[name]


def new_state(q: Tensor) -> State:
    """Returns the state before the first block, for values of q's head dim."""
    return empty_state(q, q.shape[3])


def new_gradients(qkv: QKV) -> Gradients:
    """Returns zeros in the accumulation dtype."""
    return Gradients(*(torch.zeros_like(x, dtype=accumulation_dtype(x.dtype)) for x in qkv))


def delta_of(dout: Tensor, out: Tensor) -> Tensor:
    """Returns rowsum(dout * out), (B, H, S)."""
    return (dout.to(out.dtype) * out).sum(-1).transpose(1, 2).contiguous()


def forward(kernel: BlockKernel, qkv: QKV, tiles: Tiles, state: State) -> None:
    """Merges attention over the tiles into the state."""
    kernel.forward(Queries(qkv[0]), Keys(*qkv[1:]), tiles, Score(qkv[0].shape[3] ** -0.5), state)


def backward(
    kernel: BlockKernel, qkv: QKV, dout: Tensor, lse: Tensor, delta: Tensor, tiles: Tiles, gradients: Gradients
) -> None:
    """Adds the gradients over the tiles; lse and delta are those over all keys."""
    queries, score = BackwardQueries(qkv[0], dout, lse, delta), Score(qkv[0].shape[3] ** -0.5)
    kernel.backward(queries, Keys(*qkv[1:]), tiles, score, gradients)


class IdleKernel(ReferenceKernel):
    """A kernel that computes nothing but sleeps as long as its work would take, so that it needs no core.

    Args:
        gflops: the speed that it pretends to have; None is infinite.
    """

    def __init__(self, gflops: float | None = None) -> None:
        self._flop_per_s = None if gflops is None else gflops * 1e9

    def forward(self, queries: Queries, keys: Keys, tiles: Tiles, score: Score, state: State) -> None:
        self._sleep(2, queries.q, keys.v, tiles)

    def backward(self, queries: BackwardQueries, keys: Keys, tiles: Tiles, score: Score, gradients: Gradients) -> None:
        self._sleep(5, queries.q, keys.v, tiles)

    def _sleep(self, products: int, q: Tensor, v: Tensor, tiles: Tiles) -> None:
        if self._flop_per_s is not None:
            flop = products * (q.shape[3] + v.shape[3]) * q.shape[2] * tiles.area(q.shape[0])
            time.sleep(flop / self._flop_per_s)


def paged_kernel(shape: Shape, device: torch.device, backend: str | None = None) -> PagedKernel:
    """Returns a paged kernel: the named one, or the first that can."""
    return select_paged(backend, _problem(shape, device, False))


def paged_forward(
    kernel: PagedKernel, q: Tensor, pools: tuple[Tensor, Tensor], tables: PageTables, visible: VisibleKeys, state: State
) -> None:
    """Merges attention over the pages into the state."""
    kernel.forward(Queries(q), Pools(*pools), tables, visible, Score(q.shape[3] ** -0.5), state)


def mask_tiles(mask: ringattn.Mask, seq_len: int) -> Tiles:
    """Returns the tiles of a whole sequence on one rank."""
    alone = ringattn.contiguous(seq_len, 1)
    return tiles_of_rank((mask,), alone, alone, 0)[0]


def mask_area(mask: ringattn.Mask, layout: ringattn.Layout) -> int:
    """Returns the (query, key) pairs of one head, over all ranks."""
    return sum(build_plan(Ring(), (mask,), layout, layout, 0).work)


def ring_steps(mask: ringattn.Mask, layout: ringattn.Layout, rank: int) -> list[tuple[int, Tiles]]:
    """Returns what a rank of a ring computes, step by step: the rank that owns the block, and the tiles."""
    plan = build_plan(Ring(), (mask,), layout, layout, rank)
    return [(compute.slice.block, compute.tiles) for compute in plan.forward.computes]


# Starts operations of a group in the place of the package.
Start = Callable[[dist.ProcessGroup, Sequence[messages.Operation]], list[messages.PendingMessage]]


def replaced_start(replacement: Callable[[Start], Start]) -> AbstractContextManager[object]:
    """Within it, all point-to-point messages start through a function that is made from the original one."""
    return mock.patch.object(messages, "start", replacement(messages.start))


def empty_buffer_pools() -> AbstractContextManager[object]:
    """Within it, the pools of message buffers on CPUs start empty, so that buffers are allocated again."""
    return mock.patch.object(buffer_pool, "_POOLS", WeakKeyDictionary())


class PlannedAttention:
    """A call of a public attention function, planned but not yet run.

    Args:
        exchange: "ring", "gather", "ulysses" or "hybrid".
        tensors: q, k, v of this rank.
        mesh: of the ranks.
        options: mask, layout, stages.
    """

    def __init__(self, exchange: str, tensors: QKV, mesh: RankMesh, **options: Any) -> None:
        given = {"score": Score(), "kv_layout": None, "backend": None, "exchange": exchange, **options}
        self._tensors, self._mesh = tensors, mesh
        self._plan = prepare(AttentionCall(f"{exchange}_attention", *tensors, **given), mesh)[1]

    def bytes_sent(self) -> tuple[int, int]:
        """Returns the bytes that this rank sends forward, and backward."""
        return self._plan.bytes_sent()

    def forward(self, kernel: BlockKernel | None = None) -> Callable[[], Tensor]:
        """Returns a function that runs it, with another kernel than the planned one if given."""
        plan = self._plan if kernel is None else replace(self._plan, kernel=kernel)
        return lambda: AttentionFunction.apply(*self._tensors, None, plan, self._mesh)[0]  # type: ignore[no-untyped-call]
