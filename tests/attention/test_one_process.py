"""One process without torch.distributed is one rank: group=None works in every public function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

import ringattn
from ringattn import ArgumentError, DistributedKVCache, causal, contiguous, zigzag
from ringattn.comm.topology import mesh_from_name, mesh_name, rank_mesh, resolve_group
from ringattn.parallel.mesh import build_mesh

OPERATIONS = ("ring_attention", "gather_attention", "ulysses_attention", "context_parallel_attention")
LENGTH = 23


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not dist.is_initialized()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, LENGTH, heads, 16, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    return q, k, v


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def check_exact(attention: Callable[..., Any], tensors: tuple[Tensor, Tensor, Tensor], **options: Any) -> None:
    out, expected = attention(*tensors, mask=causal(), **options), reference(*tensors)
    gradients = [torch.autograd.grad(x.square().sum(), tensors) for x in (out, expected)]
    assert_close([out, *gradients[0]], [expected, *gradients[1]])


@pytest.mark.parametrize("name", OPERATIONS)
def test_attention(name: str) -> None:
    check_exact(getattr(ringattn, name), inputs(), layout=zigzag(LENGTH, 1))
    check_exact(getattr(ringattn, name), inputs())


@pytest.mark.compile
@pytest.mark.parametrize("name", OPERATIONS)
def test_compiled_attention(name: str) -> None:
    torch._dynamo.reset()
    check_exact(torch.compile(getattr(ringattn, name), fullgraph=True, backend="aot_eager"), inputs())


def test_moving_tensors() -> None:
    layout = zigzag(LENGTH, 1)
    x = inputs()[0].detach()
    assert torch.equal(ringattn.unshard(ringattn.shard(x, layout), layout), x)
    ids = torch.arange(2 * LENGTH).view(2, LENGTH)
    batch = ringattn.shard_batch({"input_ids": ids}, layout)
    assert torch.equal(batch["input_ids"], ids)
    assert torch.equal(batch["position_ids"], torch.arange(LENGTH)[None])


def filled_cache() -> tuple[DistributedKVCache, int]:
    q, k, v = (x.detach() for x in inputs())
    cache = DistributedKVCache(
        num_layers=1, num_kv_heads=2, head_dim=16, num_pages=16, page_size=4, dtype=torch.float64
    )
    sequence = cache.new()
    extension = cache.extend([sequence], contiguous(20, 1))
    out = ringattn.prefill_attention(q[:, :20], k[:, :20], v[:, :20], cache, 0, extension)
    assert_close(out, reference(q, k, v)[:, :20])
    return cache, sequence


@pytest.mark.parametrize("decode", [ringattn.decode_attention, ringattn.decode_attention_by_heads])
def test_inference(decode: Callable[..., Tensor], tmp_path: Path) -> None:
    q, k, v = (x.detach() for x in inputs())
    cache, sequence = filled_cache()
    ringattn.save_cache(cache, tmp_path)
    moved = ringattn.reshard(cache, num_pages=8)
    for each in (cache, ringattn.load_cache(tmp_path, num_pages=8), moved):
        assert each is not None
        extension = each.extend([sequence], 3)
        out = decode(q[:, 20:], k[:, 20:], v[:, 20:], each, 0, extension)
        assert_close(out, reference(q, k, v)[:, 20:])


def test_choosing_an_exchange() -> None:
    link, compute = ringattn.measure_link(), ringattn.measure_compute(dtype=torch.float32, head_dim=16)
    assert (link.latency_s, compute.flops_per_s > 0) == (0.0, True)
    model = ringattn.CostModel(link, compute)
    assert "ring" in str(ringattn.explain(*inputs(), mask=causal(), model=model))
    check_exact(ringattn.context_parallel_attention, inputs(), model=model)


def test_the_group() -> None:
    mesh = rank_mesh(None)
    assert (mesh.size, mesh.rank) == (1, 0)
    assert resolve_group(None) is mesh.axes[0].group is resolve_group(mesh.axes[0].group)
    assert mesh_from_name(mesh_name(mesh)) == mesh


@pytest.mark.parametrize("started", ["2", "16"])
def test_forgetting_to_initialise_several_ranks(started: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result of this rank's rows alone would be wrong, and look right."""
    monkeypatch.setenv("WORLD_SIZE", started)
    with pytest.raises(ArgumentError, match=rf"WORLD_SIZE is {started}; .*init_process_group\(\) first"):
        ringattn.ring_attention(*inputs())
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_exact(ringattn.ring_attention, inputs())


def test_a_mesh_of_several_axes_needs_groups() -> None:
    with pytest.raises(ArgumentError, match=r"build_mesh: torch\.distributed is not initialised"):
        build_mesh()


@pytest.mark.compile
def test_a_graph_made_before_several_ranks_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled call of one process raises when the process has become one of several ranks."""
    torch._dynamo.reset()
    compiled = torch.compile(ringattn.ring_attention, fullgraph=True, backend="aot_eager")
    check_exact(compiled, inputs())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArgumentError, match="WORLD_SIZE is 2"):
        compiled(*inputs(), mask=causal())
