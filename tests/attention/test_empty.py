"""Nothing at all: ranks without tokens, sequences without rows, batches without entries, ranks that see nothing."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import ringattn
from tests.attention.problem import WORLDS, Problem, attend, check
from tests.harness.cases import LAYOUT_CASES, LayoutCase, case_ids, layout_case, mask_case
from tests.harness.ranks import RankPool


@pytest.mark.parametrize("layout", LAYOUT_CASES, ids=case_ids(LAYOUT_CASES))
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_fewer_tokens_than_ranks(pool: RankPool, layout: LayoutCase, backend: str) -> None:
    problems = [
        Problem(mask_case(mask), layout, seq_len, batch=2, sink=True, poison=True, backend=backend)
        for seq_len in (0, 1, 3)
        for mask in ("documents&causal", "full")
    ]
    check(pool, problems)


def test_ranks_without_queries_or_without_keys(pool: RankPool) -> None:
    """All the queries on rank 0, where there are keys everywhere, and the other way round."""
    contiguous = layout_case("contiguous")
    problems = [
        Problem(mask_case(mask), contiguous, q_len, k_len=k_len, kv_layout=contiguous)
        for mask in ("full", "causal")
        for q_len, k_len in ((1, 13), (13, 1), (0, 13), (13, 0), (0, 0))
    ]
    check(pool, problems)


def empty_batch(group: dist.ProcessGroup, backend: str | None, masks: bool) -> None:
    layout = ringattn.zigzag(13, group.size())
    q = torch.randn(0, layout.num_tokens(group.rank()), 4, 5, dtype=torch.float64, requires_grad=True)
    k = torch.randn(0, layout.num_tokens(group.rank()), 2, 5, dtype=torch.float64, requires_grad=True)
    v = torch.randn(0, layout.num_tokens(group.rank()), 2, 3, dtype=torch.float64, requires_grad=True)
    sink = torch.ones(4, dtype=torch.float64, requires_grad=True)
    mask: ringattn.Mask | list[ringattn.Mask] = [] if masks else ringattn.causal()
    out, lse = ringattn.ring_attention_with_lse(q, k, v, group, mask=mask, layout=layout, sink=sink, backend=backend)
    assert out.shape == (0, q.shape[1], 4, 3)
    assert lse.shape == (0, 4, q.shape[1])
    grads = torch.autograd.grad([out, lse], [q, k, v, sink], [torch.ones_like(out), torch.ones_like(lse)])
    assert [g.shape for g in grads] == [x.shape for x in (q, k, v, sink)]
    assert (grads[3] == 0).all()


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("masks", [False, True])
def test_a_batch_of_none(pool: RankPool, backend: str | None, masks: bool) -> None:
    for world_size in WORLDS:
        pool.run(empty_batch, world_size, backend, masks)


def attend_to_nothing(group: dist.ProcessGroup, problem: Problem) -> bool:
    """Whether this rank's queries attend to anything; checks that the result is empty where they do not."""
    layout, kv_layout = problem.layouts(group.size())
    t = problem.tensors()
    q, k, v = (
        ringattn.shard(x, held, group).requires_grad_()
        for x, held in ((t.q, layout), (t.k, kv_layout), (t.v, kv_layout))
    )
    out, lse = attend(group, problem, q, k, v)
    (dq,) = torch.autograd.grad(out, [q], torch.ones_like(out))
    own = problem.allowed()[0][torch.from_numpy(layout.positions(group.rank()))]
    if own.any():
        return True
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert (dq == 0).all()
    return False


@pytest.mark.parametrize("mask", ["window_left", "chunked_5", "anti_causal"])
def test_a_rank_that_attends_to_nothing(pool: RankPool, mask: str) -> None:
    """Sixteen queries over four keys: the later ranks see none of them."""
    contiguous = layout_case("contiguous")
    problem = Problem(mask_case(mask), contiguous, 16, k_len=4, kv_layout=contiguous)
    check(pool, [problem])
    sees = pool.run(attend_to_nothing, 4, problem)
    assert sees[0]
    assert not sees[3]
