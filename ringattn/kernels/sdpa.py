"""torch's own fused attention kernels behind the contract: CPU flash, CUDA flash, cuDNN.

They compute one dense rectangle or triangle, and return their own (out, lse), or fresh gradients. Here tiles are
cut into such pieces, results merged into the running state, and the edges translated:

- delta: these kernels recompute rowsum(dout * out) from an `out`; the contract gives its result. They get the
  multiple of dout that has this very product: bounded by |out|, and exact up to rounding. When delta also
  holds a gradient of lse there may be no such multiple (dout can be 0); then one more column carries it.
- Dv != D: the narrower is padded with zeros, which changes nothing.
- every piece is square where it is causal, so that top-left and bottom-right alignment agree; no row of a piece
  is without a key, so that what a kernel says of empty rows (CPU flash: lse = 0) never shows.
- heads go through in groups, which bounds the memory of intermediate results.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from ringattn.geometry.tiles import EVERY_BATCH_ROW, Tiles
from ringattn.kernels.contract import Call, Spec
from ringattn.kernels.pieces import Piece, Shape, masked_tiles, pieces_of
from ringattn.kernels.reference import ReferenceKernel
from ringattn.softmax import merge_

# Intermediate results (a group of heads) take about this much.
GROUP_BYTES = 4 << 20

# Computes the small masked blocks at the edge of a band for fused kernels that take no mask.
_EDGES = ReferenceKernel()


class FusedOp(Protocol):
    """One fused kernel of torch: (B, H, S, D) tensors of equal head dim, scores of one rectangle or square triangle."""

    @property
    def device_type(self) -> str:
        """Where it runs."""
        ...

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of the inputs."""
        ...

    @property
    def takes_mask(self) -> bool:
        """Whether it takes an additive mask."""
        ...

    @property
    def dim_multiple(self) -> int:
        """Head dims are multiples of this."""
        ...

    @property
    def max_dim(self) -> int | None:
        """The largest head dim, or None."""
        ...

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype to compute in for inputs of `dtype`."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Returns out (B, H, S, D) and lse (B, H, S), natural log."""
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        mask: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns dq, dk, dv."""
        ...


class CpuFlash:
    """aten._scaled_dot_product_flash_attention_for_cpu."""

    device_type = "cpu"
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    takes_mask = True
    dim_multiple = 1
    max_dim = None

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Half precision is computed in fp32 on CPUs without instructions for it: faster there, and more exact."""
        if dtype in (torch.bfloat16, torch.float16) and not _has_half_matmul(dtype):
            return torch.float32
        return dtype

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See FusedOp.forward."""
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        mask: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See FusedOp.backward."""
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
        return dq, dk, dv


class CudaFlash:
    """aten._scaled_dot_product_flash_attention: FlashAttention-2 as built into torch."""

    device_type = "cuda"
    dtypes = (torch.bfloat16, torch.float16)
    takes_mask = False
    dim_multiple = 8
    max_dim = 256

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Computes in the inputs' own dtype."""
        return dtype

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See FusedOp.forward."""
        result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return result[0], result[1]

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        mask: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See FusedOp.backward."""
        unused = torch.empty(0, dtype=torch.int64, device=q.device)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse.contiguous(),
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            causal,
            unused,
            unused,
            scale=scale,
        )
        return dq, dk, dv


class CudnnFlash(CudaFlash):
    """aten._scaled_dot_product_cudnn_attention."""

    max_dim = 128

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See FusedOp.forward."""
        result = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return result[0], result[1].reshape(q.shape[:3])

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        mask: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See FusedOp.backward."""
        unused = torch.empty(0, dtype=torch.int64, device=q.device)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse.contiguous().unsqueeze(-1),
            unused,
            unused,
            None,
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            causal,
            scale=scale,
        )
        return dq, dk, dv


def _has_half_matmul(dtype: torch.dtype) -> bool:
    found = torch.cpu.get_capabilities()
    wanted = ("amx_bf16", "avx512_bf16", "bf16") if dtype is torch.bfloat16 else ("amx_fp16", "avx512_fp16", "fp16")
    return any(found.get(name, False) for name in wanted)


@dataclass(frozen=True)
class FusedKernel:
    """A table row of kernels: fused operations, one for each device type. See contract.BlockKernel."""

    name: str
    about: str
    ops: tuple[FusedOp, ...]

    def available(self) -> list[str]:
        """CPU kernels always run; CUDA ones need a device."""
        if any(op.device_type == "cpu" for op in self.ops) or torch.cuda.is_available():
            return []
        return ["torch sees no CUDA device"]

    def unsupported(self, call: Call) -> list[str]:
        """See contract.BlockKernel.unsupported."""
        ops = [op for op in self.ops if op.device_type == call.device_type]
        if not ops:
            names = " and ".join(op.device_type for op in self.ops)
            return [f"runs on {names}, not on {call.device_type}"]
        op, reasons = ops[0], []
        if call.dtype not in op.dtypes:
            reasons.append(f"takes {', '.join(map(str, op.dtypes))}, not {call.dtype}")
        if call.spec.softcap is not None:
            reasons.append("has no softcap")
        dim = max(call.head_dim, call.v_head_dim)
        if op.max_dim is not None and dim > op.max_dim:
            reasons.append(f"takes head dims up to {op.max_dim}, not {dim}")
        return reasons

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, spec: Spec, out: Tensor, lse: Tensor) -> None:
        """See contract.BlockKernel.forward."""
        op = self._op(q)
        v_dim, width = v.shape[3], _padded(op, q.shape[3], v.shape[3])
        for heads, kv_heads in _head_groups(q, k, width):
            q_g, k_g, v_g = (_prepared(x[:, :, h], op, width) for x, h in ((q, heads), (k, kv_heads), (v, kv_heads)))
            for piece, row in _launches(tiles, q.shape[0], op):
                part, part_lse = op.forward(
                    _rows(q_g, piece, row), _cols(k_g, piece, row), _cols(v_g, piece, row), *_form(op, piece, q_g),
                    spec.scale,
                )  # fmt: skip
                part, part_lse = _unreversed(part, piece), _unreversed(part_lse, piece)
                state = _blocks(out[:, :, heads], 1, piece.q_start, piece.rows, piece, row)
                state_lse = _blocks(lse[:, heads], 2, piece.q_start, piece.rows, piece, row)
                merge_(state, state_lse, part[..., :v_dim].transpose(1, 2), part_lse)
        if not op.takes_mask and (edges := masked_tiles(tiles)):
            _EDGES.forward(q, k, v, edges, spec, out, lse)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        tiles: Tiles,
        spec: Spec,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """See contract.BlockKernel.backward."""
        op = self._op(q)
        dim, v_dim = q.shape[3], v.shape[3]
        width = _padded(op, dim, v_dim + spec.lse_grad)
        for heads, kv_heads in _head_groups(q, k, width):
            q_g, k_g, v_g, dout_g = (
                _prepared(x[:, :, h], op, width) for x, h in ((q, heads), (k, kv_heads), (v, kv_heads), (dout, heads))
            )
            delta_g, lse_g = delta[:, heads].transpose(1, 2), lse[:, heads]
            if spec.lse_grad:
                # Padding by at least one column has copied dout, so that it can be written to.
                out_g = torch.zeros_like(dout_g)
                out_g[..., v_dim], dout_g[..., v_dim] = delta_g.to(out_g.dtype), 1.0
            else:
                out_g = _multiple_with_product(dout_g, delta_g)
            for piece, row in _launches(tiles, q.shape[0], op):
                parts = op.backward(
                    _rows(dout_g, piece, row), _rows(q_g, piece, row), _cols(k_g, piece, row), _cols(v_g, piece, row),
                    _rows(out_g, piece, row),
                    _reversed(_blocks(lse_g, 2, piece.q_start, piece.rows, piece, row), piece, 2),
                    *_form(op, piece, q_g), spec.scale,
                )  # fmt: skip
                part_dq, part_dk, part_dv = (_unreversed(part, piece).transpose(1, 2) for part in parts)
                _blocks(dq[:, :, heads], 1, piece.q_start, piece.rows, piece, row).add_(part_dq[..., :dim])
                _add_cols(dk[:, :, kv_heads], part_dk[..., :dim], piece, row)
                _add_cols(dv[:, :, kv_heads], part_dv[..., :v_dim], piece, row)
        if not op.takes_mask and (edges := masked_tiles(tiles)):
            _EDGES.backward(dout, q, k, v, lse, delta, edges, spec, dq, dk, dv)

    def _op(self, q: Tensor) -> FusedOp:
        return next(op for op in self.ops if op.device_type == q.device.type)


def _padded(op: FusedOp, dim: int, v_dim: int) -> int:
    width = max(dim, v_dim)
    return -(-width // op.dim_multiple) * op.dim_multiple


def _head_groups(q: Tensor, k: Tensor, width: int) -> Iterator[tuple[slice, slice]]:
    """Cuts the heads into groups that bound intermediate memory, with enough heads for every thread."""
    group = q.shape[2] // k.shape[2]
    num_kv_heads = k.shape[2]
    head_bytes = q.shape[0] * max(q.shape[1] * group, k.shape[1]) * width * 4
    if q.device.type == "cpu":
        least = -(-torch.get_num_threads() // (group * q.shape[0]))
        size = max(1, least, GROUP_BYTES // max(head_bytes, 1))
    else:
        size = num_kv_heads
    for first in range(0, num_kv_heads, size):
        last = min(first + size, num_kv_heads)
        yield slice(first * group, last * group), slice(first, last)


def _prepared(x: Tensor, op: FusedOp, width: int) -> Tensor:
    """(B, S, H, D) in the dtype to compute in, padded to `width`."""
    x = x.to(op.compute_dtype(x.dtype))
    return pad(x, (0, width - x.shape[3])) if width > x.shape[3] else x


def _multiple_with_product(dout: Tensor, delta: Tensor) -> Tensor:
    """Returns the multiple of dout whose row-wise product with dout is delta (0 where dout is 0)."""
    acc = dout.to(delta.dtype)
    square = torch.linalg.vecdot(acc, acc)
    factor = torch.where(square > 0, delta / square, 0.0)
    return (acc * factor.unsqueeze(-1)).to(dout.dtype)


def _launches(tiles: Tiles, batch: int, op: FusedOp) -> Iterator[tuple[Piece, int]]:
    """Yields (piece, batch row): strips are batched, so that they take the place of the batch, a row at a time."""
    for piece in pieces_of(tiles):
        if piece.shape is Shape.MASKED and not op.takes_mask:
            continue
        if piece.batch != EVERY_BATCH_ROW:
            yield piece, piece.batch
        elif piece.copies == 1:
            yield piece, EVERY_BATCH_ROW
        else:
            for row in range(batch):
                yield piece, row


def _blocks(x: Tensor, dim: int, start: int, length: int, piece: Piece, row: int) -> Tensor:
    """The rows of a piece as a view: those of a batch, or `copies` strips in the place of the batch."""
    if row != EVERY_BATCH_ROW:
        x = x[row : row + 1]
    if piece.copies == 1:
        return x.narrow(dim, start, length)
    size, stride = list(x.shape), list(x.stride())
    size[0], size[dim], stride[0] = piece.copies, length, piece.stride * x.stride(dim)
    return x.as_strided(size, stride, x.storage_offset() + start * x.stride(dim))


def _reversed(x: Tensor, piece: Piece, dim: int) -> Tensor:
    return x.flip(dim) if piece.shape is Shape.REVERSED else x


def _unreversed(x: Tensor, piece: Piece) -> Tensor:
    """A kernel's result (B, H, S, ...) in the order of the rows."""
    return _reversed(x, piece, 2)


def _rows(x: Tensor, piece: Piece, row: int) -> Tensor:
    """The query rows of a piece, (B, H, rows, D)."""
    return _reversed(_blocks(x, 1, piece.q_start, piece.rows, piece, row), piece, 1).transpose(1, 2)


def _cols(x: Tensor, piece: Piece, row: int) -> Tensor:
    """The key rows of a piece, (B, H, cols, D)."""
    return _reversed(_blocks(x, 1, piece.k_start, piece.cols, piece, row), piece, 1).transpose(1, 2)


def _add_cols(total: Tensor, part: Tensor, piece: Piece, row: int) -> None:
    """Adds the gradients of a piece's key rows; strips of masked bands overlap their neighbours, no others."""
    if piece.copies == 1 or piece.cols <= piece.stride:
        _blocks(total, 1, piece.k_start, piece.cols, piece, row).add_(part)
        return
    for odd in (0, 1):
        every_other = piece._replace(
            k_start=piece.k_start + odd * piece.stride,
            copies=(piece.copies + 1 - odd) // 2,
            stride=2 * piece.stride,
        )
        if every_other.copies:
            _blocks(total, 1, every_other.k_start, piece.cols, every_other, row).add_(part[odd::2])


def _form(op: FusedOp, piece: Piece, like: Tensor) -> tuple[bool, Tensor | None]:
    """Returns (causal, mask) as the fused kernel wants them."""
    if piece.shape is not Shape.MASKED:
        return piece.shape is not Shape.FULL, None
    diagonal = torch.arange(piece.cols, device=like.device) - torch.arange(piece.rows, device=like.device)[:, None]
    mask = torch.zeros(piece.rows, piece.cols, dtype=like.dtype, device=like.device)
    return False, mask.masked_fill_((diagonal < piece.lo) | (diagonal > piece.hi), -torch.inf)
