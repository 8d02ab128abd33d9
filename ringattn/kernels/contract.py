"""The kernel contract: the values that a kernel takes, and the protocol that it implements.

A kernel computes attention over a list of tiles and accumulates: `forward` merges into a running state (out, lse),
`backward` adds to dq, dk, dv. Its cost follows the area of the tiles, not the rectangle around them. Code above this
room knows kernels only by this module.

    forward(queries, keys, tiles, score, state)           state merged in place
    backward(queries, keys, tiles, score, gradients)      gradients added in place

Shapes, throughout: B batch rows, Sq query rows, Sk key rows, H query heads, Hkv kv heads with H % Hkv == 0, head dim D
of q and k, head dim Dv of v and out. Query head h uses kv head h // (H // Hkv). Tensors (batch, rows, heads, dim) may
be strided views whose last dim is contiguous.

A call covers one group of heads. Tiles are the same for all heads of a call, so the executor calls a kernel once per
head group, with views of that group's heads (`of_heads`), its score and its tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ringattn.geometry.tiles import Tiles
from ringattn.score import Score
from ringattn.softmax import State

__all__ = [
    "BackwardQueries",
    "BlockKernel",
    "Gradients",
    "Keys",
    "ProblemSpec",
    "Queries",
    "State",
    "unsupported_terms",
]


class Queries(NamedTuple):
    """The queries of a forward.

    Args:
        q: (B, Sq, H, D), any floating dtype.
        positions: (Sq,) int64, the global position of each row; given only if a term of the score depends on positions.
    """

    q: Tensor
    positions: Tensor | None = None

    def of_heads(self, heads: range) -> Queries:
        """Returns views of some consecutive query heads."""
        return self._replace(q=_select_heads(self.q, heads))


class Keys(NamedTuple):
    """A block of keys and values.

    Args:
        k: (B, Sk, Hkv, D), in q's dtype.
        v: (B, Sk, Hkv, Dv), in q's dtype.
        positions: (Sk,) int64, the global position of each row; given only if a term of the score depends on positions.
    """

    k: Tensor
    v: Tensor
    positions: Tensor | None = None

    def of_heads(self, kv_heads: range) -> Keys:
        """Returns views of some consecutive kv heads."""
        return self._replace(k=_select_heads(self.k, kv_heads), v=_select_heads(self.v, kv_heads))


class BackwardQueries(NamedTuple):
    """The queries of a backward, with what the forward over all keys has made of them.

    The gradient of a score is p * (dout · v - delta) with p = exp(score - lse), whichever block the key is in.

    Args:
        q: (B, Sq, H, D).
        dout: (B, Sq, H, Dv), the gradient of out, in q's dtype.
        lse: (B, H, Sq), the final log-sum-exp over all keys, natural log, in the accumulation dtype.
        delta: (B, H, Sq), rowsum(dout * out) of the final out, minus the gradient of lse if there is one; the same
            dtype.
        lse_grad: delta holds a gradient of lse besides rowsum(dout * out), so it may be nonzero where dout is zero.
        positions: (Sq,) int64, as in `Queries`.
    """

    q: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor
    lse_grad: bool = False
    positions: Tensor | None = None

    def of_heads(self, heads: range) -> BackwardQueries:
        """Returns views of some consecutive query heads."""
        run = slice(heads.start, heads.stop)
        return self._replace(
            q=self.q[:, :, run], dout=self.dout[:, :, run], lse=self.lse[:, run], delta=self.delta[:, run]
        )


class Gradients(NamedTuple):
    """The gradients of q, k and v, of the same shapes: (B, Sq, H, D), (B, Sk, Hkv, D), (B, Sk, Hkv, Dv).

    A `BlockKernel` adds to them; they are then in the accumulation dtype, as lse.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor

    def of_heads(self, heads: range, kv_heads: range) -> Gradients:
        """Returns views of some consecutive query heads and their kv heads."""
        return Gradients(
            _select_heads(self.dq, heads), _select_heads(self.dk, kv_heads), _select_heads(self.dv, kv_heads)
        )


def _select_heads(x: Tensor, heads: range) -> Tensor:
    return x[:, :, heads.start : heads.stop]


@dataclass(frozen=True)
class ProblemSpec:
    """The properties of a call that decide whether a kernel can run it: equal on all ranks, known before any message.

    Args:
        device_type: "cpu", "cuda", ...
        dtype: of q, k, v.
        heads: H.
        kv_heads: Hkv.
        head_dim: D.
        v_head_dim: Dv.
        needs_grad: a backward may follow.
        score: with its scale resolved; its tensors are ignored.
    """

    device_type: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    needs_grad: bool
    score: Score


def unsupported_terms(problem: ProblemSpec, supported: frozenset[str]) -> list[str]:
    """Returns a reason for each term of the problem's score that is not in `supported`.

    Each kernel passes its `score_terms`, so a term that is added to `Score` is refused by every kernel that does not
    list it.
    """
    return [f"has no {term}" for term in sorted(problem.score.terms() - supported)]


class BlockKernel(Protocol):
    """Attention of one rank's queries over one block of keys and values."""

    def __hash__(self) -> int: ...

    @property
    def name(self) -> str:
        """The key in BACKENDS."""
        ...

    @property
    def about(self) -> str:
        """One line for people: what it is and what it takes."""
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

    def forward(self, queries: Queries, keys: Keys, tiles: Tiles, score: Score, state: State) -> None:
        """Merges attention over the tiles into the state, in place."""
        ...

    def backward(self, queries: BackwardQueries, keys: Keys, tiles: Tiles, score: Score, gradients: Gradients) -> None:
        """Adds the gradients over the tiles to dq, dk and dv, in place."""
        ...
