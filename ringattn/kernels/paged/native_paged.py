"""Our own kernel over pages for the CPU: csrc/cpu/decode.h, behind the contract."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.kernels.contract import ProblemSpec, ScoreOptions
from ringattn.kernels.native import NativeKernel
from ringattn.kernels.paged.paged_contract import PageTables, VisibleKeys


@dataclass(frozen=True)
class NativePaged:
    """See contract.PagedKernel.

    Args:
        isa: the instruction set, as for native.NativeKernel.
    """

    isa: str = ""
    name: str = "native"

    def available(self) -> list[str]:
        """Builds and loads the library, at most once in a process; a reason when that fails."""
        return NativeKernel(self.isa).available()

    def unsupported(self, call: ProblemSpec) -> list[str]:
        """See contract.PagedKernel.unsupported."""
        return NativeKernel(self.isa).unsupported(call)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tables: PageTables,
        sight: VisibleKeys,
        spec: ScoreOptions,
        out: Tensor,
        lse: Tensor,
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
