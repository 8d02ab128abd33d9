"""The contract of kernels over pages: attention of a few query rows per sequence to keys scattered over a pool."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from ringattn.kernels.contract import ProblemSpec, Queries
from ringattn.score import Score
from ringattn.softmax import State


class Pools(NamedTuple):
    """The pages of one layer. Strided views whose last dim is contiguous.

    Args:
        k: (pages, page_size, Hkv, D).
        v: (pages, page_size, Hkv, Dv).
    """

    k: Tensor
    v: Tensor


class PageTables(NamedTuple):
    """The pages of each sequence of a batch, and the position of the key in each slot. All int32.

    Args:
        pages: (entries,): pages of the pool, sequence by sequence.
        slots: (entries, page_size): the global position of the key in each slot; -1 in an empty slot.
        starts: (B + 1,): sequence b has the entries [starts[b], starts[b + 1]).
    """

    pages: Tensor
    slots: Tensor
    starts: Tensor


class VisibleKeys(NamedTuple):
    """The key positions visible to each query row: first <= position < stop. Both (B, T) int32; first is 0 or more."""

    first: Tensor
    stop: Tensor


class PagedKernel(Protocol):
    """Attention of T query rows of each of B sequences to its keys in a pool.

    Shapes: queries (B, T, H, D) and state (B, T, H, Dv), (B, H, T), as in the contract of `BlockKernel`.
    """

    @property
    def name(self) -> str:
        """The key in PAGED_BACKENDS."""
        ...

    @property
    def score_terms(self) -> frozenset[str]:
        """The terms of a score that it computes besides the scale, as named by `Score.terms`."""
        ...

    def available(self) -> list[str]:
        """Returns every reason why this kernel cannot run on this machine at all; empty if it can."""
        ...

    def unsupported(self, problem: ProblemSpec) -> list[str]:
        """Returns every reason why it cannot run this problem, `unsupported_terms` included; empty if it can."""
        ...

    def forward(
        self, queries: Queries, pools: Pools, tables: PageTables, visible: VisibleKeys, score: Score, state: State
    ) -> None:
        """Merges attention to the visible keys of the tables into the state, in place.

        Slots that are visible to no query row of their sequence, and pages that are in no table, are never read: they
        may hold anything. The cost follows the number of entries, not the size of the pool.
        """
        ...

    def merge(self, outs: Tensor, lses: Tensor, first: int, sink: Tensor | None) -> Tensor:
        """Returns the output over all keys, (B, T, H, Dv), from the partial results of several ranks.

        It takes the arguments of `softmax.merge_parts`. A row's result depends on that row alone, to the bit. Kernels
        of other names may round differently, so all ranks use the same kernel.
        """
        ...
