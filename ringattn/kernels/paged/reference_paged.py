"""The reference kernel over pages: plain tensor operations, sequence by sequence, on the visible keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ringattn.kernels.contract import ProblemSpec, Queries, State, unsupported_terms
from ringattn.kernels.paged.paged_contract import PageTables, Pools, VisibleKeys
from ringattn.score import Score
from ringattn.softmax import merge_, merge_parts


class ReferencePaged:
    """A `PagedKernel` in plain tensor operations."""

    name = "reference"
    score_terms = frozenset({"softcap"})

    def available(self) -> list[str]:
        """Always runs."""
        return []

    def unsupported(self, problem: ProblemSpec) -> list[str]:
        """Refuses only terms of the score that it does not compute."""
        return unsupported_terms(problem, self.score_terms)

    def forward(
        self, queries: Queries, pools: Pools, tables: PageTables, visible: VisibleKeys, score: Score, state: State
    ) -> None:
        q, (k, v), (out, lse) = queries.q, pools, state
        acc, group = lse.dtype, q.shape[2] // k.shape[2]
        starts = tables.starts.tolist()
        for b in range(q.shape[0]):
            pages, slots = (x[starts[b] : starts[b + 1]] for x in (tables.pages, tables.slots))
            first, stop = visible.first[b, :, None], visible.stop[b, :, None]
            mask = (slots.flatten() >= first) & (slots.flatten() < stop)  # (T, keys)
            used = mask.any(dim=0)
            page, slot = used.reshape(slots.shape).nonzero(as_tuple=True)
            if not len(page):
                continue
            keys, values = (pool[pages[page].long(), slot].to(acc) for pool in (k, v))
            rows = q[b].to(acc).reshape(q.shape[1], -1, group, q.shape[3])
            scores = torch.einsum("thgd,shd->hgts", rows, keys).flatten(0, 1) * score.factor
            if score.softcap is not None:
                scores = score.softcap * torch.tanh(scores / score.softcap)
            scores = scores.masked_fill(~mask[:, used], -torch.inf)
            part_lse = torch.logsumexp(scores, dim=-1)
            weights = torch.exp(scores - part_lse[..., None]).nan_to_num_(nan=0.0)
            weights = weights.reshape(-1, group, *weights.shape[1:])
            part = torch.einsum("hgts,shd->thgd", weights, values).flatten(1, 2)
            merge_(out[b : b + 1], lse[b : b + 1], part[None], part_lse[None])

    def merge(self, outs: Tensor, lses: Tensor, first: int, sink: Tensor | None) -> Tensor:
        return merge_parts(outs, lses, first=first, sink=sink)
