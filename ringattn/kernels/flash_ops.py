"""The installed FlashAttention 2, 3 and 4 behind one interface. Each is imported on first use.

Common to all: a window is aligned to the last query and the last key; lse is a natural logarithm in fp32, (B, H, S), or
(H, total) for packed rows; results have the dtype of the inputs. The differences are handled here, with the reason
beside each, after the sources of flash-attn 2.8, flash-attn-3 of August 2026, and flash-attn-4 4.0.0b36.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ringattn.kernels.contract import Gradients, ProblemSpec
from ringattn.kernels.flash_import import Functions, import_flash
from ringattn.kernels.varlen import Window
from ringattn.score import Score


class VarlenArgs(NamedTuple):
    """The segments of packed rows: their ends, int32 (segments + 1,) on the device, and their maximal lengths."""

    q_ends: Tensor
    k_ends: Tensor
    max_q: int
    max_k: int


class FlashOperands(NamedTuple):
    """The operands of one call: (B, S, H, D) tensors, or (total, H, D) where rows are packed in segments."""

    q: Tensor
    k: Tensor
    v: Tensor
    window: Window
    segments: VarlenArgs | None
    score: Score


class FlashResults(NamedTuple):
    """What a backward takes of a forward's results: dout and out in the shape of q with Dv, lse and dlse as an lse."""

    dout: Tensor
    out: Tensor
    lse: Tensor
    dlse: Tensor | None


class FlashOp(Protocol):
    """One generation of FlashAttention."""

    @property
    def module(self) -> str:
        """The module of its functions."""
        ...

    @property
    def functions(self) -> Functions:
        """The functions that are called, and the parameters that distinguish this interface from older ones."""
        ...

    @property
    def takes_dlse(self) -> bool:
        """Whether its backward takes a gradient of lse."""
        ...

    def required_device(self, capability: tuple[int, int]) -> str | None:
        """Returns the required compute capability if this one does not suffice, else None."""
        ...

    def padded_dims(self, dim: int, v_dim: int) -> tuple[int, int] | None:
        """Returns the head dims (of q and k, of v) to pad to with zeros; None if no kernel is wide enough."""
        ...

    def missing_feature(self, problem: ProblemSpec, capability: tuple[int, int]) -> str | None:
        """Returns a feature that a problem needs and this GPU's kernels lack, as "no ..."; else None."""
        ...

    def forward(self, operands: FlashOperands) -> tuple[Tensor, Tensor]:
        """Returns out (..., H, Dv) and lse."""
        ...

    def backward(self, operands: FlashOperands, results: FlashResults, into: Gradients) -> None:
        """Writes dq, dk and dv, in the shapes and dtypes of q, k and v.

        Rows in no segment may be left as they are.
        """
        ...


class Flash2:
    """flash-attn 2, for NVIDIA GPUs from Ampere on."""

    module = "flash_attn.flash_attn_interface"
    functions = (
        ("_flash_attn_forward", ("window_size_left", "softcap")),
        ("_flash_attn_varlen_forward", ("window_size_left", "softcap")),
        ("_flash_attn_backward", ("window_size_left", "softcap")),
        ("_flash_attn_varlen_backward", ("window_size_left", "softcap")),
    )
    takes_dlse = False

    def required_device(self, capability: tuple[int, int]) -> str | None:
        return None if capability >= (8, 0) else "compute capability 8.0 and newer"

    def padded_dims(self, dim: int, v_dim: int) -> tuple[int, int] | None:
        """q, k and v have one head dim, a multiple of 8 up to 256."""
        return _equal_dims(dim, v_dim, 256)

    def missing_feature(self, problem: ProblemSpec, capability: tuple[int, int]) -> str | None:
        """Lacks nothing."""
        return None

    def forward(self, operands: FlashOperands) -> tuple[Tensor, Tensor]:
        """Returns lse = +inf for rows without keys, which `merge_part_` takes for -inf."""
        flash = import_flash(self.module)
        q, k, v, window, segments, score = operands
        options = _window_kwargs(window, -1) | {
            "dropout_p": 0.0,
            "softmax_scale": score.factor,
            "causal": window.causal,
            "softcap": score.softcap or 0.0,
            "alibi_slopes": None,
            "return_softmax": False,
        }
        if segments is None:
            results = flash._flash_attn_forward(q, k, v, **options)
        else:
            results = flash._flash_attn_varlen_forward(q, k, v, **self._varlen_kwargs(segments, window), **options)
        return results[0], results[1]

    def backward(self, operands: FlashOperands, results: FlashResults, into: Gradients) -> None:
        flash = import_flash(self.module)
        q, k, v, window, segments, score = operands
        dout, out, lse, _ = results
        options = _window_kwargs(window, -1) | {
            "dropout_p": 0.0,
            "softmax_scale": score.factor,
            "causal": window.causal,
            "softcap": score.softcap or 0.0,
            "alibi_slopes": None,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        if segments is None:
            flash._flash_attn_backward(dout, q, k, v, out, lse, *into, **options)
        else:
            varlen_kwargs = self._varlen_kwargs(segments, window)
            flash._flash_attn_varlen_backward(dout, q, k, v, out, lse, *into, **varlen_kwargs, **options)

    def _varlen_kwargs(self, segments: VarlenArgs, window: Window) -> dict[str, Any]:
        """Returns the arguments for segments; max_seqlen need only be an upper bound."""
        # With max_seqlen_q == 1, each segment is assumed to have exactly one query.
        max_q = max(segments.max_q, 2)
        # A limit of max_seqlen_k keys or more is taken for no limit, and no limit beside a limit for max_seqlen_k keys.
        # Both are wrong for the first queries of a segment with more queries than keys.
        limited = not window.causal and (window.left is not None or window.right is not None)
        return {
            "cu_seqlens_q": segments.q_ends,
            "cu_seqlens_k": segments.k_ends,
            "max_seqlen_q": max_q,
            "max_seqlen_k": max(segments.max_k, max_q) if limited else segments.max_k,
        }


class Flash3:
    """flash-attn 3, for Hopper."""

    module = "flash_attn_interface"
    functions = (
        ("_flash_attn_forward", ("cu_seqlens_q", "window_size_left", "softcap")),
        ("_flash_attn_backward", ("cu_seqlens_q", "is_causal", "window_size_left", "softcap")),
    )
    takes_dlse = False

    def required_device(self, capability: tuple[int, int]) -> str | None:
        """Its kernels use instructions of Hopper alone."""
        return None if capability == (9, 0) else "compute capability 9.0"

    def padded_dims(self, dim: int, v_dim: int) -> tuple[int, int] | None:
        """One head dim, a multiple of 8 up to 256, or 192 with values of 128."""
        return _latent_dims(dim, v_dim) or _equal_dims(dim, v_dim, 256)

    def missing_feature(self, problem: ProblemSpec, capability: tuple[int, int]) -> str | None:
        """Lacks deterministic gradients of the widest heads."""
        wide = max(problem.head_dim, problem.v_head_dim) > 192
        deterministic = problem.needs_grad and torch.are_deterministic_algorithms_enabled()
        return "no deterministic gradients of head dims above 192" if wide and deterministic else None

    def forward(self, operands: FlashOperands) -> tuple[Tensor, Tensor]:
        """Returns lse = -inf for rows without keys."""
        q, k, v, window, segments, score = operands
        results = import_flash(self.module)._flash_attn_forward(
            q,
            k,
            v,
            **_varlen_kwargs(segments),
            **_window_kwargs(window, -1),
            softmax_scale=score.factor,
            causal=window.causal,
            softcap=score.softcap or 0.0,
        )
        return results[0], results[1]

    def backward(self, operands: FlashOperands, results: FlashResults, into: Gradients) -> None:
        q, k, v, window, segments, score = operands
        dout, out, lse, _ = results
        import_flash(self.module)._flash_attn_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            **_varlen_kwargs(segments),
            **into._asdict(),
            **_window_kwargs(window, -1),
            softmax_scale=score.factor,
            is_causal=window.causal,
            softcap=score.softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )


class Flash4:
    """flash-attn 4, in CuTe: compiled on the first call of each kind, for Hopper and Blackwell."""

    module = "flash_attn.cute.interface"
    functions = (
        ("_flash_attn_fwd", ("cu_seqlens_q", "window_size_left", "softcap", "return_lse")),
        ("_flash_attn_bwd", ("cu_seqlens_q", "window_size_left", "softcap", "dq", "dlse")),
    )
    takes_dlse = True

    def required_device(self, capability: tuple[int, int]) -> str | None:
        """Its backward has no kernels for Ampere."""
        return None if 9 <= capability[0] <= 12 else "compute capabilities 9.0 to 12.x"

    def padded_dims(self, dim: int, v_dim: int) -> tuple[int, int] | None:
        """One head dim, a multiple of 8 up to 128, or 192 with values of 128, or 256: the kernels for Blackwell."""
        return _latent_dims(dim, v_dim) or _equal_dims(dim, v_dim, 128) or _exactly(256, dim, v_dim)

    def missing_feature(self, problem: ProblemSpec, capability: tuple[int, int]) -> str | None:
        """On compute capability 12.x its backward takes no score modifications, such as softcap."""
        if not problem.needs_grad or capability[0] != 12:
            return None
        if problem.score.softcap:
            return "no gradient of softcap"
        return "no deterministic gradients" if torch.are_deterministic_algorithms_enabled() else None

    def forward(self, operands: FlashOperands) -> tuple[Tensor, Tensor]:
        """Returns lse = -inf for rows without keys. A window side without limit is None here: -1 is a limit."""
        q, k, v, window, segments, score = operands
        results = import_flash(self.module)._flash_attn_fwd(
            q,
            k,
            v,
            **_varlen_kwargs(segments),
            **_window_kwargs(window, None),
            softmax_scale=score.factor,
            causal=window.causal,
            softcap=score.softcap,
            return_lse=True,
        )
        return results[0], results[1]

    def backward(self, operands: FlashOperands, results: FlashResults, into: Gradients) -> None:
        q, k, v, window, segments, score = operands
        dout, out, lse, dlse = results
        import_flash(self.module)._flash_attn_bwd(
            q,
            k,
            v,
            out,
            dout,
            lse,
            **_varlen_kwargs(segments),
            **into._asdict(),
            **_window_kwargs(window, None),
            softmax_scale=score.factor,
            causal=window.causal,
            softcap=score.softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            dlse=dlse,
        )


def _varlen_kwargs(segments: VarlenArgs | None) -> dict[str, Any]:
    if segments is None:
        return {}
    return {
        "cu_seqlens_q": segments.q_ends,
        "cu_seqlens_k": segments.k_ends,
        "max_seqlen_q": segments.max_q,
        "max_seqlen_k": segments.max_k,
    }


def _window_kwargs(window: Window, unlimited: int | None) -> dict[str, int | None]:
    """Returns the arguments for a window; a causal one is passed by its flag alone."""
    left, right = (None, None) if window.causal else window
    return {
        "window_size_left": unlimited if left is None else left,
        "window_size_right": unlimited if right is None else right,
    }


def _equal_dims(dim: int, v_dim: int, max_dim: int) -> tuple[int, int] | None:
    width = -(-max(dim, v_dim) // 8) * 8
    return (width, width) if width <= max_dim else None


def _exactly(width: int, dim: int, v_dim: int) -> tuple[int, int] | None:
    return (width, width) if max(dim, v_dim) <= width else None


def _latent_dims(dim: int, v_dim: int) -> tuple[int, int] | None:
    """The dims of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), which have their own kernels."""
    return (192, 128) if 128 < dim <= 192 and v_dim <= 128 else None
