"""The product of axes, at 2, 4 and 8 ranks, over ten steps: `make test-parallel`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import pytest

from tests.harness.ranks import RankPool
from tests.parallel.test_parallelize import check
from tests.parallel.training import TrainingSetup

STEPS = 10
AXES = ("dp_replicate", "dp_shard", "ring", "ulysses", "tp")
MASKS = ("packed", "window", "causal")

ALONE = [TrainingSetup({axis: size}, mask=mask) for axis in AXES for size, mask in ((2, "packed"), (4, "window"))]
PAIRS = [TrainingSetup({a: 2, b: 2}, mask=MASKS[i % 3]) for i, (a, b) in enumerate(combinations(AXES, 2))]
TRIPLES = [TrainingSetup(dict.fromkeys(axes, 2), mask=MASKS[i % 3]) for i, axes in enumerate(combinations(AXES, 3))]
VARIANTS = [
    *(TrainingSetup({"ring": 2, "ulysses": 2, "dp_replicate": 2}, mask="packed", zero=zero) for zero in (0, 2, 3)),
    *(TrainingSetup({"ring": 4, "tp": 2}, mask="packed", zero=zero, layout="contiguous") for zero in (0, 2)),
    *(
        TrainingSetup({"dp_shard": 2, "ring": 2}, mask="packed", micro_batches=2, no_sync=no_sync)
        for no_sync in (False, True)
    ),
    TrainingSetup({"ulysses": 2, "tp": 2}, mask="packed", zero=0, micro_batches=4, no_sync=True),
    TrainingSetup(
        {"dp_replicate": 2, "ring": 2, "tp": 2}, mask="packed", zero=0, micro_batches=2, layout="striped_3", length=36
    ),
    TrainingSetup({"ring": 4}, mask="packed", layout="balanced"),
    TrainingSetup({"tp": 2}, zero=0, micro_batches=2),
]
CONFIGS: list[TrainingSetup] = [*ALONE, *PAIRS, *TRIPLES, *VARIANTS]
CONFIGS.sort(key=lambda setup: setup.ranks)  # one pool after the other

pytestmark = pytest.mark.long


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, RankPool]]:
    """A pool of each size: a mesh covers all ranks of its pool."""
    found = {size: RankPool(size) for size in (2, 4, 8)}
    yield found
    for pool in found.values():
        pool.close()


@pytest.mark.parametrize("setup", CONFIGS, ids=str)
def test_matches_single_process(pools: dict[int, RankPool], setup: TrainingSetup) -> None:
    for size, pool in pools.items():
        if size != setup.ranks:
            pool.close()  # its processes would only take memory; the next call starts new ones
    check(pools[setup.ranks], setup, STEPS)
