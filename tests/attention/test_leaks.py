"""What a query may not see does not reach it: not one bit of its output or of its document's gradients."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ringattn
from tests.attention.problem import WORLDS
from tests.harness.cases import LAYOUT_CASES, LayoutCase, case_ids, tensors
from tests.harness.ranks import RankPool

LENGTHS = (7, 1, 0, 12, 3, 14)
ENDS = [sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1)]
SEQ_LEN = ENDS[-1]
LEFT, RIGHT = 4, 2


def solve_changed(
    group: dist.ProcessGroup,
    mask: ringattn.Mask,
    layout: ringattn.Layout,
    rows: slice,
    value: float | None,
    backend: str,
) -> list[Tensor]:
    """This rank's out, lse, dq, dk, dv where keys and values in `rows` are `value`; None leaves them."""
    t = tensors(3, 1, SEQ_LEN, SEQ_LEN, 4, 2, 8, 8, torch.float32)
    k, v = t.k.clone(), t.v.clone()
    if value is not None:
        k[:, rows], v[:, rows] = value, value
    q, k, v = (ringattn.shard(x, layout, group).requires_grad_() for x in (t.q, k, v))
    dout = ringattn.shard(t.dout, layout, group)
    out, lse = ringattn.ring_attention_with_lse(q, k, v, group, mask=mask, layout=layout, backend=backend)
    return [x.detach() for x in (out, lse.transpose(1, 2), *torch.autograd.grad(out, [q, k, v], dout))]


def compare(before: list[Tensor], after: list[Tensor], same: Tensor, changed: Tensor) -> bool:
    """Rows of `same` must agree bit for bit; returns whether any row of `changed` does not."""
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv")[: len(before)], before, after, strict=True):
        assert torch.equal(a[:, same], b[:, same]), f"{name} of rows that must not have changed"
    return any(not torch.equal(a[:, changed], b[:, changed]) for a, b in zip(before, after, strict=True))


def change_a_document(group: dist.ProcessGroup, case: LayoutCase, causal: bool, backend: str) -> list[bool]:
    """For each document: whether its own rows here felt its change; others must not have."""
    layout = case.build(SEQ_LEN, group.size())
    mask = ringattn.documents(ENDS) & ringattn.causal() if causal else ringattn.documents(ENDS)
    position = torch.from_numpy(layout.positions(group.rank()))
    felt = []
    before = solve_changed(group, mask, layout, slice(0), None, backend)
    for start, stop in pairwise(ENDS):
        after = solve_changed(group, mask, layout, slice(start, stop), 30.0, backend)
        own = (start <= position) & (position < stop)
        felt.append(compare(before, after, ~own, own))
    return felt


@pytest.mark.parametrize("worlds", [(2, 3), pytest.param((1, 4), marks=pytest.mark.long)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", LAYOUT_CASES, ids=case_ids(LAYOUT_CASES))
def test_documents_do_not_leak(pool: RankPool, layout: LayoutCase, causal: bool, worlds: tuple[int, int]) -> None:
    for world_size in worlds:
        felt = pool.run(change_a_document, world_size, layout, causal, ("sdpa", "reference")[world_size % 2])
        assert [any(ranks) for ranks in zip(*felt, strict=True)] == [length > 0 for length in LENGTHS]


def change_a_key(group: dist.ProcessGroup, case: LayoutCase, backend: str) -> list[bool]:
    """For a few keys: whether the queries that see it felt its change; others must not have."""
    layout = case.build(SEQ_LEN, group.size())
    mask = ringattn.sliding_window(LEFT, RIGHT)
    position = torch.from_numpy(layout.positions(group.rank()))
    felt = []
    before = solve_changed(group, mask, layout, slice(0), None, backend)
    for key in (0, 17, 18, SEQ_LEN - 1):
        after = solve_changed(group, mask, layout, slice(key, key + 1), 30.0, backend)
        seen = (key - position >= -LEFT) & (key - position <= RIGHT)
        # Gradients of keys follow from queries that see the changed one, so only out, lse and dq are bound by it.
        felt.append(compare(before[:3], after[:3], ~seen, seen))
    return felt


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("layout", LAYOUT_CASES, ids=case_ids(LAYOUT_CASES))
def test_keys_outside_a_window_do_not_leak(pool: RankPool, layout: LayoutCase, backend: str) -> None:
    for world_size in WORLDS:
        felt = pool.run(change_a_key, world_size, layout, backend)
        assert [any(ranks) for ranks in zip(*felt, strict=True)] == [True] * 4


def poison_other_ranks(group: dist.ProcessGroup, backend: str) -> None:
    """Two documents on each rank, and NaN in all the keys of one rank after the other."""
    layout = ringattn.contiguous(SEQ_LEN, group.size())
    starts = [int(layout.positions(rank)[0]) for rank in range(group.size())] + [SEQ_LEN]
    mask = ringattn.documents(sorted([*starts, *(start + 3 for start in starts[:-1])]))
    before = solve_changed(group, mask, layout, slice(0), None, backend)
    for rank, (start, stop) in enumerate(pairwise(starts)):
        after = solve_changed(group, mask, layout, slice(start, stop), float("nan"), backend)
        if rank == group.rank():
            assert after[0].isnan().all()
        else:
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_nan_in_documents_of_other_ranks_is_not_seen(pool: RankPool, backend: str) -> None:
    for world_size in (2, 3, 4):
        pool.run(poison_other_ranks, world_size, backend)


def poison_the_future(group: dist.ProcessGroup, backend: str) -> None:
    """Causal, contiguous: the last rank's keys are NaN, and nobody before it may notice."""
    layout = ringattn.contiguous(SEQ_LEN, group.size())
    start = int(layout.positions(group.size() - 1)[0])
    args = (group, ringattn.causal(), layout, slice(start, SEQ_LEN))
    before, after = solve_changed(*args, None, backend), solve_changed(*args, float("nan"), backend)
    if group.rank() == group.size() - 1:
        assert after[0].isnan().all()
        return
    for a, b in zip(before[:3], after[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_nan_in_the_future_is_not_seen(pool: RankPool, backend: str) -> None:
    for world_size in (2, 3, 4):
        pool.run(poison_the_future, world_size, backend)


def test_the_comparison_can_fail() -> None:
    a = [torch.zeros(1, 3, 1)] * 5
    b = [torch.tensor([0.0, 1e-30, 0.0]).view(1, 3, 1)] * 5
    rows = torch.tensor([True, True, False])
    assert compare(a, b, ~rows, rows)
    with pytest.raises(AssertionError, match="must not have changed"):
        compare(a, b, rows, ~rows)
