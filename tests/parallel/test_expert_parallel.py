"""Experts spread over ranks: output and all gradients as of the layer in one piece, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from ringattn.errors import ArgumentError
from ringattn.parallel.expert_parallel import MixtureOfExperts, TokenDispatch, grouped_matmul, segment_matmul
from tests.harness.compare import assert_close, assert_within_rule
from tests.harness.ranks import RankPool

DIM, HIDDEN, EXPERTS, TOP_K = 6, 5, 8, 3
COEFFICIENT = 0.7  # of the load-balancing loss
UNEVEN = {1: (13,), 2: (9, 4), 4: (5, 0, 7, 1)}  # tokens of each rank
SOME_EMPTY = {2: (0, 3), 4: (0, 0, 3, 0)}
IDLE = 2  # the expert to which no token goes


@dataclass(frozen=True)
class Result:
    """What a layer gave, and the gradients of a loss."""

    out: Tensor
    balance: Tensor
    dx: Tensor
    parameters: dict[str, Tensor]


def layer() -> MixtureOfExperts:
    """The layer, the same on every rank; one expert is never chosen."""
    torch.manual_seed(1)
    moe = MixtureOfExperts(DIM, HIDDEN, num_experts=EXPERTS, top_k=TOP_K).double()
    with torch.no_grad():
        moe.router.scores.weight[IDLE] = 0.0
        moe.router.scores.weight[IDLE, 0] = -40.0
    return moe


def tokens(count: int) -> tuple[Tensor, Tensor]:
    """All tokens, and the gradient of the output."""
    generator = torch.Generator().manual_seed(2)
    x, dout = torch.randn(2, count, DIM, generator=generator, dtype=torch.float64)
    x[:, 0] = 1.0
    return x, dout


def solve(moe: MixtureOfExperts, x: Tensor, dout: Tensor) -> Result:
    x = x.clone().requires_grad_()
    out, balance = moe.mixed(x)
    torch.autograd.backward((out * dout).sum() + COEFFICIENT * balance)
    assert x.grad is not None
    grads = {}
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None, name
        grads[name] = parameter.grad
    return Result(out.detach(), balance.detach(), x.grad, grads)


def plain(x: Tensor, dout: Tensor) -> Result:
    """The same by the definition: every expert computes every token, and a dense matrix weighs them."""
    moe = layer()
    x = x.clone().requires_grad_()
    probabilities = F.linear(x, moe.router.scores.weight).softmax(-1)
    order = probabilities.argsort(dim=-1, descending=True)[:, :TOP_K]
    chosen = torch.zeros_like(probabilities).scatter(1, order, 1.0)
    weights = probabilities * chosen
    weights = weights / weights.sum(-1, keepdim=True)
    hidden = F.silu(torch.einsum("td,edh->teh", x, moe.experts.gate)) * torch.einsum("td,edh->teh", x, moe.experts.up)
    out = torch.einsum("te,teh,ehd->td", weights, hidden, moe.experts.down)
    balance = EXPERTS * (chosen.mean(0) / TOP_K * probabilities.mean(0)).sum()
    torch.autograd.backward((out * dout).sum() + COEFFICIENT * balance)
    assert x.grad is not None
    grads = {name: p.grad for name, p in moe.named_parameters() if p.grad is not None}
    return Result(out.detach(), balance.detach(), x.grad, grads)


def spread_over_ranks(group: dist.ProcessGroup, counts: tuple[int, ...]) -> None:
    first = sum(counts[: group.rank()])
    mine = slice(first, first + counts[group.rank()])
    x, dout = tokens(sum(counts))
    expected = plain(x, dout)
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("ep",))
    moe = layer()
    moe.spread(mesh, batch=[group])
    found = solve(moe, x[mine], dout[mine])

    assert_close(found.out, expected.out[mine], atol=1e-10, name="out")
    assert_close(found.dx, expected.dx[mine], atol=1e-10, name="dx")
    balance = found.balance.clone()
    dist.all_reduce(balance, group=group)
    assert_close(balance, expected.balance, atol=1e-10, name="balance")
    for name, grad in found.parameters.items():
        if isinstance(grad, DTensor):
            whole = grad.full_tensor()
        else:
            whole = grad.clone()
            dist.all_reduce(whole, group=group)
        assert_close(whole, expected.parameters[name], atol=1e-10, name=name)
        if name.startswith("experts"):
            assert not whole[IDLE].any()


@pytest.mark.parametrize(("world", "counts"), [*UNEVEN.items(), *SOME_EMPTY.items()])
def test_output_and_gradients(pool: RankPool, world: int, counts: tuple[int, ...]) -> None:
    pool.run(spread_over_ranks, world, counts)


def test_one_process_without_a_group() -> None:
    x, dout = tokens(11)
    found, expected = solve(layer(), x, dout), plain(x, dout)
    assert_close(found.out, expected.out, atol=1e-10, name="out")
    assert_close(found.dx, expected.dx, atol=1e-10, name="dx")
    assert_close(found.balance, expected.balance, atol=1e-10, name="balance")
    for name, grad in found.parameters.items():
        assert_close(grad, expected.parameters[name], atol=1e-10, name=name)


def test_the_balancing_gradient_joins_in() -> None:
    x, dout = tokens(11)
    moe = layer()
    moe.balance_weight = COEFFICIENT
    x = x.clone().requires_grad_()
    torch.autograd.backward((moe(x) * dout).sum())
    expected = plain(x.detach(), dout)
    assert x.grad is not None
    assert_close(x.grad, expected.dx, atol=1e-10, name="dx")
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None
        assert_close(parameter.grad, expected.parameters[name], atol=1e-10, name=name)


def dispatched(group: dist.ProcessGroup, counts: tuple[int, ...]) -> tuple[int, list[int]]:
    """Sends each token's number about; returns how many rows came here, and checks that each came k times."""
    num_tokens = counts[group.rank()]
    generator = torch.Generator().manual_seed(group.rank())
    experts = torch.rand(num_tokens, EXPERTS, generator=generator).argsort(dim=-1)[:, :TOP_K]
    dispatch = TokenDispatch.of(experts, EXPERTS, group)
    numbers = torch.arange(num_tokens, dtype=torch.float64)[:, None] + 100 * group.rank()
    rows = dispatch.there(numbers)
    assert len(rows) == sum(dispatch.num_rows)
    back = dispatch.back(rows)
    assert torch.equal(back, numbers[:, None].expand(-1, TOP_K, -1))
    return sum(dispatch.leaving), dispatch.num_rows


@pytest.mark.parametrize(("world", "counts"), [*UNEVEN.items(), *SOME_EMPTY.items()])
def test_no_token_is_dropped(pool: RankPool, world: int, counts: tuple[int, ...]) -> None:
    results = pool.run(dispatched, world, counts)
    assert [left for left, _ in results] == [count * TOP_K for count in counts]
    assert sum(sum(arrived) for _, arrived in results) == sum(counts) * TOP_K


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_matmul_is_segment_matmul(dtype: torch.dtype) -> None:
    num_rows = [5, 0, 1, 11]
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(17, 16, generator=generator).to(dtype)
    stack = torch.randn(4, 16, 8, generator=generator).to(dtype)
    dout = torch.randn(17, 8, generator=generator).to(dtype)

    def solved(matmul: object, kind: torch.dtype) -> list[Tensor]:
        leaves = [rows.to(kind).requires_grad_(), stack.to(kind).requires_grad_()]
        out = matmul(*leaves, num_rows)  # type: ignore[operator]
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(kind))]

    exact = solved(segment_matmul, torch.float64)
    looped, grouped = solved(segment_matmul, dtype), solved(grouped_matmul, dtype)
    for name, a, b, c in zip(("out", "drows", "dstack"), grouped, exact, looped, strict=True):
        assert_within_rule(a, b, c, name=name)
    assert not grouped[2][1].any()


def test_more_choices_than_experts() -> None:
    with pytest.raises(ArgumentError, match="top_k=9"):
        MixtureOfExperts(DIM, HIDDEN, num_experts=8, top_k=9)
