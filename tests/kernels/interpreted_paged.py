"""What the paged Triton kernel promises beyond the contract; run under triton's interpreter by test_triton_paged.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ringattn.kernels.contract import ProblemSpec, Queries, State
from ringattn.kernels.paged import PAGED_BACKENDS, PageTables, Pools, VisibleKeys, select_paged
from ringattn.score import Score
from tests.kernels.test_paged import SHAPES, Problem

KERNEL = PAGED_BACKENDS["triton"]
SHAPE = replace(SHAPES["three tokens"], longest=130)


def test_the_same_inputs_give_the_same_bits() -> None:
    problem = Problem(SHAPE, torch.bfloat16)
    for a, b in zip(problem.attended(KERNEL, "cpu"), problem.attended(KERNEL, "cpu"), strict=True):
        assert torch.equal(a, b)


def test_tables_may_be_longer_than_what_they_list() -> None:
    """As in a captured graph: buffers of a fixed size, and lengths that change in place."""
    problem = Problem(SHAPE, torch.float32)
    expected = problem.attended(KERNEL, "cpu")
    pages, slots, starts = problem.tables
    far = torch.full((1, SHAPE.page_size), 5, dtype=torch.int32)
    problem.halves = lambda: iter(  # type: ignore[method-assign]
        [PageTables(torch.cat([pages, torch.full((90,), 1 << 30)]).int(), torch.cat([slots, *[far] * 90]), starts)]
    )
    out, lse = problem.attended(KERNEL, "cpu")
    problem.check(out, lse, "triton")
    torch.testing.assert_close(lse, expected[1], rtol=1e-4, atol=1e-4)


def test_addresses_have_64_bits(tmp_path: Path) -> None:
    problem = Problem(replace(SHAPE, longest=40), torch.float16)
    expected = problem.attended(KERNEL, "cpu")
    problem.k, problem.v = (far_apart(x, tmp_path / name) for name, x in (("k", problem.k), ("v", problem.v)))
    for a, b in zip(problem.attended(KERNEL, "cpu"), expected, strict=True):
        assert torch.equal(a, b)


def far_apart(x: Tensor, file: Path) -> Tensor:
    """A copy, in a sparse file, in which the last page is more than 32 bits from the first."""
    stride = (1 << 32) // (x.shape[0] - 1) + 8
    strides = (stride, *x.contiguous().stride()[1:])
    size = stride * (x.shape[0] - 1) + x.numel()
    storage = torch.from_file(str(file), shared=True, size=size, dtype=x.dtype)
    return storage.as_strided(x.shape, strides).copy_(x)


def test_rows_that_see_nothing_keep_their_bits() -> None:
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(*shape, generator=g) for shape in ((1, 2, 2, 16), (3, 8, 1, 16), (3, 8, 1, 16)))
    out, lse = torch.randn(1, 2, 2, 16, generator=g), torch.randn(1, 2, 2, generator=g)
    before = out.clone(), lse.clone()
    slots = torch.arange(16, dtype=torch.int32).reshape(2, 8)
    tables = PageTables(torch.tensor([2, 0]).int(), slots, torch.tensor([0, 2]).int())
    visible = VisibleKeys(torch.tensor([[0, 0]]).int(), torch.tensor([[0, 9]]).int())
    KERNEL.forward(Queries(q), Pools(k, v), tables, visible, Score(0.4), State(out, lse))
    assert torch.equal(out[:, 0], before[0][:, 0])
    assert torch.equal(lse[..., 0], before[1][..., 0])
    assert not torch.isclose(lse[..., 1], before[1][..., 1]).any()


def test_runs_on_the_cpu_where_the_interpreter_is_on() -> None:
    call = ProblemSpec("cpu", torch.float32, 2, 2, 16, 16, False, Score(0.4))
    assert select_paged("triton", call) is KERNEL
