"""torch's own fused attention operations: CPU flash, CUDA flash, cuDNN, all in one form."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


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
    def wants_packed(self) -> bool:
        """Whether it is faster on contiguous (B, H, S, D) by more than a copy costs."""
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
    wants_packed = True
    dim_multiple = 1
    max_dim = None

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Returns fp32 for half precision: torch's bf16 kernel rounds lse to 5e-5, and is no faster."""
        return torch.float64 if dtype is torch.float64 else torch.float32

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
    wants_packed = False
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
