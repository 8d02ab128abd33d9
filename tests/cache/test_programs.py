"""Random programs of everything that a cache can do, against dense attention in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.cache.programs import Op, Setting, run_program
from tests.harness.ranks import RankPool

OFTEN = ("new", "decode", "decode", "prefill", "prefill")
NAMES = (*OFTEN, "fork", "truncate", "evict", "free", "share", "save", "reshard")
numbers = st.integers(0, 99)
operations = st.builds(Op, st.sampled_from(NAMES), numbers, numbers, numbers)
programs = st.lists(operations, min_size=5, max_size=25)
BEGIN = [Op("new"), Op("prefill", 0, 22, 0), *(Op("decode", 0, b, b) for b in range(5))]

QUICK = settings(
    max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink)
)


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_random_programs(pool: RankPool, tmp_path: Path, world_size: int, page_size: int) -> None:
    @settings(QUICK, max_examples=4)
    @given(programs)
    def check(program: list[Op]) -> None:
        setting = Setting(page_size, 3 + 90 // page_size, folder=str(tmp_path))
        assert pool.run(run_program, world_size, setting, BEGIN + program)[0] > 0

    check()


@pytest.mark.long
@pytest.mark.parametrize("page_size", [1, 2, 16, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_more_random_programs(pool: RankPool, tmp_path: Path, world_size: int, page_size: int) -> None:
    @settings(QUICK, max_examples=min(60, 120 // world_size))  # as much work for any number of ranks
    @given(st.lists(operations, min_size=20, max_size=80))
    def check(program: list[Op]) -> None:
        setting = Setting(page_size, 3 + 90 // page_size, heads=6, kv_heads=3, folder=str(tmp_path))
        assert pool.run(run_program, world_size, setting, BEGIN + program)[0] > 0

    check()
