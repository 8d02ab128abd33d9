"""The native CPU kernel over pages: the ops of csrc/cpu/decode.h as a PagedKernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.kernels.contract import Call, Spec
from ringattn.kernels.native import NativeKernel
from ringattn.kernels.paged.contract import PageTables, Sight


@dataclass(frozen=True)
class NativePaged:
    """A contract.PagedKernel in C++ for the CPU, for fp32, fp16 and bf16.

    Args:
        isa: as in native.NativeKernel.
    """

    isa: str = ""
    name: str = "native"

    def available(self) -> list[str]:
        """Compiles and loads the library, once per process. Returns the reason if that fails."""
        return NativeKernel(self.isa).available()

    def unsupported(self, call: Call) -> list[str]:
        """See contract.PagedKernel.unsupported."""
        return NativeKernel(self.isa).unsupported(call)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tables: PageTables, sight: Sight, spec: Spec, out: Tensor, lse: Tensor
    ) -> None:
        """See contract.PagedKernel.forward."""
        softcap = spec.softcap or 0.0
        q = q if q.stride(-1) == 1 else q.contiguous()
        torch.ops.ringattn_native.decode(q, k, v, *tables, *sight, spec.scale, softcap, out, lse, self.isa)

    def merge(self, outs: Tensor, lses: Tensor, first: int, sink: Tensor | None) -> Tensor:
        """See contract.PagedKernel.merge."""
        out = outs.new_empty(outs.shape[1:])
        sink = None if sink is None else sink.float().contiguous()
        torch.ops.ringattn_native.merge(outs, lses, first, sink, out)
        return out
