"""Every kernel over pages keeps the promises of kernels/paged/paged_contract.py, on every device that is here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ringattn.kernels.contract import ProblemSpec, Queries
from ringattn.kernels.native import instruction_sets
from ringattn.kernels.paged import PAGED_BACKENDS, PagedKernel, PageTables, Pools, VisibleKeys
from ringattn.kernels.paged.native_paged import NativePaged
from ringattn.kernels.select_kernel import reasons_against
from ringattn.score import Score
from ringattn.softmax import empty_state
from tests.harness.compare import assert_close, assert_within_rule
from tests.harness.oracle import dense_attention, plain_attention

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
# What must run, whatever machine this is: a suite of skips proves nothing.
NEVER_SKIPPED = (("native", "cpu"), ("reference", "cpu"))


@dataclass(frozen=True)
class Shape:
    """Of the queries and the pools."""

    tokens: int
    heads: int
    kv_heads: int
    dim: int
    v_dim: int
    page_size: int
    softcap: float | None = None
    longest: int = 903

    @property
    def lengths(self) -> tuple[int, ...]:
        return 0, 1, 75, 9, self.longest


SHAPES = {
    "one token": Shape(1, 4, 1, 128, 128, 16),
    "a long sequence": Shape(1, 2, 1, 16, 16, 16, longest=4203),
    "three tokens": Shape(3, 6, 2, 7, 5, 4),
    "pages of one": Shape(2, 3, 3, 40, 65, 1, 2.0),
    "large pages": Shape(1, 10, 2, 64, 72, 64),
    "pages of 24": Shape(5, 2, 1, 16, 20, 24),
    "many rows": Shape(5, 13, 1, 20, 33, 256),
}


class Problem:
    """Sequences of several lengths, with holes, in shuffled pages; what nobody sees is NaN, or another's live keys."""

    def __init__(self, shape: Shape, dtype: torch.dtype, live: bool = False) -> None:
        s, size, g = shape, shape.page_size, torch.Generator().manual_seed(3)
        self.shape, self.dtype = shape, dtype
        self.lengths = lengths = shape.lengths
        self.counts = [-(-n // size) for n in lengths]
        entries = sum(self.counts)
        order = torch.randperm(entries + 3, generator=g)
        self.k, self.v = (
            torch.randn(entries + 3, s.kv_heads, size, dim, generator=g).to(dtype).transpose(1, 2)
            for dim in (s.dim, s.v_dim)
        )
        self.q = torch.randn(len(lengths), s.tokens, s.heads, s.dim, generator=g).to(dtype)
        slots = torch.full((entries, size), -1, dtype=torch.int32)
        starts = torch.tensor([0, *torch.tensor(self.counts).cumsum(0).tolist()], dtype=torch.int32)
        for b, n in enumerate(lengths):
            where = torch.randperm(self.counts[b] * size, generator=g)[: max(0, n - n // 7)]
            slots[starts[b] : starts[b + 1]].view(-1)[where] = torch.randperm(n, generator=g)[: len(where)].int()
        self.tables = PageTables(order[:entries].int(), slots, starts)
        stop = torch.tensor(lengths)[:, None] - torch.arange(s.tokens).flip(0)[None, :]
        first = (stop - 60).clamp(min=0) * torch.tensor([0, 0, 1, 0, 1])[:, None]
        self.visible = VisibleKeys(first.int(), stop.clamp(min=0).int())
        self._poison(live)

    def _poison(self, live: bool) -> None:
        needed = torch.zeros(self.k.shape[:2], dtype=torch.bool)
        for b in range(len(self.lengths)):
            pages, seen = self.of(b)
            needed[pages] = seen.any(0).reshape(len(pages), self.shape.page_size)
        for pool in (self.k, self.v):
            pool[~needed] = 50 * pool[needed][:1] if live else torch.nan

    def of(self, b: int) -> tuple[Tensor, Tensor]:
        """The pages of a sequence, and which of their slots each of its queries sees, (T, slots)."""
        entries = slice(int(self.tables.starts[b]), int(self.tables.starts[b + 1]))
        at = self.tables.slots[entries].flatten()
        seen = (at >= self.visible.first[b][:, None]) & (at < self.visible.stop[b][:, None])
        return self.tables.pages[entries].long(), seen

    def call(self, device: str) -> ProblemSpec:
        s = self.shape
        return ProblemSpec(device, self.dtype, s.heads, s.kv_heads, s.dim, s.v_dim, False, Score(0.3, s.softcap))

    def halves(self) -> Iterator[PageTables]:
        """The tables in two parts, each of which has a part of each sequence."""
        begins = self.tables.starts[:-1].tolist()
        middles = [begin + (count + 1) // 2 for begin, count in zip(begins, self.counts, strict=True)]
        for low, high in ((begins, middles), (middles, self.tables.starts[1:].tolist())):
            index = torch.cat([torch.arange(a, z) for a, z in zip(low, high, strict=True)]).long()
            ends = torch.tensor([0, *(z - a for a, z in zip(low, high, strict=True))]).cumsum(0).int()
            yield PageTables(self.tables.pages[index], self.tables.slots[index], ends)

    def attended(self, kernel: PagedKernel, device: str) -> tuple[Tensor, Tensor]:
        """What a kernel finds, half by half."""
        s = self.shape
        queries, pools = Queries(self.q.to(device)), Pools(self.k.to(device), self.v.to(device))
        state = empty_state(queries.q, s.v_dim)
        visible = VisibleKeys(*(x.to(device) for x in self.visible))
        for half in self.halves():
            tables = PageTables(*(x.to(device) for x in half))
            kernel.forward(queries, pools, tables, visible, Score(0.3, s.softcap), state)
        return state.out.cpu(), state.lse.cpu()

    def check(self, out: Tensor, lse: Tensor, name: str) -> None:
        """Against dense attention in float64."""
        for b in range(len(self.lengths)):
            pages, seen = self.of(b)
            keys, values = (pool[pages].flatten(0, 1).clone() for pool in (self.k, self.v))
            keys[~seen.any(0)], values[~seen.any(0)] = 0, 0
            given = (self.q[b : b + 1], keys[None], values[None], seen)
            expected, expected_lse = dense_attention(*given, scale=0.3, softcap=self.shape.softcap)
            if self.dtype == torch.float64:
                assert_close(out[b : b + 1], expected, atol=1e-10, name=f"{name}'s out")
                assert_close(lse[b : b + 1], expected_lse, atol=1e-10, name=f"{name}'s lse")
                continue
            plain, plain_lse = plain_attention(*given, scale=0.3, softcap=self.shape.softcap)
            assert_within_rule(out[b : b + 1], expected, plain, name=f"{name}'s out", check_dtype=False)
            assert_within_rule(lse[b : b + 1], expected_lse, plain_lse, name=f"{name}'s lse", check_dtype=False)


def variants(backend: str, dtype: torch.dtype) -> list[PagedKernel]:
    """A backend, once for each set of instructions that it has."""
    if backend == "native":
        return [NativePaged(isa) for isa in instruction_sets(dtype)]
    return [PAGED_BACKENDS[backend]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", PAGED_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", ["nan", "live"])
@pytest.mark.parametrize("shape", SHAPES)
def test_contract(shape: str, poison: str, dtype: torch.dtype, backend: str, device: str) -> None:
    problem = Problem(SHAPES[shape], dtype, live=poison == "live")
    reasons = reasons_against(PAGED_BACKENDS[backend], problem.call(device))
    if (backend, device) in NEVER_SKIPPED and dtype != torch.float64:
        assert not reasons
    if reasons:
        pytest.skip(f"{backend} on {device}: {' and '.join(reasons)}")
    for kernel in variants(backend, dtype):
        problem.check(*problem.attended(kernel, device), str(kernel))
