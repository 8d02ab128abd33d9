"""Merging the partial results of ranks: the package's own collectives beside the all-reduces of Tree Attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.inputs import Shape
from benchmarks.internals import paged_kernel
from benchmarks.runner import Session, Timings
from ringattn.cache.call_marks import mark_check_on
from ringattn.cache.decode import exchange_results_by_head, gather_results, result_fields
from ringattn.comm.collectives import PersistentCollective, capacity_bytes_for

GATHER, BY_HEADS = "packed all-gather", "packed all-to-all"
TREE, TREE_OVERLAPPED = "three all-reduces", "three all-reduces, two at once"
CALLS = 10  # in a row, as in the layers of a model


class Tree:
    """Tree Attention's merge (Shyam et al. 2024, arXiv:2408.04093) with three all-reduces.

    These are the maximum of lse, then the sums of the numerators and of the denominators. It uses preallocated memory
    and skips the checks of torch.distributed's functions, as the package's own collectives do.

    Args:
        out, lse: of this rank.
        overlapped: the two sums run at the same time.
    """

    def __init__(self, out: Tensor, lse: Tensor, overlapped: bool) -> None:
        assert dist.group.WORLD is not None
        self._group, self._overlapped = dist.group.WORLD, overlapped
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
        if not self._overlapped:
            numerators.wait()
        denominators = self._group.allreduce([self._weight], self._sum)
        numerators.wait()
        denominators.wait()
        return self._numerator / self._by_row


def _works(shape: Shape, here: Session) -> dict[str, Callable[[], Tensor]]:
    """Returns the merges of the same partial results.

    All of them give the whole result to all ranks, except the packed all-to-all, which gives each rank its heads.
    """
    generator, heads, head_dim = torch.Generator().manual_seed(here.rank), shape.heads, shape.head_dim
    out = torch.randn(1, 1, heads, head_dim, generator=generator).to(here.device)
    lse = torch.randn(1, heads, 1, generator=generator).to(here.device)
    check, group = mark_check_on(here.device), dist.group.WORLD
    assert group is not None
    fields = result_fields(torch.Size((1, 1, heads)), head_dim, torch.float32)
    kernel = paged_kernel(Shape(heads, heads, head_dim, "float32"), here.device)

    def ours(collective: PersistentCollective) -> Tensor:
        check.write(collective.local[0].view(torch.int32), 0, 0)
        collective.run()
        marks, outs, lses = collective.received
        check.compare(marks.view(torch.int32))
        return kernel.merge(outs, lses, collective.first_rank, None)

    works: dict[str, Callable[[], Tensor]] = {}
    for name, make in ((GATHER, gather_results), (BY_HEADS, exchange_results_by_head)):
        collective = make(fields, capacity_bytes_for(fields, group), group, here.device)
        for place, x in zip(collective.local[1:], (out, lse), strict=True):
            place.copy_(x)
        works[name] = partial(ours, collective)
    works |= {TREE: Tree(out, lse, overlapped=False), TREE_OVERLAPPED: Tree(out, lse, overlapped=True)}
    if heads % here.world_size:
        del works[BY_HEADS]
    return works


def time_merges(shape: Shape, rounds: int, here: Session) -> Timings:
    """Times the merges in turns, several calls in a row, after comparing their results; times are of this rank."""
    works = _works(shape, here)
    expected = works[TREE]()
    for name, work in works.items():
        part = expected.chunk(here.world_size, 2)[here.rank] if name == BY_HEADS else expected
        torch.testing.assert_close(work(), part, atol=1e-5, rtol=1e-5)
    seconds = Timings({name: [] for name in works})
    with here.progress("    merging", len(works) * rounds) as tick:
        for _, (name, work) in product(range(rounds), works.items()):
            dist.barrier()
            for _ in range(CALLS):
                start = time.perf_counter()
                work()
                if here.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
            tick()
    return seconds
