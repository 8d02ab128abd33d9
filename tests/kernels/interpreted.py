"""What the Triton kernels promise beyond the contract; run under triton's interpreter by test_triton.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ringattn.geometry.tiles import Tile, Tiles
from ringattn.kernels import BACKENDS, Keys, ProblemSpec, Queries, State, select
from ringattn.score import Score
from tests.harness import oracle
from tests.harness.cases import Tensors, tensors
from tests.harness.compare import assert_within_rule
from tests.kernels.contract_suite import forward, run_tensors

SCORE = Score(0.4)
CAUSAL = Tiles.of(Tile(0, 5, 0, 4, -(1 << 40), 0))
KERNEL = BACKENDS["triton"]


def run(t: Tensors, tiles: Tiles) -> tuple[Tensor, ...]:
    """(out, lse, dq, dk, dv) of one forward and one backward."""
    return run_tensors(KERNEL, t, tiles, SCORE)


def spread(x: Tensor, dim: int, file: Path) -> Tensor:
    """A copy, in a sparse file, whose stride along `dim`, or products with it, leave 32 bits."""
    stride = (1 << 30) + 8 if x.shape[dim] > 2 else (1 << 31) + 8
    strides = list(x.stride())
    strides[dim] = stride
    size = stride * (x.shape[dim] - 1) + x.numel()
    storage = torch.from_file(str(file), shared=True, size=size, dtype=x.dtype)
    return storage.as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "rows", "heads"])
def test_addresses_have_64_bits(dim: int, tmp_path: Path) -> None:
    t = tensors(5, 2, 5, 4, 2, 2, 16, 16, torch.float16)
    expected = run(t, CAUSAL)
    q, k, v, dout = (spread(x, dim, tmp_path / name) for name, x in zip("qkvd", t[:4], strict=True))
    far = Tensors(q, k, v, dout, t.dlse)
    assert all(x.stride(dim) > 1 << 30 for x in far[:4])
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), run(far, CAUSAL), expected, strict=True):
        assert torch.equal(a, b), name


def test_the_same_inputs_give_the_same_bits() -> None:
    t = tensors(6, 1, 150, 140, 2, 1, 16, 16, torch.bfloat16)
    tiles = Tiles.of(Tile(0, 150, 0, 140, -60, 20), Tile(10, 90, 100, 140, 35, 1 << 40))
    for a, b in zip(run(t, tiles), run(t, tiles), strict=True):
        assert torch.equal(a, b)


def test_rows_outside_the_tiles_keep_their_bits() -> None:
    """Also those that share a block with rows inside."""
    t = tensors(7, 1, 12, 4, 2, 2, 16, 16, torch.float32)
    out = torch.randn(1, 12, 2, 16, generator=torch.Generator().manual_seed(1))
    lse = torch.randn(1, 2, 12, generator=torch.Generator().manual_seed(2))
    before = out.clone(), lse.clone()
    KERNEL.forward(Queries(t.q), Keys(t.k, t.v), Tiles.of(Tile(3, 6, 0, 4, -9, 9)), SCORE, State(out, lse))
    outside = [0, 1, 2, *range(6, 12)]
    assert torch.equal(out[:, outside], before[0][:, outside])
    assert torch.equal(lse[:, :, outside], before[1][:, :, outside])
    assert not torch.isclose(lse[:, :, 3:6], before[1][:, :, 3:6]).any()


def test_small_softcaps_are_exact() -> None:
    """tanh of small arguments keeps its relative precision."""
    t = tensors(8, 1, 6, 6, 2, 2, 16, 16, torch.float32)
    whole = Tiles.of(Tile(0, 6, 0, 6, -9, 9))
    for softcap in (0.05, 1e4):
        out, lse = forward(KERNEL, t.q, t.k, t.v, whole, Score(0.4, softcap))
        allowed = torch.ones(6, 6, dtype=torch.bool)
        exact, exact_lse = oracle.dense_attention(t.q, t.k, t.v, allowed, scale=0.4, softcap=softcap)
        plain, plain_lse = oracle.plain_attention(t.q, t.k, t.v, allowed, scale=0.4, softcap=softcap)
        assert_within_rule(out, exact, plain, name=f"out with softcap {softcap}")
        assert_within_rule(lse, exact_lse, plain_lse, name=f"lse with softcap {softcap}")


def test_runs_on_the_cpu_where_the_interpreter_is_on() -> None:
    call = ProblemSpec("cpu", torch.float32, 2, 2, 16, 16, True, SCORE)
    assert select("triton", call) is KERNEL
    assert not KERNEL.available()
