"""The fused attention operations of torch behind one interface: CPU flash, CUDA flash, cuDNN."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ringattn.kernels.contract import Gradients


class DenseOperands(NamedTuple):
    """The operands of one fused call, over a rectangle or a square triangle. Heads come before rows.

    Args:
        q: (B, H, Sq, D).
        k: (B, Hkv, Sk, D).
        v: (B, Hkv, Sk, D).
        causal: key j is visible to query i if j <= i; otherwise all keys are.
        mask: (Sq, Sk), added to the scores; None adds nothing.
        scale: factor on q·k.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    mask: Tensor | None
    scale: float


class FusedOp(Protocol):
    """One fused attention operation of torch."""

    @property
    def device_type(self) -> str:
        """The device type that it runs on."""
        ...

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of its inputs."""
        ...

    @property
    def takes_mask(self) -> bool:
        """Whether it takes an additive mask."""
        ...

    @property
    def wants_packed(self) -> bool:
        """Whether contiguous (B, H, S, D) operands save more time than the copy costs."""
        ...

    @property
    def dim_multiple(self) -> int:
        """Head dims must be multiples of this."""
        ...

    @property
    def max_dim(self) -> int | None:
        """The largest head dim, or None."""
        ...

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype to compute in for inputs of `dtype`."""
        ...

    def forward(self, operands: DenseOperands) -> tuple[Tensor, Tensor]:
        """Returns out (B, H, Sq, D) and lse (B, H, Sq), natural log."""
        ...

    def backward(self, operands: DenseOperands, dout: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """Returns the gradients of q, k and v, in their shapes.

        Args:
            operands: of the forward.
            dout: (B, H, Sq, D), the gradient of out.
            out: (B, H, Sq, D), the result of the forward.
            lse: (B, H, Sq), the same.
        """
        ...


class CpuFlash:
    """aten._scaled_dot_product_flash_attention_for_cpu."""

    device_type = "cpu"
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    takes_mask = True
    wants_packed = True
    dim_multiple = 1
    max_dim = None

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Returns fp32 for half precision: the bf16 operation rounds lse to 5e-5, and is not faster."""
        return torch.float64 if dtype is torch.float64 else torch.float32

    def forward(self, operands: DenseOperands) -> tuple[Tensor, Tensor]:
        q, k, v, causal, mask, scale = operands
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
        return out, lse

    def backward(self, operands: DenseOperands, dout: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        q, k, v, causal, mask, scale = operands
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
        return Gradients(dq, dk, dv)


class CudaFlash:
    """aten._scaled_dot_product_flash_attention: FlashAttention-2 as built into torch."""

    device_type = "cuda"
    dtypes = (torch.bfloat16, torch.float16)
    takes_mask = False
    wants_packed = False
    dim_multiple = 8
    max_dim = 256

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Computes in the inputs' own dtype."""
        return dtype

    def forward(self, operands: DenseOperands) -> tuple[Tensor, Tensor]:
        q, k, v, causal, _, scale = operands
        result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return result[0], result[1]

    def backward(self, operands: DenseOperands, dout: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        q, k, v, causal, _, scale = operands
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
        return Gradients(dq, dk, dv)


class CudnnFlash(CudaFlash):
    """aten._scaled_dot_product_cudnn_attention."""

    max_dim = 128

    def forward(self, operands: DenseOperands) -> tuple[Tensor, Tensor]:
        q, k, v, causal, _, scale = operands
        result = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return result[0], result[1].reshape(q.shape[:3])

    def backward(self, operands: DenseOperands, dout: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        q, k, v, causal, _, scale = operands
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
        return Gradients(dq, dk, dv)
