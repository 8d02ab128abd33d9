"""What a kernel must promise. Everything above knows kernels only by this protocol.

A kernel computes attention over a list of tiles and ACCUMULATES: `forward` merges into a running (out, lse),
`backward` adds to dq, dk, dv. Its cost follows the area of the tiles, not the rectangle around them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ringattn.geometry.tiles import Tiles


@dataclass(frozen=True)
class ScoreOptions:
    """What every tile of a call shares.

    Args:
        scale: factor on q·k before the softmax, dimensionless.
        softcap: if given, scores become softcap * tanh(score / softcap).
        lse_grad: backward only: delta holds a gradient of lse besides rowsum(dout * out).
    """

    scale: float
    softcap: float | None = None
    lse_grad: bool = False


@dataclass(frozen=True)
class ProblemSpec:
    """What decides whether a kernel can run: the same on every rank, and known before any tensor moves."""

    device_type: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    needs_grad: bool
    spec: ScoreOptions


class BlockKernel(Protocol):
    """Attention of one rank's queries over one block of keys/values.

    Shapes, throughout: q (B, Sq, H, D); k (B, Sk, Hkv, D); v (B, Sk, Hkv, Dv) with H % Hkv == 0, query head h
    using kv head h // (H // Hkv). All may be strided views whose last dim is contiguous. State: out
    (B, Sq, H, Dv) and lse (B, H, Sq), natural log, in fp32 (float64 for float64 inputs); a row that has
    attended to nothing is (0, -inf).
    """

    @property
    def name(self) -> str:
        """The key in BACKENDS."""
        ...

    @property
    def about(self) -> str:
        """One line for people: what it is and what it takes."""
        ...

    def available(self) -> list[str]:
        """Returns every reason why this kernel cannot run on this machine at all; empty if it can."""
        ...

    def unsupported(self, call: ProblemSpec) -> list[str]:
        """Returns every reason why it cannot run this call; empty if it can."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, spec: ScoreOptions, out: Tensor, lse: Tensor
    ) -> None:
        """Merges attention over the tiles into (out, lse), in place."""
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        tiles: Tiles,
        spec: ScoreOptions,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """Adds the tiles' gradients to dq, dk, dv, in place.

        dout (B, Sq, H, Dv) is in q's dtype; lse is the FINAL log-sum-exp over all keys; delta (B, H, Sq) is
        rowsum(dout * out) of the final out, minus the gradient of lse if there is one. So the gradient of a
        score is p * (dout·v - delta) with p = exp(score - lse), whatever the other blocks hold. dq, dk, dv are
        accumulators of the shapes of q, k, v in the dtype of lse.
        """
        ...
