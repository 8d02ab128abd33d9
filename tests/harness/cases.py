"""Masks, layouts and tensors as data, for tests to be parametrised over.

A mask stands here twice: as the package builds it, and as its definition in numpy. The two share only
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ringattn import Layout, Mask

Bools: TypeAlias = npt.NDArray[np.bool_]
Positions: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MaskCase:
    """One mask for any sequence length.

    `sees(q, k, seq_len)` is the definition on arrays of positions, to be broadcast. In cross-attention
    `seq_len` is the longer of the two, for `build` as for `sees`; `cross` tells whether the mask allows that.
    """

    name: str
    build: Callable[[int], Mask]
    sees: Callable[[Positions, Positions, int], Bools]
    cross: bool = True

    def allowed(self, q_len: int, k_len: int) -> Bools:
        """Which keys each query may attend to, (q_len, k_len)."""
        q, k = np.arange(q_len)[:, None], np.arange(k_len)[None, :]
        return np.broadcast_to(self.sees(q, k, max(q_len, k_len)), (q_len, k_len)).copy()

    def __and__(self, other: MaskCase) -> MaskCase:
        return MaskCase(
            f"{self.name}&{other.name}",
            lambda n: self.build(n) & other.build(n),
            lambda q, k, n: self.sees(q, k, n) & other.sees(q, k, n),
            self.cross and other.cross,
        )

    def __reduce__(self) -> tuple[Callable[[str], MaskCase], tuple[str]]:
        return mask_case, (self.name,)  # a case travels to a rank by name: its functions cannot


@dataclass(frozen=True)
class LayoutCase:
    """One layout for any sequence length and world size."""

    name: str
    build: Callable[[int, int], Layout]

    def __reduce__(self) -> tuple[Callable[[str], LayoutCase], tuple[str]]:
        return layout_case, (self.name,)


class Tensors(NamedTuple):
    """Inputs and cotangents of one attention call."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor


def tensors(
    seed: int,
    batch: int,
    q_len: int,
    k_len: int,
    heads: int,
    kv_heads: int,
    dim: int,
    v_dim: int,
    dtype: torch.dtype,
) -> Tensors:
    """Whole, unsharded normal tensors that depend on the arguments alone: the same on every rank."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = normal(batch, q_len, heads, dim), normal(batch, k_len, kv_heads, dim)
    v, dout = normal(batch, k_len, kv_heads, v_dim), normal(batch, q_len, heads, v_dim)
    dlse = normal(batch, heads, q_len).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return Tensors(q.to(dtype), k.to(dtype), v.to(dtype), dout.to(dtype), dlse)


def cu_seqlens(seq_len: int) -> list[int]:
    """Ends of documents of a fixed pattern of lengths, 1 and 0 among them, cut to fit; the last is empty."""
    ends = np.cumsum([0, *(7, 1, 0, 12, 1, 1, 3, 0, 0, 19) * (seq_len // 44 + 1)])
    return [*(int(end) for end in ends if end < seq_len), seq_len, seq_len]


def case_ids(cases: Iterable[MaskCase | LayoutCase]) -> list[str]:
    """Names for pytest's `ids`."""
    return [case.name for case in cases]


def mask_case(name: str) -> MaskCase:
    """The case of this name in MASK_CASES."""
    return next(case for case in MASK_CASES if case.name == name)


def layout_case(name: str) -> LayoutCase:
    """The case of this name in LAYOUT_CASES."""
    return next(case for case in LAYOUT_CASES if case.name == name)


def _full(seq_len: int) -> Mask:
    from ringattn import full

    return full()


def _causal(seq_len: int) -> Mask:
    from ringattn import causal

    return causal()


def _documents(seq_len: int) -> Mask:
    from ringattn import documents

    return documents(cu_seqlens(seq_len))


def _sees_documents(q: Positions, k: Positions, seq_len: int) -> Bools:
    ends = cu_seqlens(seq_len)
    return np.equal(np.searchsorted(ends, q, side="right"), np.searchsorted(ends, k, side="right"))


def _window_case(name: str, left: Callable[[int], int], right: Callable[[int], int]) -> MaskCase:
    """A window whose two widths follow from the sequence length."""

    def build(seq_len: int) -> Mask:
        from ringattn import sliding_window

        return sliding_window(left(seq_len), right=right(seq_len))

    return MaskCase(name, build, lambda q, k, n: (-left(n) <= k - q) & (k - q <= right(n)))


def _prefix_case(name: str, prefix_len: Callable[[int], int]) -> MaskCase:
    """A prefix whose length follows from the sequence length."""

    def build(seq_len: int) -> Mask:
        from ringattn import prefix_lm

        return prefix_lm(prefix_len(seq_len))

    return MaskCase(name, build, lambda q, k, n: (k < prefix_len(n)) | (k <= q))


def _chunked_case(size: int) -> MaskCase:
    def build(seq_len: int) -> Mask:
        from ringattn import chunked

        return chunked(size)

    return MaskCase(f"chunked_{size}", build, lambda q, k, n: q // size == k // size)


_CAUSAL = MaskCase("causal", _causal, lambda q, k, n: k <= q)
_DOCUMENTS = MaskCase("documents", _documents, _sees_documents, cross=False)
_LEFT = _window_case("window_left", lambda n: 4, lambda n: 0)
_BOTH = _window_case("window_both", lambda n: 3, lambda n: 2)
_CHUNKED = _chunked_case(5)

# In self-attention each row sees at least itself in all of these. In cross-attention with fewer keys than
# queries, windows, chunks and anti_causal leave the last rows with nothing.
MASK_CASES: tuple[MaskCase, ...] = (
    MaskCase("full", _full, lambda q, k, n: np.ones(np.broadcast_shapes(q.shape, k.shape), dtype=np.bool_)),
    _CAUSAL,
    _window_case("anti_causal", lambda n: 0, lambda n: n),
    _LEFT,
    _BOTH,
    _window_case("window_self", lambda n: 0, lambda n: 0),
    _window_case("window_wide", lambda n: n + 5, lambda n: 0),
    _DOCUMENTS,
    _DOCUMENTS & _CAUSAL,
    _DOCUMENTS & _LEFT,
    _DOCUMENTS & _BOTH,
    _prefix_case("prefix_none", lambda n: 0),
    _prefix_case("prefix_some", lambda n: n // 3),
    _prefix_case("prefix_long", lambda n: n + 3),
    _CHUNKED,
    _CHUNKED & _CAUSAL,
)

CROSS_MASK_CASES: tuple[MaskCase, ...] = tuple(case for case in MASK_CASES if case.cross)


def _contiguous(seq_len: int, world_size: int) -> Layout:
    from ringattn import contiguous

    return contiguous(seq_len, world_size)


def _zigzag(seq_len: int, world_size: int) -> Layout:
    from ringattn import zigzag

    return zigzag(seq_len, world_size)


def _striped_1(seq_len: int, world_size: int) -> Layout:
    from ringattn import striped

    return striped(seq_len, world_size, block=1)


def _striped_3(seq_len: int, world_size: int) -> Layout:
    from ringattn import striped

    return striped(seq_len, world_size, block=3)


def _balanced(seq_len: int, world_size: int) -> Layout:
    from ringattn import balanced, causal

    return balanced(causal(), seq_len, world_size)


LAYOUT_CASES: tuple[LayoutCase, ...] = (
    LayoutCase("contiguous", _contiguous),
    LayoutCase("zigzag", _zigzag),
    LayoutCase("striped_1", _striped_1),
    LayoutCase("striped_3", _striped_3),
    LayoutCase("balanced", _balanced),
)
