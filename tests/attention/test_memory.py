"""Peak memory of a call: what a ring needs, and the same on any number of ranks for a fixed shard."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import ringattn
from benchmarks.memory import Case, measure
from benchmarks.profiling import peak_bytes
from tests.harness.ranks import RankPool


def peak(group: dist.ProcessGroup, case: Case) -> int:
    return measure(case, group)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak(pool: RankPool, dtype: str, backward: bool) -> None:
    case = Case(8, 8, 64, dtype, 1536, backward)
    peaks = {world_size: max(pool.run(peak, world_size, case)) for world_size in (2, 4)}
    for world_size, found in peaks.items():
        due = case.expected_bytes(world_size)
        # Much less than due would mean that not everything is counted.
        assert 0.5 * due <= found <= 1.1 * due, f"{world_size} ranks: {found / due:.3f} of what is due"
    assert abs(peaks[4] / peaks[2] - 1) <= 0.01, f"peaks {peaks} of the same shard on 2 and 4 ranks"


def peak_of(group: dist.ProcessGroup, operation: str, stages: int, backward: bool) -> int:
    """The peak of a call of full attention over 1024 rows on each rank, beyond its inputs."""
    shape = (1, 1024, 8, 64)
    q, k, v, dout = (torch.randn(shape) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_(backward)
    call = getattr(ringattn, f"{operation}_attention")

    def once() -> object:
        out = call(q, k, v, group, stages=stages)
        return torch.autograd.grad(out, [q, k, v], dout) if backward else out

    once()
    return peak_bytes(once)


BLOCK = 1024 * 8 * 64 * 4  # bytes of one rank's q, in fp32


def test_stages_bound_what_a_gather_holds(pool: RankPool) -> None:
    """On four ranks: k and v of three others at a time; with six stages a third of them, and of this rank's copies."""
    alone, staged = (max(pool.run(peak_of, 4, "gather", stages, False)) for stages in (1, 6))
    # What came, what is sent, and out.
    assert (2 * 3 + 2 + 1) * BLOCK <= alone <= (2 * 3 + 2 + 1.5) * BLOCK
    # Two stages at a time: one is computed, one is on its way.
    assert staged <= (2 / 6 * 8 + 1 + 1.5) * BLOCK


@pytest.mark.parametrize("backward", [False, True])
def test_stages_bound_what_spreading_heads_holds(pool: RankPool, backward: bool) -> None:
    """q, k, v and out, k and v of both ranks' rows put together: less with every stage.

    Of two stages, both are there at a time: one is computed, the other on its way.
    """
    peaks = [max(pool.run(peak_of, 2, "ulysses", stages, backward)) for stages in (1, 2, 4)]
    most = (13.2, 10.7, 8.4) if backward else (5.6, 5.1, 3.8)
    for found, blocks in zip(peaks, most, strict=True):
        assert found <= blocks * BLOCK
