"""The broad product of axes, at 2, 4 and 8 ranks, over ten steps: `make test-parallel`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import pytest

from tests.harness.ranks import RankPool
from tests.parallel.test_parallelize import check
from tests.parallel.training import Mix

STEPS = 10
AXES = ("dp_replicate", "dp_shard", "ring", "ulysses", "tp")
MASKS = ("packed", "window", "causal")

ALONE = [Mix({axis: size}, mask=mask) for axis in AXES for size, mask in ((2, "packed"), (4, "window"))]
PAIRS = [Mix({a: 2, b: 2}, mask=MASKS[i % 3]) for i, (a, b) in enumerate(combinations(AXES, 2))]
TRIPLES = [Mix(dict.fromkeys(axes, 2), mask=MASKS[i % 3]) for i, axes in enumerate(combinations(AXES, 3))]
WAYS = [
    *(Mix({"ring": 2, "ulysses": 2, "dp_replicate": 2}, mask="packed", zero=zero) for zero in (0, 2, 3)),
    *(Mix({"ring": 4, "tp": 2}, mask="packed", zero=zero, layout="contiguous") for zero in (0, 2)),
    *(Mix({"dp_shard": 2, "ring": 2}, mask="packed", micro_batches=2, hold=hold) for hold in (False, True)),
    Mix({"ulysses": 2, "tp": 2}, mask="packed", zero=0, micro_batches=4, hold=True),
    Mix({"dp_replicate": 2, "ring": 2, "tp": 2}, mask="packed", zero=0, micro_batches=2, layout="striped_3", length=36),
    Mix({"ring": 4}, mask="packed", layout="balanced"),
    Mix({"tp": 2}, zero=0, micro_batches=2),
]
MIXES: list[Mix] = [*ALONE, *PAIRS, *TRIPLES, *WAYS]
MIXES.sort(key=lambda mix: mix.ranks)  # a pool after the other

pytestmark = pytest.mark.long


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, RankPool]]:
    """A pool of each size: a mesh is one of all ranks that there are."""
    found = {size: RankPool(size) for size in (2, 4, 8)}
    yield found
    for pool in found.values():
        pool.close()


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_a_mix_trains_as_one_process(pools: dict[int, RankPool], mix: Mix) -> None:
    for size, pool in pools.items():
        if size != mix.ranks:
            pool.close()  # its processes would only take memory; the next call starts new ones
    check(pools[mix.ranks], mix, STEPS)
