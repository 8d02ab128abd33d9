"""Training on every mix of axes is training in one process: losses, gradient norms and weights, in float64."""

from __future__ import annotations

import pytest
import torch

from tests.harness.compare import assert_close
from tests.harness.ranks import RankPool
from tests.parallel.training import Mix, Trained, train_alone, train_together

ATOL = 1e-10
STEPS = 3

FEW = [
    Mix({"tp": 4}, mask="packed"),
    Mix({"ring": 4}, mask="window", layout="striped_3"),
    Mix({"dp_replicate": 4}),
    Mix({"ring": 2, "tp": 2}, mask="packed"),
    Mix({"ring": 2, "ulysses": 2}, mask="packed", zero=0),
    Mix({"dp_shard": 2, "ulysses": 2}, mask="packed", zero=2),
    Mix({"dp_replicate": 2, "ring": 2}, mask="packed", micro_batches=2, hold=True),
    Mix({"dp_shard": 2, "tp": 2}, micro_batches=2),
]


@pytest.mark.parametrize("mix", FEW, ids=str)
def test_a_mix_trains_as_one_process(pool: RankPool, mix: Mix) -> None:
    check(pool, mix, STEPS)


def check(pool: RankPool, mix: Mix, steps: int) -> None:
    """Trains both ways, and compares."""
    expected = train_alone(mix.mask, mix.length, mix.config, steps)
    together = pool.run(train_together, mix.ranks, mix, steps)
    names = {name for trained in together for name in trained.weights}
    assert names == set(expected.weights)
    for rank, trained in enumerate(together):
        compare(trained, expected, f"rank {rank}")


def compare(trained: Trained, expected: Trained, where: str) -> None:
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
