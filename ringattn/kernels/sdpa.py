"""Fused attention operations of torch behind the contract: CPU flash, CUDA flash, cuDNN.

An operation computes one dense rectangle or triangle, and returns its own (out, lse) or new gradients. This module
decomposes tiles into rectangles and triangles, merges the results into the state, and adapts the interface:

- delta: the operations compute rowsum(dout * out) from an `out`; the contract passes delta. See out_from_delta.py.
- Dv != D: the narrower one is padded with zeros, which changes nothing.
- Alignment: causal tiles are square, so top-left and bottom-right alignment agree. Every row of a tile has a key, so
  the lse of empty rows (0 in CPU flash) never matters.
- Memory: heads are computed in groups, which bounds the intermediate results. The CPU operation gets contiguous heads:
  it is a tenth faster, for a copy of one pass.
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

# Bytes of the intermediate results of a head group, at most, unless one head takes more.
GROUP_BYTES = 6 << 20
# Query-key pairs x head dim that make a launch of a backward worth its overhead. A group has no more heads than are
# needed for that, since the backward of the CPU operation is faster one head at a time.
LAUNCH_WORK = 1 << 25

# Computes masked tiles for operations without a mask, and gradients of lse without a free column.
_REFERENCE = ReferenceKernel()


@dataclass(frozen=True)
class FusedKernel:
    """A `BlockKernel` over fused operations, one for each device type."""

    name: str
    about: str
    ops: tuple[FusedOp, ...]
    score_terms: frozenset[str] = frozenset()

    def available(self) -> list[str]:
        """The CPU operation always runs; CUDA operations need a device."""
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
            # The operations mask scores before they scale them, and 0 x -inf is NaN.
            reasons.append(f"takes a positive scale, not {problem.score.factor}")
        dim = max(problem.head_dim, problem.v_head_dim)
        if op.max_dim is not None and dim > op.max_dim:
            reasons.append(f"takes head dims up to {op.max_dim}, not {dim}")
        return reasons

    def forward(self, queries: Queries, keys: Keys, tiles: Tiles, score: Score, state: State) -> None:
        q, k, v, (out, lse) = queries.q, keys.k, keys.v, state
        op, v_dim = self._op(q), v.shape[3]
        if not op.takes_mask and (masked := masked_tiles(tiles)):
            _REFERENCE.forward(queries, keys, masked, score, state)
        i, j, tiles = tiles.bounding_box
        q, k, v, out, lse = q[:, i], k[:, j], v[:, j], out[:, i], lse[:, :, i]
        packer = _HeadPacker(op, _computed_dim(op, q.shape[3], v_dim))
        launches = _fused_launches(tiles, q, op)
        num_buffers = 2 if op.compute_dtype(q.dtype) == q.dtype else 4
        for heads, kv_heads in _head_groups(q, k, num_buffers, math.inf):
            q_g, k_g, v_g = packer.pack("q", q, heads), packer.pack("k", k, kv_heads), packer.pack("v", v, kv_heads)
            for launch in launches:
                tile, row = launch.tile, launch.row
                part, part_lse = op.forward(_operands(q_g, k_g, v_g, launch, score))
                part, part_lse = _flip_reversed(part, tile), _flip_reversed(part_lse, tile)
                out_i = _view_rows(out[:, :, heads], 1, tile.q_start, tile.rows, tile, row)
                lse_i = _view_rows(lse[:, heads], 2, tile.q_start, tile.rows, tile, row)
                merge_part_(out_i, lse_i, part[..., :v_dim].transpose(1, 2), part_lse)
                # Freed before the next launch allocates its results.
                del part, part_lse

    def backward(self, queries: BackwardQueries, keys: Keys, tiles: Tiles, score: Score, gradients: Gradients) -> None:
        q, dout, lse, delta, lse_grad, _ = queries
        k, v, (dq, dk, dv) = keys.k, keys.v, gradients
        op, dim, v_dim = self._op(q), q.shape[3], v.shape[3]
        if lse_grad and op.max_dim is not None and _computed_dim(op, dim, v_dim + 1) > op.max_dim:
            # No column is free. Gradients of lse are rare, so the reference kernel is fast enough.
            _REFERENCE.backward(queries, keys, tiles, score, gradients)
            return
        if not op.takes_mask and (masked := masked_tiles(tiles)):
            _REFERENCE.backward(queries, keys, masked, score, gradients)
        i, j, tiles = tiles.bounding_box
        dout, q, dq, lse, delta = dout[:, i], q[:, i], dq[:, i], lse[:, :, i], delta[:, :, i]
        k, v, dk, dv = k[:, j], v[:, j], dk[:, j], dv[:, j]
        packer = _HeadPacker(op, _computed_dim(op, dim, v_dim + lse_grad))
        launches = _fused_launches(tiles, q, op)
        head_work = max(tiles.area(q.shape[0]) * dim, 1)
        for heads, kv_heads in _head_groups(q, k, 9, -(-LAUNCH_WORK * len(launches) // head_work)):
            q_g, k_g, v_g = packer.pack("q", q, heads), packer.pack("k", k, kv_heads), packer.pack("v", v, kv_heads)
            dout_g, lse_g = packer.pack("dout", dout, heads), lse[:, heads]
            # With a gradient of lse, dout_g is a padded copy, which out_for_delta may write to.
            out_g = out_for_delta(dout_g, delta[:, heads], v_dim if lse_grad else None)
            for launch in launches:
                tile, row = launch.tile, launch.row
                parts = op.backward(
                    _operands(q_g, k_g, v_g, launch, score),
                    _query_rows(dout_g, tile, row),
                    _query_rows(out_g, tile, row),
                    _query_rows(lse_g, tile, row),
                )
                part_dq, part_dk, part_dv = (_flip_reversed(part, tile).transpose(1, 2) for part in parts)
                _view_rows(dq[:, :, heads], 1, tile.q_start, tile.rows, tile, row).add_(part_dq[..., :dim])
                _add_key_rows(dk[:, :, kv_heads], part_dk[..., :dim], tile, row)
                _add_key_rows(dv[:, :, kv_heads], part_dv[..., :v_dim], tile, row)
                # Freed before the next launch allocates its results.
                del parts, part_dq, part_dk, part_dv
            del out_g

    def _op(self, q: Tensor) -> FusedOp:
        return next(op for op in self.ops if op.device_type == q.device.type)


def _computed_dim(op: FusedOp, dim: int, v_dim: int) -> int:
    width = max(dim, v_dim)
    return -(-width // op.dim_multiple) * op.dim_multiple


def _head_groups(q: Tensor, k: Tensor, num_buffers: int, max_heads: float) -> list[tuple[slice, slice]]:
    """Splits the heads into groups: (query heads, their kv heads) each.

    Args:
        q: (B, Sq, H, D).
        k: (B, Sk, Hkv, D).
        num_buffers: fp32 buffers per group, which share GROUP_BYTES.
        max_heads: heads of a group. On a CPU, a group has at least one head per thread, whatever the limits.
    """
    batch, rows, heads, dim = q.shape
    group = heads // k.shape[2]
    size = heads
    if q.device.type == "cpu":
        min_size = -(-torch.get_num_threads() // max(batch, 1))
        max_size = GROUP_BYTES // max(num_buffers * batch * max(rows, k.shape[1]) * dim * 4, 1)
        size = int(min(max(1, min_size, min(max_size, max_heads)), heads))
    # A group holds whole kv heads, or query heads of one kv head only.
    span = heads if size >= group else group
    size = max(1, size - size % group) if size >= group else size
    starts = [h for first in range(0, heads, span) for h in range(first, first + span, size)]
    stops = [*starts[1:], heads]
    return [(slice(a, b), slice(a // group, -(-b // group))) for a, b in zip(starts, stops, strict=True)]


class _HeadPacker:
    """Packs one head group at a time into the layout of a fused operation, reusing its buffers."""

    def __init__(self, op: FusedOp, width: int) -> None:
        self._op = op
        self._width = width
        self._packed: dict[str, tuple[slice, Tensor]] = {}

    def pack(self, name: str, x: Tensor, heads: slice) -> Tensor:
        """Returns heads of x, (B, S, H, D), as (B, heads, S, width) in the dtype to compute in."""
        packed_heads, buffer = self._packed.get(name, (None, None))
        if buffer is not None and packed_heads == heads:
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


class _FusedLaunch(NamedTuple):
    """One call of a fused operation: a tile, a batch row (or EVERY_BATCH_ROW), and how the tile is masked."""

    tile: DenseTile
    row: int
    causal: bool
    mask: Tensor | None


def _fused_launches(tiles: Tiles, q: Tensor, op: FusedOp) -> list[_FusedLaunch]:
    """Returns the calls for some tiles. Strips are batched along the batch dim, so they take a call per batch row."""
    masks: dict[tuple[int, ...], Tensor] = {}
    launches: list[_FusedLaunch] = []
    for tile in dense_tiles(tiles):
        mask = None
        if tile.shape is TileShape.MASKED:
            if not op.takes_mask:
                continue
            key = (tile.rows, tile.cols, tile.lo, tile.hi)
            if key not in masks:
                masks[key] = _dense_mask(tile, op.compute_dtype(q.dtype), q.device)
            mask = masks[key]
        rows: Iterable[int] = (tile.batch,)
        if tile.copies > 1 and tile.batch == EVERY_BATCH_ROW:
            rows = range(q.shape[0])
        causal = tile.shape in (TileShape.CAUSAL, TileShape.REVERSED)
        launches.extend(_FusedLaunch(tile, row, causal, mask) for row in rows)
    return launches


def _dense_mask(tile: DenseTile, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the additive mask of a tile, (rows, cols): 0 inside its band, -inf outside."""
    diagonal = torch.arange(tile.cols, device=device) - torch.arange(tile.rows, device=device)[:, None]
    mask = torch.zeros(tile.rows, tile.cols, dtype=dtype, device=device)
    return mask.masked_fill_((diagonal < tile.lo) | (diagonal > tile.hi), -torch.inf)


def _view_rows(x: Tensor, dim: int, start: int, length: int, tile: DenseTile, row: int) -> Tensor:
    """The rows of a tile as a view; its `copies` strips, if several, become the batch dim."""
    if row != EVERY_BATCH_ROW:
        x = x[row : row + 1]
    if tile.copies == 1:
        return x.narrow(dim, start, length)
    size, stride = list(x.shape), list(x.stride())
    size[0], size[dim], stride[0] = tile.copies, length, tile.stride * x.stride(dim)
    return x.as_strided(size, stride, x.storage_offset() + start * x.stride(dim))


def _flip_reversed(x: Tensor, tile: DenseTile) -> Tensor:
    """Reverses the rows (B, H, rows, ...) of a REVERSED tile, which makes it causal; its own inverse."""
    return x.flip(2) if tile.shape is TileShape.REVERSED else x


def _query_rows(x: Tensor, tile: DenseTile, row: int) -> Tensor:
    """The query rows of a tile, (B, H, rows, ...)."""
    return _flip_reversed(_view_rows(x, 2, tile.q_start, tile.rows, tile, row), tile)


def _key_rows(x: Tensor, tile: DenseTile, row: int) -> Tensor:
    """The key rows of a tile, (B, H, cols, D)."""
    return _flip_reversed(_view_rows(x, 2, tile.k_start, tile.cols, tile, row), tile)


def _operands(q: Tensor, k: Tensor, v: Tensor, launch: _FusedLaunch, score: Score) -> DenseOperands:
    """The operands of a launch, of the packed tensors of a head group."""
    tile, row, causal, mask = launch
    q, k, v = _query_rows(q, tile, row), _key_rows(k, tile, row), _key_rows(v, tile, row)
    return DenseOperands(q, k, v, causal, mask, score.factor)


def _add_key_rows(total: Tensor, part: Tensor, tile: DenseTile, row: int) -> None:
    """Adds the gradients of a tile's key rows. Strips that overlap are added in several turns."""
    turns = -(-tile.cols // tile.stride) if tile.copies > 1 else 1
    for turn in range(min(turns, tile.copies)):
        strips = tile._replace(
            k_start=tile.k_start + turn * tile.stride,
            copies=-(-(tile.copies - turn) // turns),
            stride=turns * tile.stride,
        )
        _view_rows(total, 1, strips.k_start, tile.cols, strips, row).add_(part[turn::turns] if turns > 1 else part)
