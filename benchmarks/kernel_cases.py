"""The kernel benchmark's cases, as data: which pairs one call attends to, and how much work that is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

import ringattn
from ringattn.geometry.tiles import NO_TILES, Tiles, tiles_of_rank
from ringattn.kernels import ProblemSpec
from ringattn.plan.exchanges import Ring, build_plan
from ringattn.score import Score

RING_RANKS = 4
# Of four ranks, this one meets every kind of step: its own block, blocks before it and blocks after it.
RING_RANK = 1
# Packed documents: a long tail, as in corpora of text. Median, spread (of the logarithm), and bounds, in tokens.
MEDIAN, SPREAD, SHORTEST, LONGEST, SEED = 1024, 1.5, 128, 16384, 1
# Where edges and memory weigh most: a narrow window, and packed documents as short as the shortest.
NARROW = 256


@dataclass(frozen=True)
class Pattern:
    """The pairs of one call; `cu_seqlens` where they are packed causal documents, `window` where they are a window."""

    tiles: Tiles
    cu_seqlens: tuple[int, ...] | None = None
    window: int | None = None


@dataclass(frozen=True)
class Case:
    """A name, and the pattern of a call with so many rows of queries and as many of keys."""

    name: str
    about: str
    pattern: Callable[[int], Pattern]


def document_lengths(seq_len: int) -> list[int]:
    """Returns the lengths of packed documents that fill seq_len tokens: the same ones every time.

    They are log-normal between SHORTEST and LONGEST; in sequences too short for that, all of them are shorter.
    """
    longest, median, shortest = (
        max(1, min(bound, seq_len // part)) for bound, part in ((LONGEST, 4), (MEDIAN, 16), (SHORTEST, 64))
    )
    generator = np.random.default_rng(SEED)
    lengths: list[int] = []
    while (left := seq_len - sum(lengths)) > 0:
        length = int(np.clip(generator.lognormal(np.log(median), SPREAD), shortest, longest))
        if left - length < shortest:  # what would remain must be a document, too
            length = left if left <= longest else left - shortest
        lengths.append(length)
    return lengths


def _of_mask(mask: ringattn.Mask, seq_len: int) -> Tiles:
    alone = ringattn.contiguous(seq_len, 1)
    return tiles_of_rank((mask,), alone, alone, 0)[0]


def _window(seq_len: int) -> Pattern:
    return _window_of(max(1, min(4096, seq_len // 8)), seq_len)


def _window_of(width: int, seq_len: int) -> Pattern:
    return Pattern(_of_mask(ringattn.sliding_window(width - 1), seq_len), window=width)


def _packed(seq_len: int) -> Pattern:
    return _packed_into((0, *np.cumsum(document_lengths(seq_len)).tolist()), seq_len)


def _packed_into(cu_seqlens: tuple[int, ...], seq_len: int) -> Pattern:
    return Pattern(_of_mask(ringattn.documents(cu_seqlens) & ringattn.causal(), seq_len), cu_seqlens=cu_seqlens)


def _ring_step(source: int) -> Callable[[int], Pattern]:
    """The tiles of the step of a zigzag ring in which RING_RANK attends to the block of `source`."""

    def pattern(seq_len: int) -> Pattern:
        layout = ringattn.zigzag(seq_len * RING_RANKS, RING_RANKS)
        plan = build_plan(Ring(), (ringattn.causal(),), layout, layout, RING_RANK)
        found = (visit.tiles for visit in plan.forward.visits if visit.piece.block == source)
        return Pattern(next(found, NO_TILES))

    return pattern


CASES = {
    case.name: case
    for case in (
        Case("causal", "dense causal", lambda n: Pattern(_of_mask(ringattn.causal(), n))),
        Case("full", "dense, everything", lambda n: Pattern(_of_mask(ringattn.full(), n))),
        Case("window", "causal sliding window: an eighth of the sequence, 4,096 at most", _window),
        Case("packed", "packed causal documents, long-tailed lengths", _packed),
        Case("window-narrow", f"causal sliding window of {NARROW}", lambda n: _window_of(NARROW, n)),
        Case(
            "packed-short",
            f"packed causal documents of {SHORTEST}",
            lambda n: _packed_into((*range(0, n, SHORTEST), n), n),
        ),
        Case("ring-own", "zigzag ring, step 0: the rank's own block", _ring_step(RING_RANK)),
        Case("ring-upper", "zigzag ring, a block from before: the upper half of the keys", _ring_step(RING_RANK - 1)),
        Case("ring-lower", "zigzag ring, a block from after: the lower half of the queries", _ring_step(RING_RANK + 1)),
    )
}


def flops(area: int, heads: int, head_dim: int, backward: bool) -> float:
    """Returns the floating-point operations of attention over `area` (query, key) pairs.

    Forward has two products of 2 * area * D a head, queries with keys and weights with values; backward has five.
    What a kernel computes outside the area, or again, does not count.
    Source: Dao et al. 2022, arXiv:2205.14135, whose benchmarks count alike.
    """
    return 4.0 * area * heads * head_dim * (2.5 if backward else 1.0)


@dataclass(frozen=True)
class Problem:
    """One case in numbers; batch size 1. seq_len counts the rows of queries, and of keys, of one call."""

    case: str
    seq_len: int
    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    backward: bool
    threads: int

    @cached_property
    def pattern(self) -> Pattern:
        """Which pairs attend."""
        return CASES[self.case].pattern(self.seq_len)

    @property
    def area(self) -> int:
        """(query, key) pairs of a head."""
        return self.pattern.tiles.area()

    @property
    def flops(self) -> float:
        """Operations of one call, counted by area."""
        return flops(self.area, self.heads, self.head_dim, self.backward)

    @property
    def score(self) -> Score:
        """The score, its scale resolved."""
        return Score(self.head_dim**-0.5)

    def call(self, device: torch.device) -> ProblemSpec:
        """Returns what decides which kernels can run it."""
        dtype, dim = getattr(torch, self.dtype), self.head_dim
        return ProblemSpec(device.type, dtype, self.heads, self.kv_heads, dim, dim, self.backward, self.score)

    def tensors(self, device: torch.device) -> list[Tensor]:
        """Returns q, k, v, dout, (1, seq_len, heads, head_dim): the same ones every time."""
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(1, self.seq_len, h, self.head_dim) for h in (self.heads, self.kv_heads, self.kv_heads, self.heads)]
        dtype = getattr(torch, self.dtype)
        return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]
