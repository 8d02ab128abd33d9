"""Queries of one sequence over keys and values of another, each with a layout of its own."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.attention.problem import WORLDS, Problem, attend, check, rows_of, share_of
from tests.harness.cases import CROSS_MASK_CASES, LAYOUT_CASES, LayoutCase, MaskCase, case_ids, layout_case, mask_case
from tests.harness.compare import assert_close
from tests.harness.ranks import RankPool

LENGTHS = ((23, 31), (19, 6), (1, 13), (13, 0))


def with_every_layout(layout: LayoutCase, mask: str, k_len: int) -> list[Problem]:
    """Every kind for the keys; stripes of different blocks among them."""
    return [
        Problem(mask_case(mask), layout, 17, k_len=k_len, kv_layout=kv_layout, heads=4, kv_heads=2, v_dim=3)
        for kv_layout in LAYOUT_CASES
    ]


@pytest.mark.parametrize("layout", LAYOUT_CASES, ids=case_ids(LAYOUT_CASES))
def test_all_kinds_of_layouts_together(pool: RankPool, layout: LayoutCase) -> None:
    """More keys than queries on two numbers of ranks, fewer on the two others; for the next layout the other way."""
    start = LAYOUT_CASES.index(layout) % 2
    check(pool, with_every_layout(layout, "causal", 26), WORLDS[start::2])
    check(pool, with_every_layout(layout, "window_both", 9), WORLDS[1 - start :: 2])


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUT_CASES, ids=case_ids(LAYOUT_CASES))
def test_all_kinds_of_layouts_on_every_number_of_ranks(pool: RankPool, layout: LayoutCase) -> None:
    check(pool, with_every_layout(layout, "causal", 26) + with_every_layout(layout, "window_both", 9))


@pytest.mark.parametrize("mask", CROSS_MASK_CASES, ids=case_ids(CROSS_MASK_CASES))
def test_masks(pool: RankPool, mask: MaskCase) -> None:
    problems = [
        Problem(mask, layout_case("zigzag"), q_len, k_len=k_len, kv_layout=layout_case("striped_3"), poison=True)
        for q_len, k_len in LENGTHS
    ]
    check(pool, problems)


@pytest.mark.parametrize("name", case_ids(LAYOUT_CASES))
def test_the_same_positions_under_another_layout(pool: RankPool, name: str) -> None:
    """Keys of the same sequence, but held by other ranks than the queries; also with a sink."""
    kv_layout = layout_case("contiguous" if name == "striped_1" else "striped_1")
    check(pool, [Problem(mask_case("documents&causal"), layout_case(name), 23, kv_layout=kv_layout, sink=True)])


def rows_with_nothing(group: dist.ProcessGroup, problem: Problem) -> int:
    """Checks the rows that may attend to nothing, exactly, and returns how many there are here."""
    t, expected = share_of(problem, group.rank(), group.size())
    q, k, v = (x.clone().requires_grad_() for x in t[:3])
    out, lse = attend(group, problem, q, k, v)
    dq, dk, dv = torch.autograd.grad([out, lse], [q, k, v], [t.dout, t.dlse])
    layout, kv_layout = problem.layouts(group.size())
    allowed = problem.allowed()[0]
    nothing = rows_of(~allowed.any(1), layout, group.rank(), 0)
    unseen = rows_of(~allowed.any(0), kv_layout, group.rank(), 0)
    assert (out[:, nothing] == 0).all()
    assert (lse[:, :, nothing] == -torch.inf).all()
    assert (dq[:, nothing] == 0).all()
    assert (dk[:, unseen] == 0).all()
    assert (dv[:, unseen] == 0).all()
    assert_close(out, expected.out, atol=1e-10, name="out")
    assert lse[:, :, ~nothing].isfinite().all()
    return int(nothing.sum())


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_rows_that_attend_to_nothing(pool: RankPool, backend: str) -> None:
    """Out is exactly 0, lse exactly -inf, and no gradient comes from such rows, or goes to keys nobody sees."""
    cases = {("window_left", 19, 6): 9, ("chunked_5", 19, 6): 9, ("anti_causal", 19, 6): 13, ("full", 13, 0): 13}
    for (mask, q_len, k_len), count in cases.items():
        zigzag = layout_case("zigzag")
        problem = Problem(mask_case(mask), zigzag, q_len, k_len=k_len, kv_layout=zigzag, backend=backend)
        for world_size in WORLDS:
            assert sum(pool.run(rows_with_nothing, world_size, problem)) == count
