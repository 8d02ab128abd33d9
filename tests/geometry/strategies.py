"""Random masks (with their definition in numpy), layouts and tiles, for hypothesis."""

from __future__ import annotations

from functools import reduce

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ringattn import (
    Layout,
    Mask,
    balanced,
    causal,
    chunked,
    contiguous,
    documents,
    full,
    prefix_lm,
    sliding_window,
    striped,
    zigzag,
)
from ringattn.geometry.tiles import Tile
from tests.harness.cases import Bools, MaskCase, Positions


def examples(count: int) -> settings:
    """Settings for `count` examples, the same ones in every run, so that a red build stays red."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(deadline=None, max_examples=count, derandomize=True, suppress_health_check=slow)


def _window(left: int | None, right: int | None) -> MaskCase:
    def build(seq_len: int) -> Mask:
        return sliding_window(left, right)

    def sees(q: Positions, k: Positions, seq_len: int) -> Bools:
        back = np.ones_like(q + k, dtype=np.bool_) if left is None else k - q >= -left
        return back if right is None else back & (k - q <= right)

    return MaskCase(f"window({left},{right})", build, sees)


def _documents(cu: tuple[int, ...]) -> MaskCase:
    def sees(q: Positions, k: Positions, seq_len: int) -> Bools:
        return np.equal(np.searchsorted(cu, q, side="right"), np.searchsorted(cu, k, side="right"))

    return MaskCase(f"documents{cu}", lambda n: documents(cu), sees, cross=False)


def _prefix(length: int) -> MaskCase:
    return MaskCase(f"prefix({length})", lambda n: prefix_lm(length), lambda q, k, n: (k < length) | (k <= q))


def _chunked(size: int) -> MaskCase:
    return MaskCase(f"chunked({size})", lambda n: chunked(size), lambda q, k, n: q // size == k // size)


_FULL = MaskCase("full", lambda n: full(), lambda q, k, n: np.ones_like(q + k, dtype=np.bool_))
_CAUSAL = MaskCase("causal", lambda n: causal(), lambda q, k, n: k <= q)


def terms(seq_len: int, *, cross: bool = False) -> st.SearchStrategy[MaskCase]:
    """One constructor with random parameters; without documents for cross-attention."""
    reach = st.none() | st.integers(0, seq_len + 2)
    kinds: list[st.SearchStrategy[MaskCase]] = [
        st.just(_FULL),
        st.just(_CAUSAL),
        st.builds(_window, reach, reach),
        st.builds(_prefix, st.integers(0, seq_len + 2)),
        st.builds(_chunked, st.integers(1, seq_len + 2)),
    ]
    if not cross:
        cuts = st.lists(st.integers(0, seq_len), max_size=6).map(sorted)
        kinds.append(cuts.map(lambda ends: _documents((0, *ends, seq_len))))
    return st.one_of(kinds)


def masks(seq_len: int, *, cross: bool = False) -> st.SearchStrategy[MaskCase]:
    """Up to three terms, composed."""
    several = st.lists(terms(seq_len, cross=cross), min_size=1, max_size=3)
    return several.map(lambda found: reduce(lambda a, b: a & b, found))


@st.composite
def any_layout(draw: st.DrawFn, seq_len: int, world_size: int) -> Layout:
    """Runs of random lengths, some of them interleaved by two, dealt to random ranks in random order."""
    cuts = draw(st.lists(st.integers(0, seq_len), max_size=6).map(sorted))
    ranges: list[range] = []
    for start, stop in zip([0, *cuts], [*cuts, seq_len], strict=True):
        step = draw(st.sampled_from([1, 1, 1, 2, 3]))
        ranges += [range(start + first, stop, step) for first in range(step)]
    own: list[list[range]] = [[] for _ in range(world_size)]
    for run in draw(st.permutations(ranges)):
        own[draw(st.integers(0, world_size - 1))].append(run)
    return Layout(seq_len, tuple(tuple(runs) for runs in own), f"{own}")


def layouts(seq_len: int, world_size: int) -> st.SearchStrategy[Layout]:
    """Every constructor, and layouts that none of them makes."""
    return st.one_of(
        st.just(contiguous(seq_len, world_size)),
        st.just(zigzag(seq_len, world_size)),
        st.integers(1, 5).map(lambda block: striped(seq_len, world_size, block)),
        st.integers(1, 7).map(lambda chunk: balanced(causal(), seq_len, world_size, chunk)),
        any_layout(seq_len, world_size),
    )


@st.composite
def tiles(draw: st.DrawFn, rows: int, cols: int, batch: int = 1) -> Tile:
    """A tile inside rows x cols, tight or not, empty ones among them."""
    q = sorted((draw(st.integers(0, rows)), draw(st.integers(0, rows))))
    k = sorted((draw(st.integers(0, cols)), draw(st.integers(0, cols))))
    diagonal = st.integers(-rows - 3, cols + 3)
    lo = draw(diagonal | st.just(-(1 << 60)))
    hi = draw(diagonal | st.just(1 << 60))
    return Tile(q[0], q[1], k[0], k[1], lo, hi, draw(st.integers(-1, batch - 1)))
