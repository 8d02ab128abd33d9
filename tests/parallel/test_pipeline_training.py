"""Training with experts and pipelines, combined with the other axes, matches one process in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch.distributed as dist

from ringattn.parallel import MoESpec, parallelize
from tests.harness.ranks import RankPool
from tests.parallel.pipeline_training import train_pipeline
from tests.parallel.test_parallelize import STEPS, check, compare
from tests.parallel.training import CONFIG, TrainingSetup, make_model, mesh_of, train_single_process

MOE = replace(CONFIG, moe=MoESpec(num_experts=4, top_k=2, hidden=10, every=2, aux_loss_weight=0.2))
# The load is balanced per micro-batch, so with micro-batches it differs from one process with whole batches.
UNBALANCED = replace(CONFIG, num_layers=4, moe=MoESpec(num_experts=4, top_k=2, hidden=10, aux_loss_weight=0.0))
DEEP = replace(CONFIG, num_layers=4)

EXPERT_CONFIGS = [
    TrainingSetup({"ring": 2, "dp_shard": 2, "ep": 2}, mask="packed", config=MOE),
    TrainingSetup({"ring": 2, "tp": 2, "ep": 2}, mask="packed", config=MOE),
]
PIPELINE_CONFIGS = [
    (TrainingSetup({"pp": 2, "dp_shard": 2}, micro_batches=2, config=DEEP), "1f1b"),
    (TrainingSetup({"pp": 2, "tp": 2}, mask="packed", micro_batches=4, config=DEEP), "zbv-zero-bubble"),
    (
        TrainingSetup({"pp": 2, "ring": 2, "ep": 2}, mask="packed", micro_batches=4, config=UNBALANCED),
        "interleaved-zero-bubble",
    ),
]


@pytest.mark.parametrize("setup", EXPERT_CONFIGS, ids=str)
def test_experts_match_single_process(pool: RankPool, setup: TrainingSetup) -> None:
    check(pool, setup, STEPS)


@pytest.mark.parametrize(("setup", "schedule"), PIPELINE_CONFIGS, ids=str)
def test_pipeline_matches_single_process(pool: RankPool, setup: TrainingSetup, schedule: str) -> None:
    check_pipeline(pool, setup, schedule, STEPS)


def import_module(group: dist.ProcessGroup) -> None:
    """Makes the ranks import this module before the timed call: on a busy machine the import is slow."""


def apply_invalid_ep(group: dist.ProcessGroup, num_experts: int) -> None:
    spec = MoESpec(num_experts, top_k=1, hidden=4) if num_experts else None
    mesh = mesh_of((("ring", 4), ("ep", 4)))
    parallelize(make_model(replace(CONFIG, moe=spec)), mesh)


@pytest.mark.parametrize(
    ("num_experts", "message"), [(6, "ep=4: must divide num_experts=6"), (0, "ep=4: the model has no experts")]
)
def test_invalid_ep_raises_on_every_rank(pool: RankPool, num_experts: int, message: str) -> None:
    pool.run(import_module, 4)
    for error in pool.expect_error(apply_invalid_ep, 4, num_experts):
        assert error.type_name == "ArgumentError"
        assert message in error.message


def check_pipeline(pool: RankPool, setup: TrainingSetup, schedule: str, steps: int) -> None:
    """Trains on the mesh and in one process, and compares."""
    expected = train_single_process(setup.mask, setup.length, setup.config, steps)
    together = pool.run(train_pipeline, setup.ranks, setup, schedule, steps, timeout_s=500.0)
    assert {name for trained in together for name in trained.weights} == set(expected.weights)
    for rank, trained in enumerate(together):
        compare(trained, expected, f"rank {rank}")
