"""What training does with a call: checkpoints, autocast, partial gradients, views, several calls and groups at once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import product
from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ringattn
from tests.attention.problem import WORLDS, Problem, attend, rows_of, share_of
from tests.harness import oracle
from tests.harness.cases import layout_case, mask_case
from tests.harness.compare import assert_close, assert_within_rule
from tests.harness.ranks import RankPool

PROBLEM = Problem(
    mask_case("documents&causal"), layout_case("zigzag"), 23, batch=2, heads=4, kv_heads=2, v_dim=3, sink=True
)
NAMES = ("dq", "dk", "dv", "dsink")


def leaves(group: dist.ProcessGroup, problem: Problem = PROBLEM) -> tuple[list[Tensor], Tensor, Tensor]:
    """This rank's q, k, v and sink as leaves; dout; dlse."""
    t, _ = share_of(problem, group.rank(), group.size())
    sink = problem.sink_logits()
    assert sink is not None
    return [x.detach().clone().requires_grad_() for x in (t.q, t.k, t.v, sink)], t.dout, t.dlse


def check_gradients(
    group: dist.ProcessGroup, grads: Sequence[Tensor | None], expected: oracle.Gradients, names: Sequence[str] = NAMES
) -> None:
    """Compares local gradients with the oracle's; the sink's is summed over the group first."""
    for name, grad in zip(names, grads, strict=True):
        assert grad is not None, name
        if name == "dsink":
            grad = grad.clone()
            dist.all_reduce(grad, group=group)
        assert_close(grad, getattr(expected, name), atol=1e-10, name=name)


def everywhere(pool: RankPool, fn: object, *args: object) -> None:
    for world_size in WORLDS:
        pool.run(fn, world_size, *args)  # type: ignore[arg-type]


# ---- checkpoints, modes, autocast


def through_a_checkpoint(group: dist.ProcessGroup, reentrant: bool) -> None:
    _, expected = share_of(PROBLEM, group.rank(), group.size())
    inputs, dout, dlse = leaves(group)
    call = functools.partial(attend, group, PROBLEM)
    out, lse = cast(tuple[Tensor, Tensor], checkpoint(call, *inputs, use_reentrant=reentrant))
    torch.autograd.backward([out, lse], [dout, dlse])
    assert_close(out, expected.out, atol=1e-10, name="out")
    check_gradients(group, [x.grad for x in inputs], expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(pool: RankPool, reentrant: bool) -> None:
    everywhere(pool, through_a_checkpoint, reentrant)


def without_gradients(group: dist.ProcessGroup) -> None:
    inputs, _, _ = leaves(group)
    with_graph = attend(group, PROBLEM, *inputs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = attend(group, PROBLEM, *inputs)
        for a, b in zip(found, with_graph, strict=True):
            assert not a.requires_grad
            assert a.grad_fn is None
            assert b.requires_grad
            assert torch.equal(a, b)
        assert found[0].is_inference() == (mode is torch.inference_mode)


def test_no_grad_and_inference_mode(pool: RankPool) -> None:
    everywhere(pool, without_gradients)


def under_autocast(group: dist.ProcessGroup, backend: str) -> None:
    layout = ringattn.zigzag(23, group.size())
    t = Problem(mask_case("causal"), layout_case("zigzag"), 23, heads=4, kv_heads=2, dim=8, v_dim=8).tensors()
    local = [rows_of(x, layout, group.rank()) for x in t[:4]]

    def solve(dtype: torch.dtype, autocast: bool) -> list[Tensor]:
        q, k, v = (x.to(dtype).requires_grad_() for x in local[:3])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = ringattn.ring_attention(q, k, v, group, mask=ringattn.causal(), layout=layout, backend=backend)
        # Backward runs outside autocast, as it should.
        return [out.detach(), *torch.autograd.grad(out, [q, k, v], local[3].to(out.dtype))]

    plain, cast_down = solve(torch.bfloat16, False), solve(torch.float32, True)
    assert [x.dtype for x in cast_down] == [torch.bfloat16] + [torch.float32] * 3
    for a, b in zip(plain, cast_down, strict=True):
        assert torch.equal(a.float(), b.float())
    for a, b in zip(solve(torch.float64, False), solve(torch.float64, True), strict=True):
        assert a.dtype == b.dtype == torch.float64
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_autocast(pool: RankPool, backend: str) -> None:
    everywhere(pool, under_autocast, backend)


def backward_inside_autocast(group: dist.ProcessGroup) -> None:
    _, expected = share_of(PROBLEM, group.rank(), group.size())
    inputs, dout, dlse = leaves(group)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = attend(group, PROBLEM, *inputs)
        grads = torch.autograd.grad([out, lse], inputs, [dout, dlse])
        check_gradients(group, grads, expected)


def test_backward_inside_autocast_keeps_float64(pool: RankPool) -> None:
    everywhere(pool, backward_inside_autocast)


# ---- which gradients


def every_subset(group: dist.ProcessGroup) -> None:
    _, expected = share_of(PROBLEM, group.rank(), group.size())
    for wanted in product([False, True], repeat=4):
        inputs, dout, dlse = leaves(group)
        for x, want in zip(inputs, wanted, strict=True):
            x.requires_grad_(want)
        out, lse = attend(group, PROBLEM, *inputs)
        assert out.requires_grad == lse.requires_grad == any(wanted)
        if any(wanted):
            torch.autograd.backward([out, lse], [dout, dlse])
        assert [x.grad is not None for x in inputs] == list(wanted)
        found = [(x.grad, name) for x, name in zip(inputs, NAMES, strict=True) if x.grad is not None]
        check_gradients(group, [grad for grad, _ in found], expected, [name for _, name in found])


def test_gradients_of_every_subset(pool: RankPool) -> None:
    everywhere(pool, every_subset)


def only_one_output(group: dist.ProcessGroup, of_lse: bool) -> None:
    t, sink = PROBLEM.tensors(), PROBLEM.sink_logits()
    dout, dlse = (torch.zeros_like(t.dout), t.dlse) if of_lse else (t.dout, None)
    whole = oracle.dense_gradients(*t[:3], PROBLEM.allowed(), dout, dlse, sink=sink)
    layout, _ = PROBLEM.layouts(group.size())
    dq, dk, dv = (rows_of(x, layout, group.rank()) for x in (whole.dq, whole.dk, whole.dv))
    inputs, local_dout, local_dlse = leaves(group)
    out, lse = attend(group, PROBLEM, *inputs)
    target, cotangent = (lse, local_dlse) if of_lse else (out, local_dout)
    grads = torch.autograd.grad(target, inputs, cotangent)
    check_gradients(group, grads, whole._replace(dq=dq, dk=dk, dv=dv))


@pytest.mark.parametrize("of_lse", [False, True])
def test_a_loss_of_one_output(pool: RankPool, of_lse: bool) -> None:
    everywhere(pool, only_one_output, of_lse)


# ---- views


def strided(x: Tensor, how: str) -> Tensor:
    """The same values, not contiguous."""
    if how == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "sliced":
        wide = torch.full((*x.shape[:3], 2 * x.shape[3] + 1), torch.nan, dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    # One batch row and one head, seen as many.
    return x[:1, :, :1].contiguous().expand(x.shape)


def of_views(group: dist.ProcessGroup, how: str, backend: str) -> None:
    problem = Problem(PROBLEM.mask, PROBLEM.layout, 23, batch=2, heads=4, kv_heads=2, v_dim=3, backend=backend)
    dtype = torch.float32 if backend == "native" else torch.float64
    layout, _ = problem.layouts(group.size())
    views = [strided(x.to(dtype), how) for x in problem.tensors()[:4]]
    e = oracle.dense_gradients(views[0], views[1], views[2], problem.allowed(), views[3])
    plain = oracle.plain_gradients(views[0], views[1], views[2], problem.allowed(), views[3])
    q, k, v, dout = (strided(rows_of(x, layout, group.rank()), how) for x in views)
    if layout.num_tokens(group.rank()):
        assert not any(x.is_contiguous() for x in (q, k, v, dout))
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, _ = attend(group, problem, q, k, v)
    grads = torch.autograd.grad(out, [q, k, v], dout)
    for name, actual in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True):
        exact, same = (rows_of(getattr(x, name), layout, group.rank()) for x in (e, plain))
        if dtype is torch.float64:
            assert_close(actual, exact, atol=1e-10, name=f"{name} of {how}")
        else:
            assert_within_rule(actual, exact, same, name=f"{name} of {how}")


@pytest.mark.parametrize("backend", ["native", "sdpa", "reference"])
@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded"])
def test_views(pool: RankPool, how: str, backend: str) -> None:
    everywhere(pool, of_views, how, backend)


# ---- several calls


def interleaved(group: dist.ProcessGroup) -> None:
    """Two graphs, made one after the other, gone back through in either order, and in one sweep."""
    other = Problem(mask_case("window_both"), layout_case("zigzag"), 17, heads=3, kv_heads=1, sink=True)
    for order in ([0, 1], [1, 0], None):
        made = []
        for problem in (PROBLEM, other):
            inputs, dout, dlse = leaves(group, problem)
            _, expected = share_of(problem, group.rank(), group.size())
            made.append((inputs, attend(group, problem, *inputs), (dout, dlse), expected))
        for i in order or []:
            torch.autograd.backward(made[i][1], made[i][2])
        if order is None:
            torch.autograd.backward([*made[0][1], *made[1][1]], [*made[0][2], *made[1][2]])
        for inputs, _, _, expected in made:
            check_gradients(group, [x.grad for x in inputs], expected)


def test_two_calls_interleaved(pool: RankPool) -> None:
    everywhere(pool, interleaved)


def stacked(group: dist.ProcessGroup) -> None:
    """Two layers, the second's queries being the first's output, against the oracle's two layers."""
    problem = Problem(mask_case("documents&causal"), layout_case("zigzag"), 19, heads=2)
    layout, _ = problem.layouts(group.size())
    t = problem.tensors()
    q, k, v = (x.clone().requires_grad_() for x in t[:3])
    hidden, _ = oracle.dense_attention(q, k, v, problem.allowed())
    out, _ = oracle.dense_attention(hidden, k, v, problem.allowed())
    expected = [out, *torch.autograd.grad(out, [q, k, v], t.dout)]
    q, k, v = (rows_of(x, layout, group.rank()).detach().requires_grad_() for x in t[:3])
    hidden, _ = attend(group, problem, q, k, v)
    out, _ = attend(group, problem, hidden, k, v)
    found = [out, *torch.autograd.grad(out, [q, k, v], rows_of(t.dout, layout, group.rank()))]
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert_close(a, rows_of(b, layout, group.rank()), atol=1e-10, name=name)


def test_two_layers(pool: RankPool) -> None:
    everywhere(pool, stacked)


def two_groups(group: dist.ProcessGroup) -> None:
    """Two models side by side: calls on groups of the same ranks in turns, backward in turns as well."""
    other = dist.new_group([0, 1, 2, 3])
    _, expected = share_of(PROBLEM, group.rank(), group.size())
    for _ in range(2):
        made = [(g, *leaves(g)) for g in (group, other)]
        outputs = [attend(g, PROBLEM, *inputs) for g, inputs, _, _ in made]
        for (g, inputs, dout, dlse), outs in zip(made, outputs, strict=True):
            check_gradients(g, torch.autograd.grad(outs, inputs, [dout, dlse]), expected)
    dist.destroy_process_group(other)


def test_two_groups_in_turns(pool: RankPool) -> None:
    pool.run(two_groups, 4)


def repeated(group: dist.ProcessGroup, backend: str) -> None:
    """Bit for bit the same, forward and backward, in a dtype where order would show."""
    problem = Problem(
        mask_case("causal"), layout_case("zigzag"), 61, heads=4, dim=16, v_dim=16, sink=True, dtype=torch.float32,
        backend=backend,
    )  # fmt: skip
    runs = []
    for _ in range(3):
        inputs, dout, dlse = leaves(group, problem)
        out, lse = attend(group, problem, *inputs)
        runs.append([out, lse, *torch.autograd.grad([out, lse], inputs, [dout, dlse])])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_repeated_calls_are_identical(pool: RankPool, backend: str) -> None:
    everywhere(pool, repeated, backend)


# ---- a loss over valid tokens


def loss_over_valid_tokens(group: dist.ProcessGroup) -> None:
    """Only the first positions count, so that ranks but the first have no valid token at all."""
    problem = Problem(mask_case("causal"), layout_case("contiguous"), 24, heads=2)
    layout, _ = problem.layouts(group.size())
    valid = torch.arange(24) < 5

    def loss_of(out: Tensor, mine: Tensor, target: Tensor, count: Tensor) -> Tensor:
        return (out - target)[:, mine].square().sum() / count

    t = problem.tensors()
    q, k, v = (x.clone().requires_grad_() for x in t[:3])
    exact = loss_of(oracle.dense_attention(q, k, v, problem.allowed())[0], valid, t.dout, valid.sum())
    grads = torch.autograd.grad(exact, [q, k, v])

    mine = rows_of(valid, layout, group.rank(), 0)
    if group.size() > 1:
        assert bool(mine.any()) == (group.rank() == 0)
    count = mine.sum()
    dist.all_reduce(count, group=group)
    q, k, v = (rows_of(x, layout, group.rank()).detach().requires_grad_() for x in t[:3])
    loss = loss_of(attend(group, problem, q, k, v)[0], mine, rows_of(t.dout, layout, group.rank()), count)
    found = torch.autograd.grad(loss, [q, k, v])
    total = loss.detach().clone()
    dist.all_reduce(total, group=group)
    assert_close(total, exact.detach(), atol=1e-12, name="loss")
    for name, a, b in zip(("dq", "dk", "dv"), found, grads, strict=True):
        assert_close(a, rows_of(b, layout, group.rank()), atol=1e-12, name=name)


def test_ranks_without_a_valid_token(pool: RankPool) -> None:
    """No NaN, and neither 1 / world size nor a factor of it: a sum over valid tokens over their global count."""
    everywhere(pool, loss_over_valid_tokens)
