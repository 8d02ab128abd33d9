"""Which side of attention moves: keys and values, or queries; forward or backward. The executor does not know which.

    phase                  moves            stays                  returns
    forward                k, v             q and its state        -
    forward by queries     q                k, v                   out, lse
    backward               k, v             q, dout, lse, delta    dk, dv
    backward by queries    q, dout, lse, …  k, v                   dq

Either side may lie in several chunks of rows, one after the other. Tensors are (batch, rows, heads, dim), or (batch,
heads, rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ringattn.geometry.tiles import Tiles
from ringattn.kernels.contract import BackwardQueries, BlockKernel, Gradients, Keys, Queries, State
from ringattn.plan.head_shards import HeadSlice
from ringattn.score import Score
from ringattn.softmax import merge_

Tensors = tuple[Tensor, ...]


class Movement(Protocol):
    """What moves, what stays, and what returns, with the kernel call that joins them.

    `moving` and `returned` are the chunks of this rank's own block: the tensors that move, and what is accumulated for
    them.
    """

    device: torch.device
    moving: Sequence[Tensors]
    returned: Sequence[Tensors]

    def compute(self, chunk: int, moving: Tensors, returning: Tensors, tiles: Tiles) -> None:
        """Computes tiles of some moving rows with a chunk of the side that stays."""
        ...

    def clear(self, returning: Tensors) -> None:
        """Sets what returns to nothing accumulated."""
        ...

    def accumulate(self, target: Tensors, source: Tensors) -> None:
        """Accumulates what returned."""
        ...


class HeadwiseKernel:
    """A kernel, called once for each group of heads that have the same number of query heads per kv head."""

    __slots__ = ("_heads", "_kernel", "_score")

    def __init__(self, kernel: BlockKernel, score: Score, heads: tuple[HeadSlice, ...]) -> None:
        self._kernel, self._score, self._heads = kernel, score, heads

    def forward(self, queries: Queries, keys: Keys, tiles: Tiles, state: State) -> None:
        """Merges attention over the tiles into the state."""
        if len(self._heads) == 1:
            self._kernel.forward(queries, keys, tiles, self._score, state)
            return
        for heads, kv_heads in self._heads:
            part, part_keys, part_state = queries.of_heads(heads), keys.of_heads(kv_heads), state.of_heads(heads)
            self._kernel.forward(part, part_keys, tiles, self._score.of_heads(heads), part_state)

    def backward(self, queries: BackwardQueries, keys: Keys, tiles: Tiles, gradients: Gradients) -> None:
        """Adds the gradients over the tiles."""
        if len(self._heads) == 1:
            self._kernel.backward(queries, keys, tiles, self._score, gradients)
            return
        for heads, kv_heads in self._heads:
            part, part_keys = queries.of_heads(heads), keys.of_heads(kv_heads)
            part_gradients = gradients.of_heads(heads, kv_heads)
            self._kernel.backward(part, part_keys, tiles, self._score.of_heads(heads), part_gradients)


class Forward:
    """Keys and values move to the queries.

    Args:
        kernel: what computes.
        queries, states: the chunks that stay; states are updated.
        keys: the chunks of this rank's own block.
    """

    def __init__(
        self, kernel: HeadwiseKernel, queries: Sequence[Queries], states: Sequence[State], keys: Sequence[Keys]
    ) -> None:
        self._kernel, self._queries, self._states = kernel, queries, states
        self.moving: Sequence[Tensors] = [(chunk.k, chunk.v) for chunk in keys]
        self.returned: Sequence[Tensors] = ()
        self.device = keys[0].k.device

    def compute(self, chunk: int, moving: Tensors, returning: Tensors, tiles: Tiles) -> None:
        self._kernel.forward(self._queries[chunk], Keys(*moving), tiles, self._states[chunk])

    def clear(self, returning: Tensors) -> None:
        raise AssertionError("nothing returns")

    def accumulate(self, target: Tensors, source: Tensors) -> None:
        raise AssertionError("nothing returns")


class ForwardByQueries:
    """Queries move to the keys and values; partial results return, and are merged.

    Args:
        kernel: what computes.
        queries, states: the chunks of this rank's own block; states are updated.
        keys: the chunks that stay.
    """

    def __init__(
        self, kernel: HeadwiseKernel, queries: Sequence[Queries], states: Sequence[State], keys: Sequence[Keys]
    ) -> None:
        self._kernel, self._keys = kernel, keys
        self.moving: Sequence[Tensors] = [(chunk.q,) for chunk in queries]
        self.returned: Sequence[Tensors] = [(state.out, state.lse) for state in states]
        self.device = queries[0].q.device

    def compute(self, chunk: int, moving: Tensors, returning: Tensors, tiles: Tiles) -> None:
        self._kernel.forward(Queries(*moving), self._keys[chunk], tiles, State(*returning))

    def clear(self, returning: Tensors) -> None:
        out, lse = returning
        out.zero_()
        lse.fill_(-torch.inf)

    def accumulate(self, target: Tensors, source: Tensors) -> None:
        merge_(*target, *source)


class _Gradients:
    """A movement whose returns are summed.

    Args:
        kernel: what computes.
        queries, keys: the chunks of one side stay; the chunks of the other are this rank's own block, which moves.
        dq: the gradient of each chunk of queries, zeros; updated.
        dkv: the gradients (dk, dv) of each chunk of keys, zeros; updated.
    """

    def __init__(
        self,
        kernel: HeadwiseKernel,
        queries: Sequence[BackwardQueries],
        keys: Sequence[Keys],
        dq: Sequence[Tensor],
        dkv: Sequence[Tensors],
    ) -> None:
        self._kernel, self._queries, self._keys, self._dq, self._dkv = kernel, queries, keys, dq, dkv
        self.device = keys[0].k.device
        self.moving, self.returned = self._own_block()

    def _own_block(self) -> tuple[Sequence[Tensors], Sequence[Tensors]]:
        """Returns what moves of each chunk of the own block, and its gradients."""
        raise NotImplementedError

    def clear(self, returning: Tensors) -> None:
        for x in returning:
            x.zero_()

    def accumulate(self, target: Tensors, source: Tensors) -> None:
        for total, x in zip(target, source, strict=True):
            total += x


class Backward(_Gradients):
    """Keys and values move to the queries; their gradients return."""

    def _own_block(self) -> tuple[Sequence[Tensors], Sequence[Tensors]]:
        return [(chunk.k, chunk.v) for chunk in self._keys], self._dkv

    def compute(self, chunk: int, moving: Tensors, returning: Tensors, tiles: Tiles) -> None:
        gradients = Gradients(self._dq[chunk], *returning)
        self._kernel.backward(self._queries[chunk], Keys(*moving), tiles, gradients)


class BackwardByQueries(_Gradients):
    """Queries move to the keys and values with everything that belongs to them; their gradients return."""

    def _own_block(self) -> tuple[Sequence[Tensors], Sequence[Tensors]]:
        moving = [(chunk.q, chunk.dout, chunk.lse, chunk.delta) for chunk in self._queries]
        return moving, [(x,) for x in self._dq]

    def compute(self, chunk: int, moving: Tensors, returning: Tensors, tiles: Tiles) -> None:
        q, dout, lse, delta = moving
        queries = BackwardQueries(q, dout, lse, delta, self._queries[0].lse_grad)
        self._kernel.backward(queries, self._keys[chunk], tiles, Gradients(returning[0], *self._dkv[chunk]))
