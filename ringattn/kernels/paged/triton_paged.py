"""Our own kernel over pages for GPUs, in Triton: kernels/triton/paged.py, behind the contract."""

from __future__ import annotations

from torch import Tensor

from ringattn.kernels.contract import ProblemSpec, ScoreOptions
from ringattn.kernels.paged.paged_contract import PageTables, VisibleKeys
from ringattn.kernels.triton import TritonKernel
from ringattn.softmax import merge_parts


class TritonPaged:
    """See contract.PagedKernel.

    Its grid follows from shapes; lengths are read on the device. So a captured CUDA graph may be replayed after the
    contents of `tables` and `sight` have changed in place: entries after starts[B] are not looked at.
    """

    name = "triton"

    def available(self) -> list[str]:
        """Needs what the Triton kernels over tiles need."""
        return TritonKernel().available()

    def unsupported(self, call: ProblemSpec) -> list[str]:
        """See contract.PagedKernel.unsupported."""
        return TritonKernel().unsupported(call)

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
        from ringattn.kernels.triton import paged_launch

        if q.numel() and len(tables.pages):
            paged_launch.forward(q, k, v, tables, sight, spec, out, lse)

    def merge(self, outs: Tensor, lses: Tensor, first: int, sink: Tensor | None) -> Tensor:
        """See contract.PagedKernel.merge."""
        return merge_parts(outs, lses, first=first, sink=sink)
