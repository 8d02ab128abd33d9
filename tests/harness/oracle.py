"""Attention as the definition has it: one dense matrix of scores, float64, gradients by autograd.

Tensors are (batch, seq, heads, dim) and lse is (batch, heads, seq), natural log, as in the package.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import reduce, repeat
from torch import Tensor


class Gradients(NamedTuple):
    """Attention and the gradients of its inputs; `dsink` is None where there is no sink."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsink: Tensor | None


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The exact (out, lse), float64 whatever the inputs' dtype.

    `allowed` is bool: (Sq, Sk), (B, Sq, Sk) or (B, 1, Sq, Sk). A row with nothing to attend to has out = 0,
    lse = -inf (or its sink), and no gradient.
    """
    sink64 = None if sink is None else sink.double()
    return plain_attention(q.double(), k.double(), v.double(), allowed, scale=scale, softcap=softcap, sink=sink64)


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in the inputs' own dtype throughout: the plain PyTorch that the tolerance rule measures by."""
    heads_per_kv = q.shape[2] // k.shape[2]
    k, v = (repeat(x, "b k h d -> b k (h group) d", group=heads_per_kv) for x in (k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = allowed if allowed.dim() == 2 else allowed.unsqueeze(-3) if allowed.dim() == 3 else allowed
    logits = scores.masked_fill(~seen, -torch.inf)
    empty = ~seen.any(-1).expand(scores.shape[:3])
    if sink is not None:
        logits = torch.cat([logits, sink.to(q.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
        empty = torch.zeros_like(empty)
    # Softmax of a row of -inf is NaN, and so is its gradient, whatever is done to it afterwards. So
    # empty rows are made harmless before it, and their results are set after it, which cuts their gradients.
    logits = logits.masked_fill(empty[..., None], 0.0)
    weights = logits.softmax(-1).masked_fill(empty[..., None], 0.0)[..., : k.shape[1]]
    lse = logits.logsumexp(-1).masked_fill(empty, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse


def dense_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Gradients:
    """`dense_attention` and its gradients for the cotangents `dout` and `dlse`, all float64."""
    q, k, v, dout = q.double(), k.double(), v.double(), dout.double()
    sink = None if sink is None else sink.double()
    return plain_gradients(q, k, v, allowed, dout, dlse, scale=scale, softcap=softcap, sink=sink)


def plain_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Gradients:
    """`plain_attention` and its gradients, each in the dtype of its input."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    sink = None if sink is None else sink.detach().requires_grad_()
    out, lse = plain_attention(q, k, v, allowed, scale=scale, softcap=softcap, sink=sink)
    dlse = torch.zeros_like(lse) if dlse is None else dlse.to(lse.dtype)
    leaves = [q, k, v] if sink is None else [q, k, v, sink]
    dq, dk, dv, *dsink = torch.autograd.grad([out, lse], leaves, [dout.to(out.dtype), dlse])
    return Gradients(out.detach(), lse.detach(), dq, dk, dv, dsink[0] if dsink else None)


def sizes_of_terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
) -> Gradients:
    """What (out, lse, dq, dk, dv) would be if no two terms cancelled: what their roundings are measured by.

    Weights are recomputed from scores and an lse that are both rounded, so each is off by as many roundings as the
    larger of the two has units; hence the factor.
    """
    q, k, v, dout = q.double(), k.double(), v.double(), dout.double()
    group = q.shape[2] // k.shape[2]
    wide_k, wide_v = (repeat(x.abs(), "b k h d -> b k (h group) d", group=group) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.abs(), wide_k) * abs(scale)
    units = 1.0 + (scores.max() if scores.numel() else scores.new_zeros(())).item()
    out, lse = dense_attention(q, k, v, allowed, scale=scale, softcap=softcap)
    eye = repeat(torch.eye(k.shape[1], dtype=torch.float64), "k d -> b k h d", b=q.shape[0], h=k.shape[2])
    weights = dense_attention(q, k, eye, allowed, scale=scale, softcap=softcap)[0].transpose(1, 2)
    delta = (dout * out).sum(-1).abs().transpose(1, 2) + (0 if dlse is None else dlse.double().abs())
    ds = weights * (torch.einsum("bqhd,bkhd->bhqk", dout.abs(), wide_v) + delta[..., None]) * abs(scale)

    def by_key(terms: Tensor, rows: Tensor) -> Tensor:
        by_head = torch.einsum("bhqk,bqhd->bkhd", terms, rows.abs())
        return reduce(by_head, "b k (h group) d -> b k h d", "sum", group=group)

    return Gradients(
        out=torch.einsum("bhqk,bkhd->bqhd", weights, wide_v) * units,
        lse=torch.full_like(lse, units),
        dq=torch.einsum("bhqk,bkhd->bqhd", ds, wide_k) * units,
        dk=by_key(ds, q) * units,
        dv=by_key(weights, dout) * units,
        dsink=None,
    )
