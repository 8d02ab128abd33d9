"""The product of axes with pipelines and experts: `make test-parallel`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.ranks import RankPool
from tests.parallel.test_parallelize import check
from tests.parallel.test_pipeline_training import DEEP, MOE, UNBALANCED, check_pipeline
from tests.parallel.training import TrainingSetup

STEPS = 10
SCHEDULES = ("gpipe", "1f1b", "interleaved-1f1b", "interleaved-zero-bubble", "zbv-zero-bubble")
OTHERS = ("dp_replicate", "dp_shard", "ring", "ulysses", "tp")

EXPERTS = [
    TrainingSetup({"dp_shard": 2, "ep": 2}, config=MOE),
    TrainingSetup({"ring": 4, "ep": 4}, mask="packed", config=MOE),
    TrainingSetup({"ulysses": 2, "dp_replicate": 2, "ep": 2}, mask="packed", config=MOE),
    TrainingSetup({"ring": 2, "ulysses": 2, "ep": 2}, mask="packed", config=MOE),
    TrainingSetup({"dp_shard": 2, "tp": 2, "ep": 2}, mask="window", config=MOE),
    TrainingSetup({"dp_shard": 2, "ring": 2, "dp_replicate": 2, "ep": 2}, mask="packed", zero=2, config=MOE),
    TrainingSetup({"dp_shard": 2, "ring": 2, "tp": 2, "ep": 4}, mask="packed", config=MOE),
]
STAGES = [
    *((TrainingSetup({"pp": 2}, micro_batches=4, config=DEEP), schedule) for schedule in SCHEDULES),
    (TrainingSetup({"pp": 4}, mask="packed", micro_batches=4, config=DEEP), "1f1b"),
    *(
        (TrainingSetup({"pp": 2, axis: 2}, mask="packed", micro_batches=4, config=DEEP), schedule)
        for axis, schedule in zip(OTHERS, SCHEDULES, strict=True)
    ),
    (TrainingSetup({"pp": 2, "dp_shard": 2, "ep": 2}, micro_batches=4, config=UNBALANCED), "1f1b"),
    (TrainingSetup({"pp": 2, "ring": 2, "tp": 2}, mask="packed", micro_batches=4, config=DEEP), "interleaved-1f1b"),
    (TrainingSetup({"pp": 2, "dp_shard": 2, "ulysses": 2}, mask="packed", micro_batches=2, config=DEEP), "1f1b"),
    (
        TrainingSetup({"pp": 2, "dp_replicate": 2, "ring": 2}, mask="window", zero=0, micro_batches=2, config=DEEP),
        "gpipe",
    ),
    (TrainingSetup({"pp": 2, "ring": 2, "tp": 2, "ep": 2}, mask="packed", micro_batches=4, config=UNBALANCED), "1f1b"),
    (
        TrainingSetup({"pp": 2, "ring": 2, "ulysses": 2, "ep": 4}, mask="packed", micro_batches=4, config=UNBALANCED),
        "gpipe",
    ),
]
EXPERTS.sort(key=lambda setup: setup.ranks)  # one pool after the other
STAGES.sort(key=lambda stages: stages[0].ranks)

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, RankPool]]:
    """A pool of each size: a mesh covers all ranks of its pool."""
    found = {size: RankPool(size) for size in (2, 4, 8)}
    yield found
    for pool in found.values():
        pool.close()


def pool_of(pools: dict[int, RankPool], ranks: int) -> RankPool:
    for size, pool in pools.items():
        if size != ranks:
            pool.close()  # its processes would only take memory; the next call starts new ones
    return pools[ranks]


@pytest.mark.parametrize("setup", EXPERTS, ids=str)
def test_experts_match_single_process(pools: dict[int, RankPool], setup: TrainingSetup) -> None:
    check(pool_of(pools, setup.ranks), setup, STEPS)


@pytest.mark.parametrize(("setup", "schedule"), STAGES, ids=str)
def test_pipeline_matches_single_process(pools: dict[int, RankPool], setup: TrainingSetup, schedule: str) -> None:
    check_pipeline(pool_of(pools, setup.ranks), setup, schedule, STEPS)
