"""Stand-ins for the functions of FlashAttention 2, 3 and 4, in plain torch: their parameters, checks and peculiarities.

Read in the sources of flash-attn 2.8, flash-attn-3 of August 2026 and flash-attn-4 4.0.0b36. They compute in the dtype
of the state, so that float64 shows a pair too many or too few; results are rounded to the dtype of the inputs, as the
kernels' are. What the kernels leave unwritten is left as `torch.empty` gives it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ringattn.kernels import flash_import
from ringattn.softmax import accumulation_dtype

NO_LIMIT = 1 << 40


class Shape(NamedTuple):
    """A call's segments, as slices of packed rows, and its limits."""

    segments: tuple[tuple[slice, slice], ...]
    left: int
    right: int


def scores_of(q: Tensor, k: Tensor, shape: Shape, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """One segment's scores (H, Sq, Sk), -inf outside its window, and their slope. Windows are aligned bottom-right."""
    wide = accumulation_dtype(q.dtype)
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).to(wide)
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), keys) * scale
    slope = torch.ones_like(scores)
    if softcap:
        squashed = torch.tanh(scores / softcap)
        scores, slope = softcap * squashed, 1 - squashed**2
    ahead = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))
    return scores.masked_fill((ahead < -shape.left) | (ahead > shape.right), -torch.inf), slope


def attend(
    q: Tensor, k: Tensor, v: Tensor, shape: Shape, scale: float, softcap: float, empty_lse: float
) -> tuple[Tensor, Tensor]:
    """Packed rows: out (total, H, Dv) and lse (H, total)."""
    wide = accumulation_dtype(q.dtype)
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=wide)
    for i, j in shape.segments:
        scores, _ = scores_of(q[i], k[j], shape, scale, softcap)
        found = scores.logsumexp(-1)
        weights = (scores - found[..., None]).exp().nan_to_num(nan=0.0)
        values = v[j].repeat_interleave(q.shape[1] // v.shape[1], dim=1).to(wide)
        out[i] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
        lse[:, i] = found.masked_fill(found == -torch.inf, empty_lse)
    return out, lse


def differentiate(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    into: tuple[Tensor, Tensor, Tensor],
    shape: Shape,
    scale: float,
    softcap: float,
) -> None:
    """Writes dq, dk, dv of packed rows from the lse given, which need not be that of these keys alone."""
    wide, group = accumulation_dtype(q.dtype), q.shape[1] // k.shape[1]
    delta = (dout.to(wide) * out.to(wide)).sum(-1).T
    if dlse is not None:
        delta = delta - dlse
    for x, like in zip(into, (q, k, v), strict=True):
        assert (x.shape, x.dtype) == (like.shape, like.dtype)
    for i, j in shape.segments:
        scores, slope = scores_of(q[i], k[j], shape, scale, softcap)
        p = (scores - lse[:, i, None]).exp().nan_to_num(nan=0.0)
        keys, values = (x[j].repeat_interleave(group, dim=1).to(wide) for x in (k, v))
        dp = torch.einsum("qhd,khd->hqk", dout[i].to(wide), values)
        ds = p * (dp - delta[:, i, None]) * slope * scale
        into[0][i] = torch.einsum("hqk,khd->qhd", ds, keys).to(q.dtype)
        for x, weights, rows in ((into[1], ds, q[i]), (into[2], p, dout[i])):
            whole = torch.einsum("hqk,qhd->khd", weights, rows.to(wide))
            x[j] = whole.view(len(whole), k.shape[1], group, whole.shape[2]).sum(2).to(x.dtype)


def segments_of(q_ends: Tensor, k_ends: Tensor, max_q: int, max_k: int) -> tuple[tuple[slice, slice], ...]:
    for ends, longest in ((q_ends, max_q), (k_ends, max_k)):
        assert ends.dtype is torch.int32
        assert type(longest) is int
        assert int(ends.diff().min()) >= 0
        assert int(ends.diff().max()) <= longest
    assert len(q_ends) == len(k_ends)
    found = zip(pairwise(q_ends.tolist()), pairwise(k_ends.tolist()), strict=True)
    return tuple((slice(*i), slice(*j)) for i, j in found)


def dense_segments(q: Tensor, k: Tensor) -> tuple[tuple[slice, slice], ...]:
    """Those of unpacked rows, (B, S, H, D)."""
    rows, cols = q.shape[1], k.shape[1]
    return tuple((slice(b * rows, (b + 1) * rows), slice(b * cols, (b + 1) * cols)) for b in range(q.shape[0]))


def check_rows(*tensors: Tensor, same_dim: bool) -> None:
    for x in tensors:
        assert x.stride(-1) == 1
        assert x.shape[-1] % 8 == 0
        assert x.shape[-1] <= 256
        assert not same_dim or x.shape[-1] == tensors[0].shape[-1]


def check_lse(lse: Tensor, q: Tensor) -> None:
    """The kernels compute addresses as if it were contiguous."""
    assert lse.is_contiguous()
    assert lse.shape == ((q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1]))


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, shape: Shape, scale: float, softcap: float, empty_lse: float
) -> tuple[Tensor, Tensor]:
    """Packed or not."""
    if q.dim() == 3:
        return attend(q, k, v, shape, scale, softcap, empty_lse)
    out, lse = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), shape, scale, softcap, empty_lse)
    batch, rows = q.shape[:2]
    return out.view(batch, rows, *out.shape[1:]), lse.view(-1, batch, rows).transpose(0, 1).contiguous()


def run_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    into: tuple[Tensor | None, Tensor | None, Tensor | None],
    shape: Shape,
    scale: float,
    softcap: float,
) -> None:
    check_lse(lse, q)
    dq, dk, dv = into
    assert dq is not None
    assert dk is not None
    assert dv is not None
    if q.dim() == 3:
        differentiate(dout, q, k, v, out, lse, dlse, (dq, dk, dv), shape, scale, softcap)
        return
    dout, q, k, v, out = (x.flatten(0, 1) for x in (dout, q, k, v, out))
    lse, dlse = lse.transpose(0, 1).flatten(1), None if dlse is None else dlse.transpose(0, 1).flatten(1)
    grads = (dq.view(-1, *dq.shape[2:]), dk.view(-1, *dk.shape[2:]), dv.view(-1, *dv.shape[2:]))
    differentiate(dout, q, k, v, out, lse, dlse, grads, shape, scale, softcap)


def limits2(causal: bool, left: int, right: int, max_k: int) -> tuple[int, int]:
    """Generation 2 takes limits of as many keys as there are for none, and none beside a limit for as many keys."""
    left, right = (-1 if x >= max_k else x for x in (left, 0 if causal else right))
    if left < 0 and right < 0:
        return NO_LIMIT, NO_LIMIT
    return (max_k if left < 0 else left), (max_k if right < 0 else right)


def module2() -> ModuleType:
    def _flash_attn_forward(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool,
        window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
        return_softmax: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        check_rows(q, k, v, same_dim=True)
        assert not dropout_p
        shape = Shape(dense_segments(q, k), *limits2(causal, window_size_left, window_size_right, k.shape[1]))
        return *run_forward(q, k, v, shape, softmax_scale, softcap, torch.inf), q.new_empty(0), q.new_empty(0)

    def _flash_attn_varlen_forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1,
        window_size_right: int = -1, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
        return_softmax: bool = False, block_table: Tensor | None = None, leftpad_k: Tensor | None = None,
        seqused_k: Tensor | None = None, zero_tensors: bool = False, num_splits: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        check_rows(q, k, v, same_dim=True)
        if max_seqlen_q == 1 and q.shape[1] > k.shape[1] and window_size_left < 0 and window_size_right < 0:
            # It moves the heads of a group into the place of the rows, one row to a segment.
            assert len(q) == len(cu_seqlens_q) - 1, "shape is invalid for input of this size"
        segments = segments_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        shape = Shape(segments, *limits2(causal, window_size_left, window_size_right, max_seqlen_k))
        return *run_forward(q, k, v, shape, softmax_scale, softcap, torch.inf), q.new_empty(0), q.new_empty(0)

    def _flash_attn_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
        dk: Tensor | None, dv: Tensor | None, dropout_p: float, softmax_scale: float, causal: bool,
        window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
        deterministic: bool, rng_state: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        check_rows(q, k, v, dout, out, same_dim=True)
        shape = Shape(dense_segments(q, k), *limits2(causal, window_size_left, window_size_right, k.shape[1]))
        run_backward(dout, q, k, v, out, softmax_lse, None, (dq, dk, dv), shape, softmax_scale, softcap)
        return q.new_empty(0)

    def _flash_attn_varlen_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
        dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
        window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
        rng_state: Tensor | None = None, zero_tensors: bool = False,
    ) -> Tensor:  # fmt: skip
        check_rows(q, k, v, dout, out, same_dim=True)
        segments = segments_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        shape = Shape(segments, *limits2(causal, window_size_left, window_size_right, max_seqlen_k))
        run_backward(dout, q, k, v, out, softmax_lse, None, (dq, dk, dv), shape, softmax_scale, softcap)
        return q.new_empty(0)

    return module_of(
        "flash_attn.flash_attn_interface",
        _flash_attn_forward, _flash_attn_varlen_forward, _flash_attn_backward, _flash_attn_varlen_backward,
    )  # fmt: skip


def shape3(
    q: Tensor, k: Tensor, causal: bool, left: int, right: int, q_ends: Tensor | None, k_ends: Tensor | None,
    max_q: int | None, max_k: int | None,
) -> Shape:  # fmt: skip
    """Generation 3: packed or not, and limits that cut nothing off the longest segment for none."""
    if q_ends is None or k_ends is None:
        assert q_ends is k_ends is None
        assert max_q is max_k is None
        max_q, max_k, segments = q.shape[1], k.shape[1], dense_segments(q, k)
    else:
        assert max_q is not None
        assert max_k is not None
        segments = segments_of(q_ends, k_ends, max_q, max_k)
    left = -1 if left >= max_k - 1 else left
    right = 0 if causal else -1 if right >= max_q - 1 else right
    return Shape(segments, max_k - 1 if left < 0 else left, max_q - 1 if right < 0 else right)


def module3() -> ModuleType:
    def check_dims(q: Tensor, k: Tensor, v: Tensor) -> None:
        dim, v_dim = q.shape[-1], v.shape[-1]
        latent = (128 < dim <= 192 and 96 < v_dim <= 128) or (dim <= 64 and v_dim <= 512)
        check_rows(q, k, v, same_dim=not latent)

    def _flash_attn_forward(
        q: Tensor, k: Tensor, v: Tensor, k_new: Tensor | None = None, v_new: Tensor | None = None,
        qv: Tensor | None = None, out_: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None, cu_seqlens_k_new: Tensor | None = None,
        seqused_q: Tensor | None = None, seqused_k: Tensor | None = None, max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None, page_table: Tensor | None = None, kv_batch_idx: Tensor | None = None,
        leftpad_k: Tensor | None = None, rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
        seqlens_rotary: Tensor | None = None, q_descale: Tensor | None = None, k_descale: Tensor | None = None,
        v_descale: Tensor | None = None, softmax_scale: float | None = None, causal: bool = False,
        window_size_left: int = -1, window_size_right: int = -1, attention_chunk: int = 0, softcap: float = 0.0,
        rotary_interleaved: bool = True, scheduler_metadata: Tensor | None = None, num_splits: int = 1,
        pack_gqa: bool | None = None, sm_margin: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        check_dims(q, k, v)
        assert softmax_scale is not None
        ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        shape = shape3(q, k, causal, window_size_left, window_size_right, *ends)
        return *run_forward(q, k, v, shape, softmax_scale, softcap, -torch.inf), q.new_empty(0), q.new_empty(0)

    def _flash_attn_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
        cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, sequed_q: Tensor | None = None,
        sequed_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
        dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None,
        softmax_scale: float | None = None, is_causal: bool = False, window_size_left: int = -1,
        window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False, sm_margin: int = 0,
    ) -> Tensor:  # fmt: skip
        check_dims(q, k, v)
        assert softmax_scale is not None
        ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        shape = shape3(q, k, is_causal, window_size_left, window_size_right, *ends)
        run_backward(dout, q, k, v, out, softmax_lse, None, (dq, dk, dv), shape, softmax_scale, softcap)
        return q.new_empty(0)

    return module_of("flash_attn_interface", _flash_attn_forward, _flash_attn_backward)


def shape4(
    q: Tensor, k: Tensor, causal: bool, left: int | None, right: int | None, q_ends: Tensor | None,
    k_ends: Tensor | None, max_q: int | None, max_k: int | None,
) -> Shape:  # fmt: skip
    """Generation 4: no limit is None, or -1 on both sides; -1 on one side is a limit."""
    if left is not None and right is not None and left < 0 and right < 0:
        left = right = None
    right = 0 if causal else right
    if q_ends is None or k_ends is None:
        segments = dense_segments(q, k)
    else:
        segments = segments_of(q_ends, k_ends, max_q or 0, max_k or 0)
    return Shape(segments, NO_LIMIT if left is None else left, NO_LIMIT if right is None else right)


def module4() -> ModuleType:
    def check_dims(q: Tensor, k: Tensor, v: Tensor) -> None:
        """Those of Blackwell."""
        dim, v_dim = q.shape[-1], v.shape[-1]
        assert max(dim, v_dim) <= 128 or (dim, v_dim) in ((192, 128), (256, 256))
        check_rows(q, k, v, same_dim=False)

    def _flash_attn_fwd(
        q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None, seqused_q: Tensor | None = None, seqused_k: Tensor | None = None,
        max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, min_seqlen_k: int | None = None,
        page_table: Tensor | None = None, softmax_scale: float | None = None, causal: bool = False,
        softcap: float | None = None, window_size_left: int | None = None, window_size_right: int | None = None,
        learnable_sink: Tensor | None = None, return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None, None, None, None]:  # fmt: skip
        check_dims(q, k, v)
        assert softmax_scale is not None
        ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        shape = shape4(q, k, causal, window_size_left, window_size_right, *ends)
        out, lse = run_forward(q, k, v, shape, softmax_scale, softcap or 0.0, -torch.inf)
        return out, lse if return_lse else None, None, None, None

    def _flash_attn_bwd(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, softmax_scale: float | None = None,
        causal: bool = False, softcap: float = 0.0, window_size_left: int | None = None,
        window_size_right: int | None = None, cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
        deterministic: bool = False, dq: Tensor | None = None, dk: Tensor | None = None,
        dv: Tensor | None = None, dlse: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        check_dims(q, k, v)
        assert softmax_scale is not None
        if dlse is not None:
            check_lse(dlse, q)
        ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        shape = shape4(q, k, causal, window_size_left, window_size_right, *ends)
        run_backward(dout, q, k, v, out, lse, dlse, (dq, dk, dv), shape, softmax_scale, softcap)
        return dq, dk, dv

    return module_of("flash_attn.cute.interface", _flash_attn_fwd, _flash_attn_bwd)


def module_of(name: str, *functions: object) -> ModuleType:
    module = ModuleType(name)
    for function in functions:
        setattr(module, function.__name__, function)  # type: ignore[attr-defined]
    return module


@contextmanager
def installed(*modules: ModuleType) -> Iterator[None]:
    """Within it, these modules, and packages around them, are what is imported by their names."""
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            parts = module.__name__.split(".")
            for depth in range(1, len(parts)):
                package = ModuleType(".".join(parts[:depth]))
                package.__path__ = []
                package.__spec__ = ModuleSpec(package.__name__, None, is_package=True)
                patch.setitem(sys.modules, package.__name__, package)
            module.__spec__ = ModuleSpec(module.__name__, None)
            patch.setitem(sys.modules, module.__name__, module)
        flash_import.import_flash.cache_clear()
        try:
            yield
        finally:
            flash_import.import_flash.cache_clear()
