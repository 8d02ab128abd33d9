"""Merging partial attention: softmax over a union of keys, from softmax over its parts.

Attention over a set A of keys is given by (out_A, lse_A): the weighted mean of the values, and the logarithm of the sum
of the weights. For disjoint A and B

    lse = log(exp(lse_A) + exp(lse_B)),    out = out_A + sigmoid(lse_B - lse_A) * (out_B - out_A)

which is exact, and associative up to rounding. Its neutral element is (0, -inf): no keys.
Derived in docs/maths.md; Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which results for inputs of `dtype` are accumulated: float64 stays, the rest is fp32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


class State(NamedTuple):
    """The running result of some queries: attention over the keys that they have attended to so far.

    Args:
        out: (B, S, H, Dv), the weighted mean of the values, in the accumulation dtype.
        lse: (B, H, S), the log-sum-exp of the scores, natural log, in the same dtype. A row that has attended to
            nothing is (0, -inf).
    """

    out: Tensor
    lse: Tensor

    def of_heads(self, heads: range) -> State:
        """Returns views of some consecutive query heads."""
        run = slice(heads.start, heads.stop)
        return State(self.out[:, :, run], self.lse[:, run])


def empty_state(q: Tensor, v_dim: int, out: Tensor | None = None, lse: Tensor | None = None) -> State:
    """Returns the state of queries that have attended to nothing: out is 0, lse is -inf.

    Args:
        q: (B, S, H, D), any floating dtype.
        v_dim: Dv, the values' head dim.
        out: memory for the state, (B, S, H, Dv) in the accumulation dtype, overwritten; None allocates it.
        lse: the same, (B, H, S).
    """
    batch, rows, heads, _ = q.shape
    dtype = accumulation_dtype(q.dtype)
    if out is None:
        out = torch.zeros(batch, rows, heads, v_dim, dtype=dtype, device=q.device)
    else:
        out.zero_()
    if lse is None:
        lse = torch.full((batch, heads, rows), -torch.inf, dtype=dtype, device=q.device)
    else:
        lse.fill_(-torch.inf)
    return State(out, lse)


def merge_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merges a partial result into the running state, in place.

    Args:
        out: running output (B, S, H, Dv), accumulation dtype; updated.
        lse: running log-sum-exp (B, H, S), natural log, -inf for a row without keys; updated.
        part: output over further keys, (B, S, H, Dv); finite also where part_lse is -inf.
        part_lse: its log-sum-exp (B, H, S).
    """
    weight = torch.sigmoid(part_lse - lse)
    # Without keys on both sides, (-inf) - (-inf) is NaN; out must not change.
    weight.nan_to_num_(nan=0.0)
    out.lerp_(part.to(out.dtype), weight.transpose(1, 2).unsqueeze(-1))
    torch.logaddexp(lse, part_lse, out=lse)


def merge_parts(outs: Tensor, lses: Tensor, *, first: int = 0, sink: Tensor | None = None) -> Tensor:
    """Returns the output over all keys, from outputs over disjoint parts of them. The order of summation is fixed.

    Args:
        outs: outputs over each part, (parts, B, S, H, Dv); zero where lses is -inf.
        lses: their log-sum-exps, (parts, B, H, S), natural log.
        first: the index, in the order of summation, of the part at index 0; the other parts keep their order.
        sink: (H,) logits that take part in each row's denominator, or None; see `add_sink_`.
    Returns:
        (B, S, H, Dv).
    """
    if first:
        order = [*range(1, first + 1), 0, *range(first + 1, len(outs))]
        outs, lses = (torch.stack([x[index] for index in order]) for x in (outs, lses))
    # A row without any keys: (-inf) - (-inf) would be NaN. Clamped, its zeros get equal weights.
    limits = torch.finfo(lses.dtype)
    lses = lses.clamp(min=limits.min)
    max_lse = lses.amax(dim=0)
    logit = None if sink is None else sink.to(lses.dtype).clamp(limits.min, limits.max)[:, None]
    if logit is not None:
        max_lse = torch.maximum(max_lse, logit)
    # Not torch.softmax, whose result for a row depends on the number of rows.
    weights = torch.exp_(lses - max_lse)
    total = _sum_in_order(weights)
    weights /= total if logit is None else total + torch.exp(logit - max_lse)
    return _sum_in_order(outs * weights.transpose(2, 3).unsqueeze(-1))


def _sum_in_order(parts: Tensor) -> Tensor:
    """Sums along the first dim, in order. The order of torch.sum depends on strides from five parts on."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def add_sink_(out: Tensor, lse: Tensor, sink: Tensor) -> None:
    """Adds a logit per head, whose value is zero, to each row's denominator, in place.

    Args:
        out: final output (B, S, H, Dv); updated.
        lse: final log-sum-exp (B, H, S); updated to include the sink.
        sink: (H,) logits.
    Source: the attention sinks of GPT-OSS; Xiao et al. 2023, arXiv:2309.17453.
    """
    logit = sink.to(lse.dtype)[:, None]
    out.mul_(torch.sigmoid(lse - logit).transpose(1, 2).unsqueeze(-1))
    torch.logaddexp(lse, logit.expand_as(lse), out=lse)


def sink_gradient(sink: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Returns the sink's gradient (H,): the sink is a key whose value is zero.

    Args:
        sink: (H,) logits.
        lse: final log-sum-exp, the sink included, (B, H, S).
        delta: rowsum(dout * out) minus the gradient of lse, (B, H, S).
    """
    probability = torch.exp(sink.to(lse.dtype)[:, None] - lse)
    return -(probability * delta).sum(dim=(0, 2)).to(sink.dtype)
