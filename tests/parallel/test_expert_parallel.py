"""Experts sharded over ranks: output and all gradients equal the whole layer's, in float64."""

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
from ringattn.parallel import MixtureOfExperts
from ringattn.parallel.moe import grouped_matmul, segment_matmul
from ringattn.parallel.token_dispatcher import TokenDispatcher
from tests.harness.compare import assert_close, assert_within_rule
from tests.harness.ranks import RankPool

DIM, HIDDEN, EXPERTS, TOP_K = 6, 5, 8, 3
AUX_LOSS_WEIGHT = 0.7
UNEVEN = {1: (13,), 2: (9, 4), 4: (5, 0, 7, 1)}  # tokens of each rank
SOME_EMPTY = {2: (0, 3), 4: (0, 0, 3, 0)}
IDLE = 2  # an expert that receives no token


@dataclass(frozen=True)
class Result:
    """The outputs of a layer, and the gradients of a loss."""

    out: Tensor
    aux_loss: Tensor
    dx: Tensor
    parameters: dict[str, Tensor]


def layer() -> MixtureOfExperts:
    """Returns the layer, the same on every rank; expert IDLE is never selected."""
    torch.manual_seed(1)
    moe = MixtureOfExperts(DIM, HIDDEN, num_experts=EXPERTS, top_k=TOP_K).double()
    with torch.no_grad():
        moe.router.scores.weight[IDLE] = 0.0
        moe.router.scores.weight[IDLE, 0] = -40.0
    return moe


def tokens(count: int) -> tuple[Tensor, Tensor]:
    """Returns the tokens of all ranks, and the gradient of the output."""
    generator = torch.Generator().manual_seed(2)
    x, dout = torch.randn(2, count, DIM, generator=generator, dtype=torch.float64)
    x[:, 0] = 1.0
    return x, dout


def solve(moe: MixtureOfExperts, x: Tensor, dout: Tensor) -> Result:
    x = x.clone().requires_grad_()
    out, aux_loss = moe.forward_with_aux_loss(x)
    torch.autograd.backward((out * dout).sum() + AUX_LOSS_WEIGHT * aux_loss)
    assert x.grad is not None
    grads = {}
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None, name
        grads[name] = parameter.grad
    return Result(out.detach(), aux_loss.detach(), x.grad, grads)


def plain(x: Tensor, dout: Tensor) -> Result:
    """The definition: every expert computes every token, and a dense weight matrix combines the outputs."""
    moe = layer()
    x = x.clone().requires_grad_()
    probabilities = F.linear(x, moe.router.scores.weight).softmax(-1)
    order = probabilities.argsort(dim=-1, descending=True)[:, :TOP_K]
    chosen = torch.zeros_like(probabilities).scatter(1, order, 1.0)
    weights = probabilities * chosen
    weights = weights / weights.sum(-1, keepdim=True)
    hidden = F.silu(torch.einsum("td,edh->teh", x, moe.experts.gate)) * torch.einsum("td,edh->teh", x, moe.experts.up)
    out = torch.einsum("te,teh,ehd->td", weights, hidden, moe.experts.down)
    aux_loss = EXPERTS * (chosen.mean(0) / TOP_K * probabilities.mean(0)).sum()
    torch.autograd.backward((out * dout).sum() + AUX_LOSS_WEIGHT * aux_loss)
    assert x.grad is not None
    grads = {name: p.grad for name, p in moe.named_parameters() if p.grad is not None}
    return Result(out.detach(), aux_loss.detach(), x.grad, grads)


def solve_on_ranks(group: dist.ProcessGroup, counts: tuple[int, ...]) -> None:
    first = sum(counts[: group.rank()])
    mine = slice(first, first + counts[group.rank()])
    x, dout = tokens(sum(counts))
    expected = plain(x, dout)
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("ep",))
    moe = layer()
    moe.shard_experts(mesh, batch_groups=[group])
    found = solve(moe, x[mine], dout[mine])

    assert_close(found.out, expected.out[mine], atol=1e-10, name="out")
    assert_close(found.dx, expected.dx[mine], atol=1e-10, name="dx")
    aux_loss = found.aux_loss.clone()
    dist.all_reduce(aux_loss, group=group)
    assert_close(aux_loss, expected.aux_loss, atol=1e-10, name="aux_loss")
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
    pool.run(solve_on_ranks, world, counts)


def test_one_process_without_a_group() -> None:
    x, dout = tokens(11)
    found, expected = solve(layer(), x, dout), plain(x, dout)
    assert_close(found.out, expected.out, atol=1e-10, name="out")
    assert_close(found.dx, expected.dx, atol=1e-10, name="dx")
    assert_close(found.aux_loss, expected.aux_loss, atol=1e-10, name="aux_loss")
    for name, grad in found.parameters.items():
        assert_close(grad, expected.parameters[name], atol=1e-10, name=name)


def test_forward_adds_the_load_balancing_gradient() -> None:
    x, dout = tokens(11)
    moe = layer()
    moe.aux_loss_weight = AUX_LOSS_WEIGHT
    x = x.clone().requires_grad_()
    torch.autograd.backward((moe(x) * dout).sum())
    expected = plain(x.detach(), dout)
    assert x.grad is not None
    assert_close(x.grad, expected.dx, atol=1e-10, name="dx")
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None
        assert_close(parameter.grad, expected.parameters[name], atol=1e-10, name=name)


def dispatch_and_combine(group: dist.ProcessGroup, counts: tuple[int, ...]) -> tuple[int, list[int]]:
    """Dispatches and combines token ids; returns the numbers of rows sent, and received by each expert."""
    num_tokens = counts[group.rank()]
    generator = torch.Generator().manual_seed(group.rank())
    experts = torch.rand(num_tokens, EXPERTS, generator=generator).argsort(dim=-1)[:, :TOP_K]
    dispatcher = TokenDispatcher.from_expert_ids(experts, EXPERTS, group)
    token_ids = torch.arange(num_tokens, dtype=torch.float64)[:, None] + 100 * group.rank()
    rows = dispatcher.dispatch(token_ids)
    assert len(rows) == sum(dispatcher.tokens_per_expert)
    combined = dispatcher.combine(rows)
    assert torch.equal(combined, token_ids[:, None].expand(-1, TOP_K, -1))
    return sum(dispatcher.input_splits), dispatcher.tokens_per_expert


@pytest.mark.parametrize(("world", "counts"), [*UNEVEN.items(), *SOME_EMPTY.items()])
def test_no_token_is_dropped(pool: RankPool, world: int, counts: tuple[int, ...]) -> None:
    results = pool.run(dispatch_and_combine, world, counts)
    assert [sent for sent, _ in results] == [count * TOP_K for count in counts]
    assert sum(sum(received) for _, received in results) == sum(counts) * TOP_K


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_matmul_equals_segment_matmul(dtype: torch.dtype) -> None:
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


def test_top_k_above_num_experts_raises() -> None:
    with pytest.raises(ArgumentError, match="top_k=9"):
        MixtureOfExperts(DIM, HIDDEN, num_experts=8, top_k=9)
