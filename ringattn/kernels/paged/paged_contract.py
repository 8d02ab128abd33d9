"""What a kernel over pages must promise: attention of a few query rows per sequence to keys scattered over a pool."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from ringattn.kernels.contract import ProblemSpec, ScoreOptions


class PageTables(NamedTuple):
    """Which pages hold the keys of each sequence of a batch, and which keys these are. All int32.

    Args:
        pages: (entries,): pages of the pool, sequence by sequence.
        slots: (entries, page_size): the global position of the key in each slot; -1 where there is none.
        starts: (B + 1,): sequence b has the entries [starts[b], starts[b + 1]).
    """

    pages: Tensor
    slots: Tensor
    starts: Tensor


class VisibleKeys(NamedTuple):
    """Which positions each query row sees: first <= position < stop. Both (B, T) int32; first is 0 or more."""

    first: Tensor
    stop: Tensor


class PagedKernel(Protocol):
    """Attention of T query rows of each sequence to its keys in a pool.

    Shapes: q (B, T, H, D); k (pages, page_size, Hkv, D); v (pages, page_size, Hkv, Dv), H % Hkv == 0, strided
    views whose last dim is contiguous. State: out (B, T, H, Dv) and lse (B, H, T), natural log, in fp32 (float64 for
    float64).
    """

    @property
    def name(self) -> str:
        """The key in PAGED_BACKENDS."""
        ...

    def available(self) -> list[str]:
        """Returns every reason why this kernel cannot run on this machine at all; empty if it can."""
        ...

    def unsupported(self, call: ProblemSpec) -> list[str]:
        """Returns every reason why it cannot run this call; empty if it can."""
        ...

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tables: PageTables,
        sight: VisibleKeys,
        spec: ScoreOptions,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Merges attention to the keys of the tables into (out, lse), in place.

        Slots that no query row of their sequence sees, and pages that no table lists, are never read: they may hold
        anything. The cost follows what is listed, not the size of the pool.
        """
        ...

    def merge(self, outs: Tensor, lses: Tensor, first: int, sink: Tensor | None) -> Tensor:
        """Returns the output over all keys from those of several ranks; see softmax.merged.

        What a row gets depends on nothing but that row, to the bit. Kernels of other names may round otherwise, so all
        ranks take the same.
        """
        ...
