"""Training with experts, and in stages, on mixes with the other axes: as in one process, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch.distributed as dist

from ringattn.parallel.decoder import MoESpec
from ringattn.parallel.parallelize_decoder import parallelize
from tests.harness.ranks import RankPool
from tests.parallel.pipeline_training import train_in_stages
from tests.parallel.test_parallelize import STEPS, check, compare
from tests.parallel.training import CONFIG, Mix, make_model, mesh_of, train_alone

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


def nothing(group: dist.ProcessGroup) -> None:
    """Has ranks import this file, which takes longer than errors may on a busy machine."""


def spread_wrongly(group: dist.ProcessGroup, num_experts: int) -> None:
    spec = MoESpec(num_experts, top_k=1, hidden=4) if num_experts else None
    mesh = mesh_of((("ring", 4), ("ep", 4)))
    parallelize(make_model(replace(CONFIG, moe=spec)), mesh)


@pytest.mark.parametrize(
    ("num_experts", "message"), [(6, "ep=4: must divide num_experts=6"), (0, "ep=4: the model has no experts")]
)
def test_experts_that_cannot_be_spread_raise_on_every_rank(pool: RankPool, num_experts: int, message: str) -> None:
    pool.run(nothing, 4)
    for error in pool.expect_error(spread_wrongly, 4, num_experts):
        assert error.type_name == "ArgumentError"
        assert message in error.message


def check_stages(pool: RankPool, mix: Mix, schedule: str, steps: int) -> None:
    """Trains both ways, and compares."""
    expected = train_alone(mix.mask, mix.length, mix.config, steps)
    together = pool.run(train_in_stages, mix.ranks, mix, schedule, steps, timeout_s=500.0)
    assert {name for trained in together for name in trained.weights} == set(expected.weights)
    for rank, trained in enumerate(together):
        compare(trained, expected, f"rank {rank}")
