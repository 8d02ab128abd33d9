"""Peak memory of a call: what a ring needs, and the same on any number of ranks for a fixed shard."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from benchmarks.memory import Case, measure
from tests.harness.ranks import RankPool


def peak(group: dist.ProcessGroup, case: Case) -> int:
    return measure(case, group)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak(pool: RankPool, dtype: str, backward: bool) -> None:
    case = Case(4096, dtype, backward)
    peaks = {world_size: max(pool.run(peak, world_size, case)) for world_size in (2, 4)}
    for world_size, found in peaks.items():
        due = case.due(world_size)
        # Much less than due would mean that not everything is counted.
        assert 0.5 * due <= found <= 1.1 * due, f"{world_size} ranks: {found / due:.3f} of what is due"
    assert abs(peaks[4] / peaks[2] - 1) <= 0.01, f"peaks {peaks} of the same shard on 2 and 4 ranks"
