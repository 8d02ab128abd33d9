"""The vocabulary-parallel loss and the gradient norm equal one process's."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from ringattn.parallel import all_reduce_loss, clip_gradients, count_valid, cross_entropy, gradient_norm
from tests.harness.compare import assert_close, assert_within_rule
from tests.harness.ranks import RankPool
from tests.parallel.training import mesh_of

VOCABULARY, SHAPE = 20, (2, 7)


def _problem(dtype: torch.dtype, labels_of: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = 30 * torch.randn(*SHAPE, VOCABULARY, generator=generator, dtype=torch.float64)
    logits[0, 0] = -torch.inf  # all but two tokens are masked out in this row; the two are on different ranks
    logits[0, 0, [1, VOCABULARY - 1]] = torch.tensor([900.0, 901.0], dtype=torch.float64)
    labels = torch.randint(VOCABULARY, SHAPE, generator=generator)
    labels[0, 0] = 1
    labels[1, 3:] = -100
    return logits.to(dtype), torch.full_like(labels, -100) if labels_of == "none" else labels


def _split(group: dist.ProcessGroup, dtype: torch.dtype, labels_of: str) -> tuple[Tensor, Tensor, Tensor]:
    mesh = mesh_of((("tp", 4),))
    logits, labels = _problem(dtype, labels_of)
    width = VOCABULARY // group.size()
    mine = logits[..., group.rank() * width :][..., :width].clone().requires_grad_()
    num_valid = count_valid(labels, mesh)
    loss = cross_entropy(mine, labels, num_valid, mesh)
    torch.autograd.backward(loss)
    assert mine.grad is not None
    return loss.detach(), mine.grad, num_valid


def _plain(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(wide, labels.flatten(), reduction="sum") / max(1, int((labels != -100).sum()))
    torch.autograd.backward(loss)
    assert logits.grad is not None
    return loss.detach(), logits.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("labels_of", ["most", "none"])
def test_vocab_parallel_cross_entropy(pool: RankPool, dtype: torch.dtype, labels_of: str) -> None:
    logits, labels = _problem(dtype, labels_of)
    loss64, grad64 = _plain(logits.double(), labels)
    loss, grad = _plain(logits, labels)
    found = pool.run(_split, 4, dtype, labels_of)
    for losses, _, num_valid in found:
        assert_within_rule(losses, loss64, loss, name="loss")
        assert int(num_valid) == int((labels != -100).sum())
    assert_within_rule(torch.cat([grads for _, grads, _ in found], -1), grad64, grad, name="gradient")


def _tokens(group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    mesh = mesh_of((("dp_shard", 2), ("tp", 2)))
    labels = torch.tensor([[1, -100, 3]]) if mesh["dp_shard"].get_local_rank() else torch.full((1, 3), -100)
    loss = cross_entropy(torch.zeros(1, 3, 4, dtype=torch.float64), labels, count_valid(labels, mesh), mesh)
    return loss, all_reduce_loss(loss, mesh)


def test_rank_without_valid_tokens_contributes_zero(pool: RankPool) -> None:
    """Tokens count once: ranks along "tp" hold the same tokens."""
    losses = pool.run(_tokens, 4)
    expected = torch.tensor(8.0, dtype=torch.float64).log()  # 2 valid tokens, each with loss log(2 x 4)
    for rank, (share, whole) in enumerate(losses):
        assert_close(share, torch.zeros_like(expected) if rank < 2 else expected, atol=1e-12, name="share")
        assert_close(whole, expected, atol=1e-12, name="loss")


def _norms(group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    mesh = mesh_of((("dp_shard", 2), ("tp", 2)))
    torch.manual_seed(0)
    grads = [torch.randn(5, 3, dtype=torch.float64) for _ in range(4)]
    placements = [(Shard(0), Shard(1)), (Shard(0), Replicate()), (Replicate(), Replicate())]
    parameters = []
    for grad, placement in zip(grads, placements, strict=False):
        parameter = nn.Parameter(distribute_tensor(torch.zeros_like(grad), mesh["dp_shard", "tp"], placement))
        parameter.grad = distribute_tensor(grad, mesh["dp_shard", "tp"], placement)
        parameters.append(parameter)
    plain, idle = nn.Parameter(torch.zeros_like(grads[3])), nn.Parameter(torch.zeros(2))
    plain.grad = grads[3].clone()
    parameters += [plain, idle]
    norm = clip_gradients(parameters, mesh, 1.5)
    first = parameters[0].grad
    assert isinstance(first, DTensor)
    clipped = gradient_norm(parameters, mesh)
    return norm, clipped, first.full_tensor() / grads[0]


def test_gradient_norm_over_placements(pool: RankPool) -> None:
    torch.manual_seed(0)
    expected = torch.cat([torch.randn(5, 3, dtype=torch.float64) for _ in range(4)]).norm()
    for norm, clipped, factor in pool.run(_norms, 4):
        assert_close(norm, expected, atol=1e-12, name="norm")
        assert_close(clipped, torch.full_like(expected, 1.5), atol=1e-5, name="clipped")
        assert_close(factor, torch.full_like(factor, float(1.5 / expected)), atol=1e-5, name="factor")
