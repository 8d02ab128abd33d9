"""What is handed to the process group to send is what the plan says, to the byte; and it is copied once at most."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from ringattn.attention.auto_exchange import prepare
from ringattn.attention.validate import AttentionCall
from ringattn.comm import messages
from ringattn.comm.topology import RankMesh, rank_mesh
from ringattn.score import Score
from tests.attention.problem import (
    FLAT_WAYS,
    MESH_WAYS,
    RING,
    Problem,
    Way,
    attend,
    mesh_of,
    operations_of_c10d,
    share_of,
)
from tests.harness.cases import layout_case, mask_case
from tests.harness.ranks import RankPool

WAYS = (RING, *FLAT_WAYS, *MESH_WAYS)


@contextlib.contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Within it, every message handed to a process group to send leaves its bytes."""
    sent: list[int] = []
    original = messages.start

    def counting(group: dist.ProcessGroup, operations: Sequence[messages.Operation]) -> list[messages.PendingMessage]:
        sent.extend(op.message.tensor.nbytes for op in operations if op.is_send)
        return original(group, operations)

    messages.start = counting
    try:
        yield sent
    finally:
        messages.start = original


def team_for(group: dist.ProcessGroup, way: Way) -> RankMesh:
    return rank_mesh(group if way.mesh is None else mesh_of(group, way))


def planned_and_sent(
    group: dist.ProcessGroup, problem: Problem, wanted: tuple[bool, bool, bool]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """This rank's bytes in (forward, backward), by the plan and as they were sent."""
    t, _ = share_of(problem, group.rank(), group.size())
    q, k, v = (x.clone().requires_grad_(want) for x, want in zip(t[:3], wanted, strict=True))
    layout, kv_layout = problem.layouts(group.size())
    attend(group, problem, q, k, v)  # the first call of a signature compares notes
    with counted_bytes() as forward:
        out, _ = attend(group, problem, q, k, v)
    with counted_bytes() as backward:
        torch.autograd.grad(out, [x for x in (q, k, v) if x.requires_grad], t.dout)
    call = AttentionCall(
        f"{problem.way.operation}_attention", q, k, v, Score(), problem.built_mask(), layout, kv_layout, None,
        problem.way.operation, problem.way.stages, returns_lse=True,
    )  # fmt: skip
    _, plan = prepare(call, team_for(group, problem.way))
    return plan.bytes_sent(), (sum(forward), sum(backward))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_bytes_are_those_of_the_plan(pool: RankPool, way: Way) -> None:
    """Kv heads as many as heads, and fewer; uneven shards; two bytes an element, and eight; gradients of some."""
    base = Problem(mask_case("causal"), layout_case("zigzag"), 37, heads=6, kv_heads=6, dim=4, v_dim=2, way=way)
    everything = (True, True, True)
    cases = [
        (base, everything),
        (replace(base, kv_heads=2, dtype=torch.bfloat16), everything),
        (replace(base, kv_heads=1, batch=2, mask=mask_case("documents&causal")), everything),
        (replace(base, mask=mask_case("window_left"), layout=layout_case("contiguous")), (True, False, False)),
        (base, (False, True, True)),
    ]
    moved = 0
    for problem, wanted in cases:
        for planned, sent in pool.run(planned_and_sent, 4, problem, wanted):
            assert planned == sent
            moved += sum(sent)
    assert moved > 0


def test_queries_travel_back_when_that_is_fewer_bytes(pool: RankPool) -> None:
    """Forward: 3 hops of keys and values. Backward: of queries where there are as many kv heads, else of keys."""
    rows = 8
    for kv_heads, by_keys in ((4, False), (1, True)):
        problem = Problem(
            mask_case("full"), layout_case("contiguous"), 4 * rows, heads=4, kv_heads=kv_heads, dtype=torch.bfloat16
        )
        for _, (forward, backward) in pool.run(planned_and_sent, 4, problem, (True, True, True)):
            kv, q = rows * kv_heads * 8, rows * 4
            assert forward == 3 * kv * 2
            assert backward == (3 * kv * (2 + 4) if by_keys else 3 * q * (8 * 2 + 8 + 4 * 4))


def test_a_window_costs_a_gather_its_halo(pool: RankPool) -> None:
    problem = Problem(mask_case("window_left"), layout_case("contiguous"), 64, kv_heads=1, way=Way("gather"))
    halo = 4 * 1 * 8 * 8  # four keys back; one kv head; 4 + 4 numbers of 8 bytes
    found = [sent for _, sent in pool.run(planned_and_sent, 4, problem, (True, True, True))]
    assert [forward for forward, _ in found] == [halo, halo, halo, 0]
    assert sum(backward for _, backward in found) == 2 * 3 * halo


def operations(group: dist.ProcessGroup, problem: Problem) -> set[str]:
    """Which operations of torch.distributed a call, forward and backward, comes down to."""
    t, _ = share_of(problem, group.rank(), group.size())
    q, k, v = (x.clone().requires_grad_() for x in t[:3])
    attend(group, problem, q, k, v)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out, _ = attend(group, problem, q, k, v)
        torch.autograd.grad(out, [q, k, v], t.dout)
    return operations_of_c10d(profile)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_nothing_but_messages(pool: RankPool, way: Way) -> None:
    """No collective and no barrier: what is counted above is all there is."""
    problem = Problem(mask_case("causal"), layout_case("zigzag"), 37, heads=4, way=way)
    assert pool.run(operations, 4, problem) == [{"c10d::send", "c10d::recv_"}] * 4
