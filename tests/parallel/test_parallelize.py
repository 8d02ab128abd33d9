"""Training on a mesh matches training in one process: losses, gradient norms and weights, in float64."""

from __future__ import annotations

import pytest
import torch

from tests.harness.compare import assert_close
from tests.harness.ranks import RankPool
from tests.parallel.training import TrainingRun, TrainingSetup, train_on_mesh, train_single_process

ATOL = 1e-10
STEPS = 3

CONFIGS = [
    TrainingSetup({"tp": 4}, mask="packed"),
    TrainingSetup({"ring": 4}, mask="window", layout="striped_3"),
    TrainingSetup({"dp_replicate": 4}),
    TrainingSetup({"ring": 2, "tp": 2}, mask="packed"),
    TrainingSetup({"ring": 2, "ulysses": 2}, mask="packed", zero=0),
    TrainingSetup({"dp_shard": 2, "ulysses": 2}, mask="packed", zero=2),
    TrainingSetup({"dp_replicate": 2, "ring": 2}, mask="packed", micro_batches=2, no_sync=True),
    TrainingSetup({"dp_shard": 2, "tp": 2}, micro_batches=2),
]


@pytest.mark.parametrize("setup", CONFIGS, ids=str)
def test_matches_single_process(pool: RankPool, setup: TrainingSetup) -> None:
    check(pool, setup, STEPS)


def check(pool: RankPool, setup: TrainingSetup, steps: int) -> None:
    """Trains on the mesh and in one process, and compares."""
    expected = train_single_process(setup.mask, setup.length, setup.config, steps)
    together = pool.run(train_on_mesh, setup.ranks, setup, steps)
    names = {name for trained in together for name in trained.weights}
    assert names == set(expected.weights)
    for rank, trained in enumerate(together):
        compare(trained, expected, f"rank {rank}")


def compare(trained: TrainingRun, expected: TrainingRun, where: str) -> None:
    for name, losses, others in (
        ("losses", trained.losses, expected.losses),
        ("norms", trained.norms, expected.norms),
    ):
        assert_close(
            torch.tensor(losses, dtype=torch.float64),
            torch.tensor(others, dtype=torch.float64),
            atol=ATOL,
            name=f"{name} of {where}",
        )
    for name, weight in trained.weights.items():
        assert_close(weight, expected.weights[name], atol=ATOL, name=f"{name} of {where}")
