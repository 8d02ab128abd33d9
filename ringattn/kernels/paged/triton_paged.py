"""The Triton kernel over pages for GPUs (triton/paged_kernels.py), behind the contract."""

from __future__ import annotations

from torch import Tensor

from ringattn.kernels.contract import ProblemSpec, Queries, State
from ringattn.kernels.paged.paged_contract import PageTables, Pools, VisibleKeys
from ringattn.kernels.triton import TritonKernel
from ringattn.score import Score
from ringattn.softmax import merge_parts


class TritonPaged:
    """A `PagedKernel` in Triton.

    Its grid follows from shapes; lengths are read on the device. So a captured CUDA graph may be replayed after the
    contents of `tables` and `visible` have changed in place: entries after starts[B] are not looked at.
    """

    name = "triton"
    score_terms = TritonKernel.score_terms

    def available(self) -> list[str]:
        """Needs what the Triton kernels over tiles need."""
        return TritonKernel().available()

    def unsupported(self, problem: ProblemSpec) -> list[str]:
        return TritonKernel().unsupported(problem)

    def forward(
        self, queries: Queries, pools: Pools, tables: PageTables, visible: VisibleKeys, score: Score, state: State
    ) -> None:
        from ringattn.kernels.triton import paged_launch

        if queries.q.numel() and len(tables.pages):
            paged_launch.forward(queries, pools, tables, visible, score, state)

    def merge(self, outs: Tensor, lses: Tensor, first: int, sink: Tensor | None) -> Tensor:
        return merge_parts(outs, lses, first=first, sink=sink)
