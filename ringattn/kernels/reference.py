"""The reference kernel: plain tensor operations, on any device, in any dtype, with every option.

It is the oracle of the other kernels, and the last resort for problems that they refuse. Each tile is computed in
strips of query rows against the keys visible to the strip, so its cost follows the area, too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ringattn.geometry.tiles import Tile, Tiles
from ringattn.kernels.contract import (
    BackwardQueries,
    Gradients,
    Keys,
    ProblemSpec,
    Queries,
    State,
    unsupported_terms,
)
from ringattn.score import Score
from ringattn.softmax import merge_

STRIP_ROWS = 256


class ReferenceKernel:
    """A `BlockKernel` in plain tensor operations, on any device and in any floating dtype."""

    name = "reference"
    about = "plain tensor maths: any device, any dtype, every option; the last resort"
    score_terms = frozenset({"softcap"})

    def available(self) -> list[str]:
        """Always runs."""
        return []

    def unsupported(self, problem: ProblemSpec) -> list[str]:
        """Refuses only terms of the score that it does not compute."""
        return unsupported_terms(problem, self.score_terms)

    def forward(self, queries: Queries, keys: Keys, tiles: Tiles, score: Score, state: State) -> None:
        q, k, v, (out, lse) = queries.q, keys.k, keys.v, state
        for strip in _strips(tiles):
            b, i, j = _indices(strip)
            scores, _ = _scores(q[b, i], k[b, j], score, strip, lse.dtype)
            part_lse = torch.logsumexp(scores, dim=-1)
            weights = torch.exp(scores - part_lse[..., None])
            part = _weighted(weights, v[b, j].to(lse.dtype))
            merge_(out[b, i], lse[b, :, i], part, part_lse)

    def backward(self, queries: BackwardQueries, keys: Keys, tiles: Tiles, score: Score, gradients: Gradients) -> None:
        q, dout, lse, delta = queries[:4]
        k, v, (dq, dk, dv) = keys.k, keys.v, gradients
        acc = lse.dtype
        for strip in _strips(tiles):
            b, i, j = _indices(strip)
            q_i, k_j, v_j, dout_i = q[b, i].to(acc), k[b, j].to(acc), v[b, j].to(acc), dout[b, i].to(acc)
            scores, slope = _scores(q_i, k_j, score, strip, acc)
            p = torch.exp(scores - lse[b, :, i, None])
            dp = _grouped_dot(dout_i, v_j)
            ds = p * (dp - delta[b, :, i, None]) * score.factor
            if slope is not None:
                ds = ds * slope
            dq[b, i] += _weighted(ds, k_j)
            dk[b, j] += _weighted_transposed(ds, q_i, k.shape[2])
            dv[b, j] += _weighted_transposed(p, dout_i, v.shape[2])


def _strips(tiles: Tiles) -> Iterator[Tile]:
    for tile in tiles:
        for start in range(tile.q_start, tile.q_stop, STRIP_ROWS):
            stop = min(start + STRIP_ROWS, tile.q_stop)
            k_start, k_stop = max(tile.k_start, start + tile.lo), min(tile.k_stop, stop + tile.hi)
            yield tile._replace(q_start=start, q_stop=stop, k_start=k_start, k_stop=k_stop)


def _indices(tile: Tile) -> tuple[slice, slice, slice]:
    batch = slice(None) if tile.batch < 0 else slice(tile.batch, tile.batch + 1)
    return batch, slice(tile.q_start, tile.q_stop), slice(tile.k_start, tile.k_stop)


def _scores(q: Tensor, k: Tensor, score: Score, tile: Tile, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Returns the scores (B, H, Sq, Sk), -inf outside the band, and the derivative of the softcap, if any."""
    scores = _grouped_dot(q.to(dtype), k.to(dtype)) * score.factor
    slope = None
    if score.softcap is not None:
        squashed = torch.tanh(scores / score.softcap)
        scores, slope = score.softcap * squashed, 1.0 - squashed * squashed
    rows = torch.arange(tile.q_start, tile.q_stop, device=q.device)[:, None]
    diagonal = torch.arange(tile.k_start, tile.k_stop, device=q.device)[None, :] - rows
    outside = (diagonal < tile.lo) | (diagonal > tile.hi)
    return scores.masked_fill_(outside, -torch.inf), slope


def _grouped_dot(a: Tensor, b: Tensor) -> Tensor:
    """(B, Sq, H, D), (B, Sk, Hkv, D) -> (B, H, Sq, Sk)."""
    batch, rows, heads, dim = a.shape
    kv_heads = b.shape[2]
    grouped = a.reshape(batch, rows, kv_heads, heads // kv_heads, dim)
    return torch.einsum("bqhgd,bkhd->bhgqk", grouped, b).reshape(batch, heads, rows, b.shape[1])


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """(B, H, Sq, Sk), (B, Sk, Hkv, D) -> (B, Sq, H, D)."""
    batch, heads, rows, cols = weights.shape
    kv_heads = values.shape[2]
    grouped = weights.reshape(batch, kv_heads, heads // kv_heads, rows, cols)
    return torch.einsum("bhgqk,bkhd->bqhgd", grouped, values).reshape(batch, rows, heads, values.shape[3])


def _weighted_transposed(weights: Tensor, values: Tensor, kv_heads: int) -> Tensor:
    """(B, H, Sq, Sk), (B, Sq, H, D) -> (B, Sk, Hkv, D), summed over the heads of a group."""
    batch, heads, rows, cols = weights.shape
    group = heads // kv_heads
    grouped = weights.reshape(batch, kv_heads, group, rows, cols)
    return torch.einsum("bhgqk,bqhgd->bkhd", grouped, values.reshape(batch, rows, kv_heads, group, values.shape[3]))
