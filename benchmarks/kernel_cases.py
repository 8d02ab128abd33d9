"""The cases of the kernel benchmark: the (query, key) pairs of one call, and the operations that they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

import ringattn
from benchmarks.inputs import Shape
from benchmarks.internals import mask_tiles, ring_steps
from ringattn.geometry.tiles import NO_TILES, Tiles

RING_RANKS = 4
# This rank of four computes every kind of step: its own block, blocks before it and blocks after it.
RING_RANK = 1
# Packed documents have log-normal lengths, as in text corpora: median and bounds in tokens, sigma of the logarithm.
MEDIAN, SIGMA, SHORTEST, LONGEST, SEED = 1024, 1.5, 128, 16384, 1
NARROW = 256  # tokens of a window in which edges and memory traffic weigh most


@dataclass(frozen=True)
class Pattern:
    """The pairs of one call: `cu_seqlens` if they are packed causal documents, `window` if they are a causal window."""

    tiles: Tiles
    cu_seqlens: tuple[int, ...] | None = None
    window: int | None = None


def document_lengths(seq_len: int) -> list[int]:
    """Returns the lengths of packed documents that fill seq_len tokens, equal in every call.

    They are log-normal between SHORTEST and LONGEST; in short sequences all of these bounds shrink.
    """
    longest, median, shortest = (
        max(1, min(bound, seq_len // part)) for bound, part in ((LONGEST, 4), (MEDIAN, 16), (SHORTEST, 64))
    )
    generator = np.random.default_rng(SEED)
    lengths: list[int] = []
    while (left := seq_len - sum(lengths)) > 0:
        length = int(np.clip(generator.lognormal(np.log(median), SIGMA), shortest, longest))
        if left - length < shortest:  # the remaining tokens must be a document, too
            length = left if left <= longest else left - shortest
        lengths.append(length)
    return lengths


def _window(width: int, seq_len: int) -> Pattern:
    return Pattern(mask_tiles(ringattn.sliding_window(width - 1), seq_len), window=width)


def _packed(cu_seqlens: tuple[int, ...], seq_len: int) -> Pattern:
    return Pattern(mask_tiles(ringattn.documents(cu_seqlens) & ringattn.causal(), seq_len), cu_seqlens=cu_seqlens)


def _ring_step(source: int, seq_len: int) -> Pattern:
    """The step of a zigzag ring in which RING_RANK attends to the block of `source`."""
    steps = ring_steps(ringattn.causal(), ringattn.zigzag(seq_len * RING_RANKS, RING_RANKS), RING_RANK)
    return Pattern(dict(steps).get(source, NO_TILES))


# By name: a description, and the pattern of a call with so many rows of queries and of keys.
CASES: dict[str, tuple[str, Callable[[int], Pattern]]] = {
    "causal": ("dense causal", lambda n: Pattern(mask_tiles(ringattn.causal(), n))),
    "full": ("dense, every pair", lambda n: Pattern(mask_tiles(ringattn.full(), n))),
    "window": (
        "causal sliding window: an eighth of the sequence, at most 4,096",
        lambda n: _window(max(1, min(4096, n // 8)), n),
    ),
    "packed": (
        "packed causal documents with long-tailed lengths",
        lambda n: _packed((0, *np.cumsum(document_lengths(n)).tolist()), n),
    ),
    "window-narrow": (f"causal sliding window of {NARROW}", partial(_window, NARROW)),
    "packed-short": (f"packed causal documents of {SHORTEST}", lambda n: _packed((*range(0, n, SHORTEST), n), n)),
    "ring-own": ("zigzag ring, step 0: the rank's own block", partial(_ring_step, RING_RANK)),
    "ring-upper": ("zigzag ring, an earlier block: the upper half of its keys", partial(_ring_step, RING_RANK - 1)),
    "ring-lower": ("zigzag ring, a later block: the lower half of the queries", partial(_ring_step, RING_RANK + 1)),
}


def flops(area: int, heads: int, head_dim: int, backward: bool) -> float:
    """Returns the floating-point operations of attention over `area` (query, key) pairs.

    The forward has two products of 2 * area * D per head, queries with keys and weights with values; the backward has
    five. Work outside the area and recomputation do not count.
    Source: Dao et al. 2022, arXiv:2205.14135, whose benchmarks use the same count.
    """
    return 4.0 * area * heads * head_dim * (2.5 if backward else 1.0)


@dataclass(frozen=True)
class Problem(Shape):
    """A case with its sizes, for batch size 1; seq_len counts the rows of queries, and of keys, of one call."""

    case: str
    seq_len: int
    backward: bool
    threads: int

    @cached_property
    def pattern(self) -> Pattern:
        return CASES[self.case][1](self.seq_len)

    @property
    def area(self) -> int:
        """(query, key) pairs of a head."""
        return self.pattern.tiles.area()

    @property
    def flops(self) -> float:
        return flops(self.area, self.heads, self.head_dim, self.backward)
