"""What training does with a call, for every exchange: checkpoints, some gradients, views, several calls at once."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ringattn
from tests.attention.problem import FLAT_WAYS, MESH_WAYS, RING, Problem, Way, attend, mesh_of, rows_of, share_of
from tests.attention.test_training import NAMES, PROBLEM, check_gradients, leaves, strided
from tests.harness import oracle
from tests.harness.cases import layout_case, mask_case
from tests.harness.compare import assert_close
from tests.harness.ranks import RankPool

WAYS = (RING, *FLAT_WAYS, *MESH_WAYS)
# As many kv heads as heads: where a plan can, queries travel in the backward.
MULTI_HEAD = replace(PROBLEM, kv_heads=4)


SPREADING = tuple(way for way in WAYS if way.operation in ("ulysses", "hybrid"))


def world(way: Way) -> int:
    return 3 if way.mesh is None else 4


def through_a_checkpoint(group: dist.ProcessGroup, problem: Problem, reentrant: bool) -> None:
    _, expected = share_of(problem, group.rank(), group.size())
    inputs, dout, dlse = leaves(group, problem)
    call = functools.partial(attend, group, problem)
    out, lse = cast(tuple[Tensor, Tensor], checkpoint(call, *inputs, use_reentrant=reentrant))
    torch.autograd.backward([out, lse], [dout, dlse])
    assert_close(out, expected.out, atol=1e-10, name="out")
    check_gradients(group, [x.grad for x in inputs], expected)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_checkpoint(pool: RankPool, way: Way) -> None:
    for base, reentrant in ((PROBLEM, False), (MULTI_HEAD, True)):
        pool.run(through_a_checkpoint, world(way), replace(base, way=way), reentrant)


def some_subsets(group: dist.ProcessGroup, problem: Problem) -> None:
    _, expected = share_of(problem, group.rank(), group.size())
    alone = [tuple(i == j for j in range(4)) for i in range(4)]
    for wanted in (*alone, (True, True, True, False), (False, True, True, False), (True,) * 4, (False,) * 4):
        inputs, dout, dlse = leaves(group, problem)
        for x, want in zip(inputs, wanted, strict=True):
            x.requires_grad_(want)
        out, lse = attend(group, problem, *inputs)
        if any(wanted):
            torch.autograd.backward([out, lse], [dout, dlse])
        assert [x.grad is not None for x in inputs] == list(wanted)
        found = [(x.grad, name) for x, name in zip(inputs, NAMES, strict=True) if x.grad is not None]
        check_gradients(group, [grad for grad, _ in found], expected, [name for _, name in found])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_gradients_of_some_subsets(pool: RankPool, way: Way) -> None:
    pool.run(some_subsets, world(way), replace(PROBLEM if way in SPREADING else MULTI_HEAD, way=way))


def lse_on_some_ranks(group: dist.ProcessGroup, problem: Problem) -> None:
    """The first rank has a loss of the output alone, the last one of lse alone, the others of both."""
    layout, _ = problem.layouts(group.size())
    t, sink = problem.tensors(), problem.sink_logits()
    first, last = (torch.from_numpy(layout.positions(rank)) for rank in (0, group.size() - 1))
    dout, dlse = t.dout.clone(), t.dlse.clone()
    dlse[:, :, first], dout[:, last] = 0, 0
    whole = oracle.dense_gradients(*t[:3], problem.allowed(), dout, dlse, sink=sink)
    local = [rows_of(x, layout, group.rank()) for x in (whole.dq, whole.dk, whole.dv)]
    inputs, local_dout, local_dlse = leaves(group, problem)
    out, lse = attend(group, problem, *inputs)
    if group.rank() == 0:
        torch.autograd.backward([out], [local_dout])
    elif group.rank() == group.size() - 1:
        torch.autograd.backward([lse], [local_dlse])
    else:
        torch.autograd.backward([out, lse], [local_dout, local_dlse])
    check_gradients(group, [x.grad for x in inputs], whole._replace(dq=local[0], dk=local[1], dv=local[2]))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_losses_of_other_outputs_on_other_ranks(pool: RankPool, way: Way) -> None:
    for base in (PROBLEM, MULTI_HEAD):
        pool.run(lse_on_some_ranks, world(way), replace(base, way=way))


def without_lse(group: dist.ProcessGroup, problem: Problem) -> None:
    """The function that returns the output alone gives the same, and the same gradients."""
    way = problem.way
    layout, _ = problem.layouts(group.size())
    options: dict[str, Any] = {"mask": problem.built_mask(), "layout": layout}
    if way.operation != "ring":
        options["stages"] = way.stages
    found = []
    for alone in (True, False):
        inputs, dout, _ = leaves(group, problem)
        call = getattr(ringattn, f"{way.operation}_attention{'' if alone else '_with_lse'}")
        result = call(*inputs[:3], group if way.mesh is None else mesh_of(group, way), sink=inputs[3], **options)
        out = result if alone else result[0]
        found.append([out.detach(), *torch.autograd.grad(out, inputs, dout)])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, atol=1e-12, name="with and without lse")


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_without_lse(pool: RankPool, way: Way) -> None:
    pool.run(without_lse, world(way), replace(MULTI_HEAD, way=way))


def of_views(group: dist.ProcessGroup, problem: Problem, how: str) -> None:
    layout, _ = problem.layouts(group.size())
    views = [strided(x, how) for x in problem.tensors()[:4]]
    e = oracle.dense_gradients(views[0], views[1], views[2], problem.allowed(), views[3])
    q, k, v, dout = (strided(rows_of(x, layout, group.rank()), how) for x in views)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, _ = attend(group, problem, q, k, v)
    found = (out, *torch.autograd.grad(out, [q, k, v], dout))
    for name, actual, exact in zip(("out", "dq", "dk", "dv"), found, (e.out, e.dq, e.dk, e.dv), strict=True):
        assert_close(actual, rows_of(exact, layout, group.rank()), atol=1e-10, name=f"{name} of {how}")


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_views(pool: RankPool, way: Way) -> None:
    for how in ("transposed", "sliced", "expanded")[WAYS.index(way) % 3 :][:2]:
        pool.run(of_views, world(way), replace(MULTI_HEAD, sink=False, way=way), how)


def in_turns(group: dist.ProcessGroup, ways: tuple[Way, ...]) -> None:
    """Calls of different exchanges on the same ranks, gone back through in another order."""
    made = []
    for way in ways:
        problem = replace(PROBLEM, way=way)
        inputs, dout, dlse = leaves(group, problem)
        made.append((inputs, attend(group, problem, *inputs), (dout, dlse)))
    _, expected = share_of(PROBLEM, group.rank(), group.size())
    for inputs, outputs, cotangents in reversed(made):
        torch.autograd.backward(outputs, cotangents)
        check_gradients(group, [x.grad for x in inputs], expected)


def test_exchanges_in_turns(pool: RankPool) -> None:
    pool.run(in_turns, 4, WAYS)


def repeated(group: dist.ProcessGroup, problem: Problem) -> None:
    runs = []
    for _ in range(3):
        inputs, dout, dlse = leaves(group, problem)
        out, lse = attend(group, problem, *inputs)
        runs.append([out, lse, *torch.autograd.grad([out, lse], inputs, [dout, dlse])])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_repeated_calls_are_identical(pool: RankPool, way: Way) -> None:
    """Bit for bit, in a dtype where the order of sums would show."""
    for kv_heads in (1,) if way in SPREADING else (4, 1):
        problem = Problem(
            mask_case("causal"), layout_case("zigzag"), 61, heads=4, kv_heads=kv_heads, sink=True,
            dtype=torch.float32, way=way,
        )  # fmt: skip
        pool.run(repeated, world(way), problem)
