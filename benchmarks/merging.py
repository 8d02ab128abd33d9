"""Ways to merge the partial results of ranks: the package's own collectives, and Tree Attention's all-reduces."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measure import progress
from benchmarks.session import Session
from ringattn.cache.call_marks import mark_check_on
from ringattn.cache.decode import exchange_results_by_head, gather_results, result_fields
from ringattn.comm.collectives import PersistentCollective, capacity_bytes_for
from ringattn.kernels import ProblemSpec
from ringattn.kernels.paged import select_paged
from ringattn.score import Score

GATHER, BY_HEADS = "packed all-gather", "packed all-to-all"
TREE, TREE_TOGETHER = "three all-reduces", "three all-reduces, two at once"
IN_A_ROW = 10


class Tree:
    """Tree Attention's merge: the largest lse of all ranks, then the sums of the numerators and of the denominators.

    In memory that is kept, and without the checks of torch.distributed's functions, as the package's own collectives.

    Args:
        out, lse: of this rank.
        together: the two sums are under way at once.
    """

    def __init__(self, out: Tensor, lse: Tensor, together: bool) -> None:
        assert dist.group.WORLD is not None
        self._group, self._together = dist.group.WORLD, together
        self._out, self._lse, self._numerator = out, lse, torch.empty_like(out)
        self._top, self._weight = torch.empty_like(lse), torch.empty_like(lse)
        self._by_row = self._weight.transpose(1, 2).unsqueeze(-1)
        self._max, self._sum = dist.AllreduceOptions(), dist.AllreduceOptions()
        self._max.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
        self._sum.reduceOp = dist.ReduceOp(dist.ReduceOp.SUM)

    def __call__(self) -> Tensor:
        """Returns the output over the keys of all ranks."""
        self._top.copy_(self._lse)
        self._group.allreduce([self._top], self._max).wait()
        torch.sub(self._lse, self._top, out=self._weight).exp_()
        torch.mul(self._out, self._by_row, out=self._numerator)
        numerators = self._group.allreduce([self._numerator], self._sum)
        if not self._together:
            numerators.wait()
        denominators = self._group.allreduce([self._weight], self._sum)
        numerators.wait()
        denominators.wait()
        return self._numerator / self._by_row


def ways(heads: int, head_dim: int, here: Session) -> dict[str, Callable[[], Tensor]]:
    """Returns the ways, each of which merges the same partial results, of which every rank has its own.

    All give the result to all ranks, but the packed all-to-all: each rank gets its heads.
    """
    generator = torch.Generator().manual_seed(here.rank)
    out = torch.randn(1, 1, heads, head_dim, generator=generator).to(here.device)
    lse = torch.randn(1, heads, 1, generator=generator).to(here.device)
    mark_check = mark_check_on(here.device)
    group = dist.group.WORLD
    assert group is not None
    fields = result_fields(torch.Size((1, 1, heads)), head_dim, torch.float32)
    collectives = [
        made(fields, capacity_bytes_for(fields, group), group, here.device)
        for made in (gather_results, exchange_results_by_head)
    ]
    dims = (heads, heads, head_dim, head_dim)
    kernel = select_paged(None, ProblemSpec(here.device.type, torch.float32, *dims, False, Score(1.0)))

    for collective in collectives:
        for place, x in zip(collective.local[1:], (out, lse), strict=True):
            place.copy_(x)  # where a kernel puts them

    def ours(collective: PersistentCollective) -> Tensor:
        mark_check.write(collective.local[0].view(torch.int32), 0, 0)
        collective.run()
        marks, outs, lses = collective.received
        mark_check.compare(marks.view(torch.int32))
        return kernel.merge(outs, lses, collective.first_rank, None)

    gather, by_heads = (partial(ours, collective) for collective in collectives)
    found: dict[str, Callable[[], Tensor]] = {
        GATHER: gather,
        TREE: Tree(out, lse, together=False),
        TREE_TOGETHER: Tree(out, lse, together=True),
    }
    return found if heads % here.world_size else {**found, BY_HEADS: by_heads}


def merges(heads: int, head_dim: int, rounds: int, here: Session) -> list[dict[str, object]]:
    """Measures them in turns, several calls in a row as in the layers of a model; times are those of this rank."""
    works = ways(heads, head_dim, here)
    expected = works[TREE]()
    for name, work in works.items():
        parts = expected.chunk(here.world_size, 2)
        torch.testing.assert_close(work(), parts[here.rank] if name == BY_HEADS else expected, atol=1e-5, rtol=1e-5)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    with progress("    merging", len(works) * rounds, here.rank == 0) as tick:
        for _, (name, work) in product(range(rounds), works.items()):
            dist.barrier()
            for _ in range(IN_A_ROW):
                start = time.perf_counter()
                work()
                if here.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
            tick()
    return [
        {"kind": "merge", "contender": name, "min_s": min(s), "median_s": statistics.median(s), "rounds_s": s}
        for name, s in seconds.items()
    ]
