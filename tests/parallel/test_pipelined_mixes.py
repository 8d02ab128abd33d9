"""Training with experts, and in stages, on mixes with the other axes: as in one process, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ringattn.parallel.decoder import MoESpec
from tests.harness.ranks import RankPool
from tests.parallel.pipelined import train_in_stages
from tests.parallel.test_mixes import STEPS, check, compare
from tests.parallel.training import CONFIG, Mix, train_alone

MOE = replace(CONFIG, moe=MoESpec(num_experts=4, top_k=2, hidden=10, every=2, aux_loss_weight=0.2))
# Load is balanced within a micro-batch: where a batch is cut, one process balances something else.
UNBALANCED = replace(CONFIG, num_layers=4, moe=MoESpec(num_experts=4, top_k=2, hidden=10, aux_loss_weight=0.0))
DEEP = replace(CONFIG, num_layers=4)

WITH_EXPERTS = [
    Mix({"ring": 2, "dp_shard": 2, "ep": 2}, mask="packed", config=MOE),
    Mix({"ring": 2, "tp": 2, "ep": 2}, mask="packed", config=MOE),
]
IN_STAGES = [
    (Mix({"pp": 2, "dp_shard": 2}, micro_batches=2, config=DEEP), "1f1b"),
    (Mix({"pp": 2, "tp": 2}, mask="packed", micro_batches=4, config=DEEP), "zbv-zero-bubble"),
    (Mix({"pp": 2, "ring": 2, "ep": 2}, mask="packed", micro_batches=4, config=UNBALANCED), "interleaved-zero-bubble"),
]


@pytest.mark.parametrize("mix", WITH_EXPERTS, ids=str)
def test_experts_train_as_in_one_process(pool: RankPool, mix: Mix) -> None:
    check(pool, mix, STEPS)


@pytest.mark.parametrize(("mix", "schedule"), IN_STAGES, ids=str)
def test_stages_train_as_one_process(pool: RankPool, mix: Mix, schedule: str) -> None:
    check_stages(pool, mix, schedule, STEPS)


def check_stages(pool: RankPool, mix: Mix, schedule: str, steps: int) -> None:
    """Trains both ways, and compares."""
    expected = train_alone(mix.mask, mix.length, mix.config, steps)
    together = pool.run(train_in_stages, mix.ranks, mix, schedule, steps)
    assert {name for trained in together for name in trained.weights} == set(expected.weights)
    for rank, trained in enumerate(together):
        compare(trained, expected, f"rank {rank}")
