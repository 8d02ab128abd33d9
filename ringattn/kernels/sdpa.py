"""torch's own fused attention kernels behind the contract: CPU flash, CUDA flash, cuDNN.

They compute one dense rectangle or triangle, and return their own (out, lse), or fresh gradients. Here tiles are
cut into such pieces, results merged into the running state, and the edges translated:

- delta: these kernels recompute rowsum(dout * out) from an `out`; the contract gives its result: see delta.py.
- Dv != D: the narrower is padded with zeros, which changes nothing.
- every piece is square where it is causal, so that top-left and bottom-right alignment agree; no row of a piece
  is without a key, so that what a kernel says of empty rows (CPU flash: lse = 0) never shows.
- heads go through in groups, which bounds the memory of intermediate results, and the CPU kernel gets them
  contiguous: it is a tenth faster so, while the copy costs a pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.geometry.tiles import EVERY_BATCH_ROW, Tiles
from ringattn.kernels.contract import (
    BackwardQueries,
    Gradients,
    Keys,
    ProblemSpec,
    Queries,
    State,
    unsupported_terms,
)
from ringattn.kernels.decompose import DenseTile, TileShape, dense_tiles, masked_tiles
from ringattn.kernels.fused_ops import DenseOperands, FusedOp
from ringattn.kernels.merge import merge_part_
from ringattn.kernels.out_from_delta import out_for_delta
from ringattn.kernels.reference import ReferenceKernel
from ringattn.score import Score

# Intermediate results of a group of heads take at most about this much in all, unless one head takes more.
GROUP_BYTES = 6 << 20
# In backward, groups have no more heads than make a launch worth its overhead: query-key pairs x head dim. The CPU
# kernel's backward is faster a head at a time.
LAUNCH_WORK = 1 << 25

# Computes the small masked blocks at the edge of a band for fused kernels that take no mask.
_EDGES = ReferenceKernel()


@dataclass(frozen=True)
class FusedKernel:
    """A `BlockKernel` over fused operations, one for each device type."""

    name: str
    about: str
    ops: tuple[FusedOp, ...]
    score_terms: frozenset[str] = frozenset()

    def available(self) -> list[str]:
        """CPU kernels always run; CUDA ones need a device."""
        if any(op.device_type == "cpu" for op in self.ops) or torch.cuda.is_available():
            return []
        return ["torch sees no CUDA device"]

    def unsupported(self, problem: ProblemSpec) -> list[str]:
        ops = [op for op in self.ops if op.device_type == problem.device_type]
        if not ops:
            names = " and ".join(op.device_type for op in self.ops)
            return [f"runs on {names}, not on {problem.device_type}"]
        op, reasons = ops[0], []
        if problem.dtype not in op.dtypes:
            reasons.append(f"takes {', '.join(map(str, op.dtypes))}, not {problem.dtype}")
        reasons += unsupported_terms(problem, self.score_terms)
        if problem.score.factor <= 0:
            # They mask scores before they scale them, and 0 x -inf is NaN.
            reasons.append(f"takes a positive scale, not {problem.score.factor}")
        dim = max(problem.head_dim, problem.v_head_dim)
        if op.max_dim is not None and dim > op.max_dim:
            reasons.append(f"takes head dims up to {op.max_dim}, not {dim}")
        return reasons

    def forward(self, queries: Queries, keys: Keys, tiles: Tiles, score: Score, state: State) -> None:
        (q, _), (k, v, _), (out, lse) = queries, keys, state
        op, v_dim = self._op(q), v.shape[3]
        if not op.takes_mask and (edges := masked_tiles(tiles)):
            _EDGES.forward(queries, keys, edges, score, state)
        i, j, tiles = tiles.bounding_box
        q, k, v, out, lse = q[:, i], k[:, j], v[:, j], out[:, i], lse[:, :, i]
        inputs = _Inputs(op, _padded(op, q.shape[3], v_dim))
        launches = _launches(tiles, q, op)
        num_buffers = 2 if op.compute_dtype(q.dtype) == q.dtype else 4
        for heads, kv_heads in _head_groups(q, k, num_buffers, math.inf):
            q_g, k_g, v_g = inputs.pack("q", q, heads), inputs.pack("k", k, kv_heads), inputs.pack("v", v, kv_heads)
            for launch in launches:
                piece, row = launch.piece, launch.row
                part, part_lse = op.forward(_operands(q_g, k_g, v_g, launch, score))
                part, part_lse = _oriented(part, piece), _oriented(part_lse, piece)
                out_i = _blocks(out[:, :, heads], 1, piece.q_start, piece.rows, piece, row)
                lse_i = _blocks(lse[:, heads], 2, piece.q_start, piece.rows, piece, row)
                merge_part_(out_i, lse_i, part[..., :v_dim].transpose(1, 2), part_lse)
                # Or the next launch's results would come to lie beside these.
                del part, part_lse

    def backward(self, queries: BackwardQueries, keys: Keys, tiles: Tiles, score: Score, gradients: Gradients) -> None:
        q, dout, lse, delta, lse_grad, _ = queries
        (k, v, _), (dq, dk, dv) = keys, gradients
        op, dim, v_dim = self._op(q), q.shape[3], v.shape[3]
        if lse_grad and op.max_dim is not None and _padded(op, dim, v_dim + 1) > op.max_dim:
            # No room for the extra column. Gradients of lse are rare, so they need not be fast there.
            _EDGES.backward(queries, keys, tiles, score, gradients)
            return
        if not op.takes_mask and (edges := masked_tiles(tiles)):
            _EDGES.backward(queries, keys, edges, score, gradients)
        i, j, tiles = tiles.bounding_box
        dout, q, dq, lse, delta = dout[:, i], q[:, i], dq[:, i], lse[:, :, i], delta[:, :, i]
        k, v, dk, dv = k[:, j], v[:, j], dk[:, j], dv[:, j]
        inputs = _Inputs(op, _padded(op, dim, v_dim + lse_grad))
        launches = _launches(tiles, q, op)
        head_work = max(tiles.area(q.shape[0]) * dim, 1)
        for heads, kv_heads in _head_groups(q, k, 9, -(-LAUNCH_WORK * len(launches) // head_work)):
            q_g, k_g, v_g = inputs.pack("q", q, heads), inputs.pack("k", k, kv_heads), inputs.pack("v", v, kv_heads)
            dout_g, lse_g = inputs.pack("dout", dout, heads), lse[:, heads]
            # With a gradient of lse there is a padding column at least, in a copy that is ours.
            out_g = out_for_delta(dout_g, delta[:, heads], v_dim if lse_grad else None)
            for launch in launches:
                piece, row = launch.piece, launch.row
                parts = op.backward(
                    _operands(q_g, k_g, v_g, launch, score),
                    _rows(dout_g, piece, row),
                    _rows(out_g, piece, row),
                    _rows(lse_g, piece, row),
                )
                part_dq, part_dk, part_dv = (_oriented(part, piece).transpose(1, 2) for part in parts)
                _blocks(dq[:, :, heads], 1, piece.q_start, piece.rows, piece, row).add_(part_dq[..., :dim])
                _add_cols(dk[:, :, kv_heads], part_dk[..., :dim], piece, row)
                _add_cols(dv[:, :, kv_heads], part_dv[..., :v_dim], piece, row)
                # Or the next launch's results would come to lie beside these.
                del parts, part_dq, part_dk, part_dv
            del out_g

    def _op(self, q: Tensor) -> FusedOp:
        return next(op for op in self.ops if op.device_type == q.device.type)


def _padded(op: FusedOp, dim: int, v_dim: int) -> int:
    width = max(dim, v_dim)
    return -(-width // op.dim_multiple) * op.dim_multiple


def _head_groups(q: Tensor, k: Tensor, num_buffers: int, most_work: float) -> list[tuple[slice, slice]]:
    """Cuts the heads into groups, (query heads, their kv heads).

    A group is as large as memory for so many buffers, and `most_work` of heads, allow, but has enough heads for every
    thread.
    """
    batch, rows, heads, dim = q.shape
    group = heads // k.shape[2]
    size = heads
    if q.device.type == "cpu":
        least = -(-torch.get_num_threads() // max(batch, 1))
        most = GROUP_BYTES // max(num_buffers * batch * max(rows, k.shape[1]) * dim * 4, 1)
        size = int(min(max(1, least, min(most, most_work)), heads))
    # A group holds whole kv heads, or query heads of one kv head only.
    span = heads if size >= group else group
    size = max(1, size - size % group) if size >= group else size
    starts = [h for first in range(0, heads, span) for h in range(first, first + span, size)]
    stops = [*starts[1:], heads]
    return [(slice(a, b), slice(a // group, -(-b // group))) for a, b in zip(starts, stops, strict=True)]


class _Inputs:
    """Groups of heads as the fused kernel likes them best, one group at a time, in the same buffers."""

    def __init__(self, op: FusedOp, width: int) -> None:
        self._op = op
        self._width = width
        self._packed: dict[str, tuple[slice, Tensor]] = {}

    def pack(self, name: str, x: Tensor, heads: slice) -> Tensor:
        """Returns heads of x, (B, S, H, D), as (B, heads, S, width) in the dtype to compute in."""
        there, buffer = self._packed.get(name, (None, None))
        if buffer is not None and there == heads:
            return buffer
        x = x[:, :, heads].transpose(1, 2)
        dtype = self._op.compute_dtype(x.dtype)
        packed = x.stride(2) == x.shape[3] or not self._op.wants_packed
        if packed and dtype == x.dtype and x.shape[3] == self._width:
            return x
        shape = (*x.shape[:3], self._width)
        if buffer is None or buffer.shape != shape:
            buffer = torch.empty(shape, dtype=dtype, device=x.device)
        buffer[..., : x.shape[3]].copy_(x)
        buffer[..., x.shape[3] :].zero_()
        self._packed[name] = heads, buffer
        return buffer


class _Launch(NamedTuple):
    """A piece, a batch row or all of them, and the form in which the fused kernel takes it."""

    piece: DenseTile
    row: int
    causal: bool
    mask: Tensor | None


def _launches(tiles: Tiles, q: Tensor, op: FusedOp) -> list[_Launch]:
    """Returns what to launch; strips take the place of the batch, so they go a batch row at a time."""
    masks: dict[tuple[int, ...], Tensor] = {}
    found: list[_Launch] = []
    for piece in dense_tiles(tiles):
        mask = None
        if piece.shape is TileShape.MASKED:
            if not op.takes_mask:
                continue
            key = (piece.rows, piece.cols, piece.lo, piece.hi)
            if key not in masks:
                masks[key] = _dense_mask(piece, op.compute_dtype(q.dtype), q.device)
            mask = masks[key]
        rows: Iterable[int] = (piece.batch,)
        if piece.copies > 1 and piece.batch == EVERY_BATCH_ROW:
            rows = range(q.shape[0])
        causal = piece.shape in (TileShape.CAUSAL, TileShape.REVERSED)
        found.extend(_Launch(piece, row, causal, mask) for row in rows)
    return found


def _dense_mask(piece: DenseTile, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns what to add to a piece's scores, (rows, cols): 0 inside its band, -inf outside."""
    diagonal = torch.arange(piece.cols, device=device) - torch.arange(piece.rows, device=device)[:, None]
    mask = torch.zeros(piece.rows, piece.cols, dtype=dtype, device=device)
    return mask.masked_fill_((diagonal < piece.lo) | (diagonal > piece.hi), -torch.inf)


def _blocks(x: Tensor, dim: int, start: int, length: int, piece: DenseTile, row: int) -> Tensor:
    """The rows of a piece as a view: those of a batch, or `copies` strips in the place of the batch."""
    if row != EVERY_BATCH_ROW:
        x = x[row : row + 1]
    if piece.copies == 1:
        return x.narrow(dim, start, length)
    size, stride = list(x.shape), list(x.stride())
    size[0], size[dim], stride[0] = piece.copies, length, piece.stride * x.stride(dim)
    return x.as_strided(size, stride, x.storage_offset() + start * x.stride(dim))


def _oriented(x: Tensor, piece: DenseTile) -> Tensor:
    """Rows of a piece, (B, H, rows, ...), in the order that makes it causal, or back again."""
    return x.flip(2) if piece.shape is TileShape.REVERSED else x


def _rows(x: Tensor, piece: DenseTile, row: int) -> Tensor:
    """The query rows of a piece, (B, H, rows, ...)."""
    return _oriented(_blocks(x, 2, piece.q_start, piece.rows, piece, row), piece)


def _cols(x: Tensor, piece: DenseTile, row: int) -> Tensor:
    """The key rows of a piece, (B, H, cols, D)."""
    return _oriented(_blocks(x, 2, piece.k_start, piece.cols, piece, row), piece)


def _operands(q: Tensor, k: Tensor, v: Tensor, launch: _Launch, score: Score) -> DenseOperands:
    """The operands of a launch, of the packed tensors of a head group."""
    piece, row, causal, mask = launch
    return DenseOperands(_rows(q, piece, row), _cols(k, piece, row), _cols(v, piece, row), causal, mask, score.factor)


def _add_cols(total: Tensor, part: Tensor, piece: DenseTile, row: int) -> None:
    """Adds the gradients of a piece's key rows; strips that overlap are added in turns, those apart together."""
    turns = -(-piece.cols // piece.stride) if piece.copies > 1 else 1
    for turn in range(min(turns, piece.copies)):
        apart = piece._replace(
            k_start=piece.k_start + turn * piece.stride,
            copies=-(-(piece.copies - turn) // turns),
            stride=turns * piece.stride,
        )
        _blocks(total, 1, apart.k_start, piece.cols, apart, row).add_(part[turn::turns] if turns > 1 else part)
