"""Our own kernel over pages for the CPU: csrc/cpu/decode.h, behind the contract."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.kernels.contract import ProblemSpec, Queries, State
from ringattn.kernels.native import NativeKernel
from ringattn.kernels.paged.paged_contract import PageTables, Pools, VisibleKeys
from ringattn.score import Score


@dataclass(frozen=True)
class NativePaged:
    """A `PagedKernel` in C++ for the CPU, for fp32, fp16 and bf16.

    Args:
        isa: as in native.NativeKernel.
    """

    isa: str = ""
    name: str = "native"
    score_terms = NativeKernel.score_terms

    def available(self) -> list[str]:
        """Compiles and loads the library, once per process. Returns the reason if that fails."""
        return NativeKernel(self.isa).available()

    def unsupported(self, problem: ProblemSpec) -> list[str]:
        return NativeKernel(self.isa).unsupported(problem)

    def forward(
        self, queries: Queries, pools: Pools, tables: PageTables, visible: VisibleKeys, score: Score, state: State
    ) -> None:
        q, softcap = queries.q, score.softcap or 0.0
        q = q if q.stride(-1) == 1 else q.contiguous()
        torch.ops.ringattn_native.decode(
            q, *pools, *tables, *visible, score.factor, softcap, state.out, state.lse, self.isa
        )

    def merge(self, outs: Tensor, lses: Tensor, first: int, sink: Tensor | None) -> Tensor:
        out = outs.new_empty(outs.shape[1:])
        sink = None if sink is None else sink.float().contiguous()
        torch.ops.ringattn_native.merge(outs, lses, first, sink, out)
        return out
