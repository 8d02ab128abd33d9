"""What the kernels are measured beside: every way in which torch, and flash-attn where it is installed, does a case.

A way says how a tensor is brought into its form, which is not timed: torch gets heads before rows and each head's rows
together, which it likes best, and documents may come padded. So a way is shown at its best.
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

from benchmarks.kernel_cases import Pattern, Problem
from ringattn.geometry.tiles import Tiles

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

# The kernels of torch's own that are worth a try; the plain one, which writes every score to memory, is not.
TORCH_KERNELS = {
    "cpu": {"torch": SDPBackend.FLASH_ATTENTION},
    "cuda": {
        "torch flash": SDPBackend.FLASH_ATTENTION,
        "torch cudnn": SDPBackend.CUDNN_ATTENTION,
        "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
    },
}
DENSE_MASK, PADDED, ONE_BY_ONE = "dense mask", "padded", "a call for each document"

# Releases of flash-attn, and where the functions of each are.
FLASH_ATTN = {
    "flash-attn 2": "flash_attn",
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 4": "flash_attn.cute",
}


@dataclass(frozen=True)
class Way:
    """One way to do a problem.

    Args:
        name: of the contender.
        kind: "torch" or "flash-attn".
        attention: its own q, k, v -> out, differentiable.
        pack: (1, S, H, D) -> the form that `attention` takes; not timed.
        unpack: the way back.
    """

    name: str
    kind: str
    attention: Attention
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]


def ways(problem: Problem, device: torch.device) -> Iterator[Way]:
    """Yields the ways to do a problem; one may still turn out not to run when it is tried."""
    if square(problem.pattern.tiles) is not None:
        yield from _plain(problem, device)
    else:
        yield from _with_dense_mask(problem, device)
    if problem.pattern.cu_seqlens is not None:
        yield from _padded(problem, problem.pattern.cu_seqlens, device)
        yield from _one_by_one(problem, problem.pattern.cu_seqlens, device)
    if device.type == "cuda":
        yield from ways_of_gpus(problem, device)


def ways_of_gpus(problem: Problem, device: torch.device) -> Iterator[Way]:
    """Yields those that have no kernel for CPUs."""
    yield from _torch_varlen(problem, device)
    yield from _flash_attn(problem, device)


def square(tiles: Tiles) -> bool | None:
    """Returns whether the tiles are one causal triangle (True) or one full rectangle (False); None if neither."""
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
    """Returns the pairs as (seq_len, seq_len) bool, True where they attend."""
    mask = torch.zeros(seq_len, seq_len, dtype=torch.bool, device=device)
    strip = 1024  # bounds the memory of the diagonals
    for tile in tiles:
        keys = torch.arange(tile.k_start, tile.k_stop, device=device)
        for first in range(tile.q_start, tile.q_stop, strip):
            rows = torch.arange(first, min(first + strip, tile.q_stop), device=device)
            diagonal = keys - rows[:, None]
            seen = (diagonal >= tile.lo) & (diagonal <= tile.hi)
            mask[first : first + len(rows), tile.k_start : tile.k_stop] |= seen
    return mask


def _sdpa(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
    with sdpa_kernel(kernel):
        return scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def _rows_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _plain(problem: Problem, device: torch.device) -> Iterator[Way]:
    """One rectangle or triangle: torch needs no mask."""
    causal = bool(square(problem.pattern.tiles))
    i, j, _ = problem.pattern.tiles.bounding_box
    for name, kernel in TORCH_KERNELS[device.type].items():

        def attention(q: Tensor, k: Tensor, v: Tensor, kernel: SDPBackend = kernel) -> Tensor:
            return _sdpa(kernel, q[:, :, i], k[:, :, j], v[:, :, j], causal)

        yield Way(name, "torch", attention, _heads_first, _rows_first)


def _with_dense_mask(problem: Problem, device: torch.device) -> Iterator[Way]:
    made: list[Tensor] = []
    for name, kernel in TORCH_KERNELS[device.type].items():

        def attention(q: Tensor, k: Tensor, v: Tensor, kernel: SDPBackend = kernel) -> Tensor:
            if not made:  # by the first that needs it, and then for all
                made.append(dense_mask(problem.pattern.tiles, problem.seq_len, device))
            return _sdpa(kernel, q, k, v, False, made[0])

        yield Way(f"{name}, {DENSE_MASK}", "torch", attention, _heads_first, _rows_first)


def _padded(problem: Problem, cu_seqlens: tuple[int, ...], device: torch.device) -> Iterator[Way]:
    """Documents as the rows of a batch: padding comes last, so that causal attention of real rows never sees it."""
    lengths = [b - a for a, b in pairwise(cu_seqlens)]

    def pack(x: Tensor) -> Tensor:
        return _heads_first(pad_sequence(list(torch.split(x[0], lengths)), batch_first=True))

    def unpack(x: Tensor) -> Tensor:
        rows = x.transpose(1, 2)
        return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])[None]

    for name, kernel in TORCH_KERNELS[device.type].items():

        def attention(q: Tensor, k: Tensor, v: Tensor, kernel: SDPBackend = kernel) -> Tensor:
            return _sdpa(kernel, q, k, v, True)

        yield Way(f"{name}, {PADDED}", "torch", attention, pack, unpack)


def _one_by_one(problem: Problem, cu_seqlens: tuple[int, ...], device: torch.device) -> Iterator[Way]:
    lengths = [b - a for a, b in pairwise(cu_seqlens)]
    for name, kernel in TORCH_KERNELS[device.type].items():

        def attention(q: Tensor, k: Tensor, v: Tensor, kernel: SDPBackend = kernel) -> Tensor:
            documents = zip(*(torch.split(x, lengths, dim=2) for x in (q, k, v)), strict=True)
            return torch.cat([_sdpa(kernel, a, b, c, True) for a, b, c in documents], dim=2)

        yield Way(f"{name}, {ONE_BY_ONE}", "torch", attention, _heads_first, _rows_first)


def _torch_varlen(problem: Problem, device: torch.device) -> Iterator[Way]:
    """The flash kernel of torch over packed sequences; a window is one sequence."""
    pattern = problem.pattern
    if pattern.cu_seqlens is None and pattern.window is None:
        return
    try:
        varlen_attn: Callable[..., Any] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return
    cu_seqlens, longest = _cu_seqlens(pattern, problem.seq_len, device)
    window = (-1 if pattern.window is None else pattern.window - 1, 0)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gqa = q.shape[1] != k.shape[1]
        packed: Tensor = varlen_attn(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=window, enable_gqa=gqa
        )
        return packed

    yield Way("torch varlen", "torch", attention, lambda x: x[0], lambda x: x[None])


def _flash_attn(problem: Problem, device: torch.device) -> Iterator[Way]:
    """flash-attn called as its own users call it, in every release that is installed."""
    pattern = problem.pattern
    i, j, _ = pattern.tiles.bounding_box
    cu_seqlens, longest = _cu_seqlens(pattern, problem.seq_len, device)
    options: dict[str, Any] = {"causal": square(pattern.tiles) is not False}
    if pattern.window is not None:
        options["window_size"] = (pattern.window - 1, 0)
    bounds = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": longest, "max_seqlen_k": longest}
    for name, module in FLASH_ATTN.items():
        try:
            library = importlib.import_module(module)
            dense: Callable[..., Any] = library.flash_attn_func
            varlen: Callable[..., Any] = library.flash_attn_varlen_func
        except (ImportError, AttributeError, OSError):
            continue

        def attend(q: Tensor, k: Tensor, v: Tensor, dense: Callable[..., Any] = dense) -> Tensor:
            return _first(dense(q[:, i], k[:, j], v[:, j], **options))

        def attend_packed(q: Tensor, k: Tensor, v: Tensor, varlen: Callable[..., Any] = varlen) -> Tensor:
            return _first(varlen(q, k, v, **bounds, **options))

        if pattern.cu_seqlens is None:
            yield Way(name, "flash-attn", attend, Tensor.contiguous, lambda x: x)
        else:
            yield Way(name, "flash-attn", attend_packed, lambda x: x[0], lambda x: x[None])


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some releases return the log-sum-exp, too."""
    return result if isinstance(result, Tensor) else result[0]


def _cu_seqlens(pattern: Pattern, seq_len: int, device: torch.device) -> tuple[Tensor, int]:
    ends = pattern.cu_seqlens or (0, seq_len)
    longest = max(b - a for a, b in pairwise(ends))
    return torch.tensor(ends, dtype=torch.int32, device=device), longest
