"""A module over tiles of rows equals the same module without tiles."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from benchmarks.profiling import peak_bytes
from ringattn.errors import ArgumentError
from ringattn.memory import tiled
from tests.harness.compare import assert_close, assert_within_rule
from tests.harness.poison import poisoned_empty
from tests.harness.ranks import RankPool

ATOL = 1e-10
DIM = 6


class Gated(nn.Module):
    """A gated MLP, as in Llama; one projection may be frozen."""

    def __init__(self, dim: int = DIM, inner: int = 11, out: int = DIM, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(dim, inner, bias=False), nn.Linear(dim, inner)
        self.down, self.dropout = nn.Linear(inner, out), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.down(F.silu(self.gate(x)) * self.up(x)))
        return out


class Block(nn.Module):
    """An MLP in a residual branch, over `num_tiles` tiles; None for no tiling."""

    def __init__(self, num_tiles: int | None) -> None:
        super().__init__()
        self.mlp, self.num_tiles = Gated(), num_tiles

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.mlp(x) if self.num_tiles is None else tiled(self.mlp, x, num_tiles=self.num_tiles))


def model(seed: int = 0, dtype: torch.dtype = torch.float64, **sizes: int) -> Gated:
    torch.manual_seed(seed)
    return Gated(**sizes).to(dtype)


def gradients(module: nn.Module, x: Tensor, out: Tensor, dout: Tensor) -> dict[str, Tensor]:
    named = {"x": x, **dict(module.named_parameters())}
    wanted = {name: leaf for name, leaf in named.items() if leaf.requires_grad}
    found = torch.autograd.grad(out, list(wanted.values()), dout)
    return {"out": out.detach(), **dict(zip(wanted, found, strict=True))}


@pytest.mark.parametrize("shape", [(2, 7), (13,), (1, 1), (3, 0)], ids=str)
@pytest.mark.parametrize("num_tiles", [1, 3, 5])
def test_equals_untiled(shape: tuple[int, ...], num_tiles: int) -> None:
    module = model(out=4)
    x = torch.randn(*shape, DIM, dtype=torch.float64, requires_grad=True)
    dout = torch.randn(*shape, 4, dtype=torch.float64)
    expected = gradients(module, x, module(x), dout)
    with poisoned_empty():
        found = gradients(module, x, tiled(module, x, num_tiles=num_tiles), dout)
    for name in expected:
        assert_close(found[name], expected[name], atol=ATOL, name=name)
    with torch.no_grad():
        assert_close(tiled(module, x, num_tiles=num_tiles), expected["out"], atol=ATOL, name="without gradients")


def test_frozen_parameters() -> None:
    module = model()
    module.up.requires_grad_(False)
    x = torch.randn(9, DIM, dtype=torch.float64)
    dout = torch.randn(9, DIM, dtype=torch.float64)
    for needed in (False, True):
        x.requires_grad_(needed)
        expected = gradients(module, x, module(x), dout)
        found = gradients(module, x, tiled(module, x, num_tiles=4), dout)
        assert found.keys() == expected.keys()
        assert ("x" in found) == needed
        for name in expected:
            assert_close(found[name], expected[name], atol=ATOL, name=name)


@pytest.mark.parametrize("num_tiles", [4, 64])
def test_half_precision_is_summed_in_fp32(num_tiles: int) -> None:
    """With 64 tiles, a sum of their gradients in bf16 would exceed the error bound."""
    module = model(dtype=torch.bfloat16)
    x = torch.randn(64, DIM).bfloat16().requires_grad_()
    dout = torch.rand(64, DIM).bfloat16()
    exact = copy.deepcopy(module).double()
    x64 = x.detach().double().requires_grad_()
    expected = gradients(exact, x64, exact(x64), dout.double())
    plain = gradients(module, x, module(x), dout)
    found = gradients(module, x, tiled(module, x, num_tiles=num_tiles), dout)
    for name in expected:
        assert_within_rule(found[name], expected[name], plain[name], name=name)


def test_autocast_reaches_the_backward() -> None:
    module = model(dtype=torch.float32)
    x = torch.randn(12, DIM, requires_grad=True)
    dout = torch.randn(12, DIM).bfloat16()
    exact = copy.deepcopy(module).double()
    x64 = x.detach().double().requires_grad_()
    expected = gradients(exact, x64, exact(x64), dout.double())
    with torch.autocast("cpu", torch.bfloat16):
        plain, out = module(x), tiled(module, x, num_tiles=3)
    assert out.dtype == torch.bfloat16
    plains, found = gradients(module, x, plain, dout), gradients(module, x, out, dout)
    for name in expected:
        assert_within_rule(found[name], expected[name], plains[name], name=name)


def test_dropout_is_the_same_in_backward() -> None:
    """For x = 1, the gradient of the output's sum equals the output if backward draws the same dropout mask."""
    module = nn.Dropout(0.5)
    x = torch.ones(200, 3, dtype=torch.float64, requires_grad=True)
    out = tiled(module, x, num_tiles=7)
    torch.rand(5)  # advances the generator before the backward
    before = torch.get_rng_state()
    (dx,) = torch.autograd.grad(out.sum(), [x])
    assert 0 < int((out == 0).sum()) < out.numel()
    assert_close(dx, out.detach(), atol=0.0, name="dx")
    assert torch.equal(torch.get_rng_state(), before)


def test_within_a_checkpoint() -> None:
    block, plain = Block(3).double(), Block(None).double()
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 5, DIM, dtype=torch.float64, requires_grad=True)
    dout = torch.randn_like(x)
    found = gradients(block, x, checkpoint(block, x, use_reentrant=False), dout)
    expected = gradients(plain, x, plain(x), dout)
    for name in expected:
        assert_close(found[name], expected[name], atol=ATOL, name=name)


def test_parameter_hooks_run_once() -> None:
    module = model()
    fired: list[str] = []
    for name, parameter in module.named_parameters():

        def note(_: Tensor, name: str = name) -> None:
            fired.append(name)

        parameter.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
    torch.autograd.backward(tiled(module, torch.randn(8, DIM, dtype=torch.float64), num_tiles=4).sum())
    assert sorted(fired) == sorted(name for name, _ in module.named_parameters())


def test_parameters_changed_before_backward_raise() -> None:
    module = model()
    out = tiled(module, torch.randn(8, DIM, dtype=torch.float64), num_tiles=4)
    with torch.no_grad():
        module.up.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(out.sum())


def run_on_ranks(group: dist.ProcessGroup, way: str) -> dict[str, Tensor]:
    """Gradients of a tiled model over ranks with different numbers of rows; one rank has none."""
    torch.manual_seed(0)
    net = nn.Sequential(Block(3), Block(3)).double()
    rows = torch.randn(9, DIM, dtype=torch.float64)
    mine = rows[[slice(0, 9), slice(9, 9)][group.rank()]]
    if way == "ddp":
        wrapped: nn.Module = DistributedDataParallel(net, process_group=group)
    else:
        mesh = DeviceMesh.from_group(group, "cpu")
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if way == "bf16" else MixedPrecisionPolicy()
        for block in net:
            fully_shard(block, mesh=mesh, mp_policy=half)
        fully_shard(net, mesh=mesh, mp_policy=half)
        wrapped = net
    for _ in range(2):  # the second backward accumulates onto the first
        torch.autograd.backward(wrapped(mine).square().sum())
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in net.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize("way", ["ddp", "fully_shard"])
def test_over_ranks(pool: RankPool, way: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Block(None), Block(None)).double()
    rows = torch.randn(9, DIM, dtype=torch.float64)
    torch.autograd.backward(net(rows).square().sum())
    for found in pool.run(run_on_ranks, 2, way):
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None
            # Two backwards, averaged over two ranks.
            assert_close(found[name], parameter.grad, atol=ATOL, name=name)


def test_peak_memory_is_one_tile() -> None:
    rows, inner = 1024, 512
    module = Gated(16, inner, 16)
    x = torch.randn(rows, 16, requires_grad=True)

    def once(num_tiles: int | None) -> None:
        out = module(x) if num_tiles is None else tiled(module, x, num_tiles=num_tiles)
        torch.autograd.backward(out.sum())

    whole, in_tiles = peak_bytes(lambda: once(None)), peak_bytes(lambda: once(32))
    activations = 4 * rows * inner  # bytes of one activation tensor
    assert whole >= 4 * activations
    assert in_tiles <= activations


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_errors() -> None:
    x = torch.zeros(4, DIM)
    with pytest.raises(ArgumentError, match="num_tiles=0"):
        tiled(nn.Identity(), x, num_tiles=0)
    with pytest.raises(ArgumentError, match=r"must be \(\.\.\., rows, E\)"):
        tiled(nn.Identity(), x[0], num_tiles=2)
    with pytest.raises(ArgumentError, match="Pair returned tuple"):
        tiled(Pair(), x, num_tiles=2)
    with pytest.raises(ArgumentError, match="must be an nn"):
        tiled(F.silu, x, num_tiles=2)  # type: ignore[arg-type]
    views = nn.Linear(DIM, DIM)
    views.flat = views.weight.view(-1)
    with pytest.raises(ArgumentError, match="FullyShardedDataParallel"):
        tiled(views, x, num_tiles=2)


def tile_with_inner_fsdp_unit(group: dist.ProcessGroup) -> None:
    module = Gated()
    fully_shard(module.up, mesh=DeviceMesh.from_group(group, "cpu"))
    tiled(module, torch.zeros(4, DIM), num_tiles=2)


def test_inner_fsdp_units_raise(pool: RankPool) -> None:
    for error in pool.expect_error(tile_with_inner_fsdp_unit, 2):
        assert "'up' is a unit of fully_shard" in error.message
