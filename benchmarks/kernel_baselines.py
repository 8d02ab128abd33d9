"""The baselines of the kernel benchmark: attention by torch's own kernels, and by flash-attn where it is installed.

A baseline brings its tensors into the form that it prefers before it is timed. For torch that is heads before rows,
each head's rows contiguous; documents may be padded to a batch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from benchmarks.kernel_cases import Problem
from ringattn.geometry.tiles import Tiles

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

# torch's kernels but for the plain one, which writes every score to memory.
TORCH_KERNELS = {
    "cpu": {"torch": SDPBackend.FLASH_ATTENTION},
    "cuda": {
        "torch flash": SDPBackend.FLASH_ATTENTION,
        "torch cudnn": SDPBackend.CUDNN_ATTENTION,
        "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
    },
}
DENSE_MASK, PADDED, ONE_BY_ONE = "dense mask", "padded", "a call for each document"

# Releases of flash-attn, and the module of each.
FLASH_ATTN = {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface", "flash-attn 4": "flash_attn.cute"}


@dataclass(frozen=True)
class Baseline:
    """One way to compute a problem.

    Args:
        name: of the contender.
        kind: "torch" or "flash-attn".
        attention: q, k, v -> out in its own form, differentiable.
        pack: (1, S, H, D) -> the form that `attention` takes.
        unpack: the inverse of `pack`.
    """

    name: str
    kind: str
    attention: Attention
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]


def baselines(problem: Problem, device: torch.device) -> Iterator[Baseline]:
    """Yields the baselines of a problem; some may fail when they are tried."""
    for name, kernel in TORCH_KERNELS[device.type].items():
        yield from _torch_baselines(name, kernel, problem, device)
    if device.type == "cuda":
        yield from cuda_baselines(problem, device)


def cuda_baselines(problem: Problem, device: torch.device) -> Iterator[Baseline]:
    """Yields the baselines that have no kernel for CPUs."""
    yield from _torch_varlen(problem, device)
    yield from _flash_attn(problem, device)


def square(tiles: Tiles) -> bool | None:
    """Returns True if the tiles are one causal triangle, False if they are one full rectangle, None if neither."""
    if len(tiles) != 1:
        return None
    tile = tiles.rows[0]
    rows, cols = tile.q_stop - tile.q_start, tile.k_stop - tile.k_start
    corner = tile.k_start - tile.q_start
    if tile.lo - corner > 1 - rows:
        return None
    if tile.hi - corner == cols - 1:
        return False
    return True if tile.hi == corner and rows == cols else None


def dense_mask(tiles: Tiles, seq_len: int, device: torch.device) -> Tensor:
    """Returns (seq_len, seq_len) bool, True where a pair attends."""
    mask = torch.zeros(seq_len, seq_len, dtype=torch.bool, device=device)
    strip = 1024  # rows at a time, which bounds the memory of the diagonals
    for tile in tiles:
        keys = torch.arange(tile.k_start, tile.k_stop, device=device)
        for first in range(tile.q_start, tile.q_stop, strip):
            rows = torch.arange(first, min(first + strip, tile.q_stop), device=device)
            diagonal = keys - rows[:, None]
            seen = (diagonal >= tile.lo) & (diagonal <= tile.hi)
            mask[first : first + len(rows), tile.k_start : tile.k_stop] |= seen
    return mask


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def _rows_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _torch_baselines(name: str, kernel: SDPBackend, problem: Problem, device: torch.device) -> Iterator[Baseline]:
    """One kernel of torch: without a mask or with a dense one; documents padded, or in a call for each."""
    pattern = problem.pattern
    causal, (i, j, _) = square(pattern.tiles), pattern.tiles.bounding_box
    masks: list[Tensor] = []

    def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    def unmasked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q[:, :, i], k[:, :, j], v[:, :, j], bool(causal))

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not masks:
            masks.append(dense_mask(pattern.tiles, problem.seq_len, device))
        return sdpa(q, k, v, False, masks[0])

    if causal is not None:
        yield Baseline(name, "torch", unmasked, _heads_first, _rows_first)
    else:
        yield Baseline(f"{name}, {DENSE_MASK}", "torch", masked, _heads_first, _rows_first)
    if pattern.cu_seqlens is None:
        return
    lengths = [b - a for a, b in pairwise(pattern.cu_seqlens)]

    def pad(x: Tensor) -> Tensor:
        return _heads_first(pad_sequence(list(torch.split(x[0], lengths)), batch_first=True))

    def unpad(x: Tensor) -> Tensor:
        return torch.cat([row[:length] for row, length in zip(x.transpose(1, 2), lengths, strict=True)])[None]

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, True)  # padding comes last, so causal attention hides it from the documents' rows

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        documents = zip(*(torch.split(x, lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([sdpa(a, b, c, True) for a, b, c in documents], dim=2)

    yield Baseline(f"{name}, {PADDED}", "torch", padded, pad, unpad)
    yield Baseline(f"{name}, {ONE_BY_ONE}", "torch", one_by_one, _heads_first, _rows_first)


def _torch_varlen(problem: Problem, device: torch.device) -> Iterator[Baseline]:
    """The flash kernel of torch over packed sequences; a window is one sequence."""
    pattern = problem.pattern
    if pattern.cu_seqlens is None and pattern.window is None:
        return
    try:
        varlen_attn: Callable[..., Any] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return
    cu_seqlens, longest = _cu_seqlens(problem, device)
    window = (-1 if pattern.window is None else pattern.window - 1, 0)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = {"window_size": window, "enable_gqa": q.shape[1] != k.shape[1]}
        packed: Tensor = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
        return packed

    yield Baseline("torch varlen", "torch", attention, lambda x: x[0], lambda x: x[None])


def _flash_attn(problem: Problem, device: torch.device) -> Iterator[Baseline]:
    """Every installed release of flash-attn, through its own interface."""
    pattern = problem.pattern
    i, j, _ = pattern.tiles.bounding_box
    cu_seqlens, longest = _cu_seqlens(problem, device)
    options: dict[str, Any] = {"causal": square(pattern.tiles) is not False}
    if pattern.window is not None:
        options["window_size"] = (pattern.window - 1, 0)
    bounds = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": longest, "max_seqlen_k": longest}
    for name, module in FLASH_ATTN.items():
        try:
            library = importlib.import_module(module)
            functions: tuple[Callable[..., Any], ...] = library.flash_attn_func, library.flash_attn_varlen_func
        except (ImportError, AttributeError, OSError):
            continue
        dense, varlen = functions

        def attention(q: Tensor, k: Tensor, v: Tensor, dense: Callable[..., Any] = dense) -> Tensor:
            return _out(dense(q[:, i], k[:, j], v[:, j], **options))

        def packed(q: Tensor, k: Tensor, v: Tensor, varlen: Callable[..., Any] = varlen) -> Tensor:
            return _out(varlen(q, k, v, **bounds, **options))

        if pattern.cu_seqlens is None:
            yield Baseline(name, "flash-attn", attention, Tensor.contiguous, lambda x: x)
        else:
            yield Baseline(name, "flash-attn", packed, lambda x: x[0], lambda x: x[None])


def _out(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some releases return (out, lse)."""
    return result if isinstance(result, Tensor) else result[0]


def _cu_seqlens(problem: Problem, device: torch.device) -> tuple[Tensor, int]:
    ends = problem.pattern.cu_seqlens or (0, problem.seq_len)
    longest = max(b - a for a, b in pairwise(ends))
    return torch.tensor(ends, dtype=torch.int32, device=device), longest
