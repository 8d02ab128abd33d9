"""Checkpoints saved on one mesh and loaded on another: losses and weights equal an uninterrupted run's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ringattn.errors import CheckpointError
from ringattn.parallel import MoESpec, TrainingProgress, latest_checkpoint, load_checkpoint, save_checkpoint
from tests.harness.compare import assert_close
from tests.harness.ranks import RankPool
from tests.parallel.pipeline_training import ResumableTraining, resume_on_mesh, resume_single_process
from tests.parallel.training import CONFIG, TrainingRun, TrainingSetup, train_single_process

DEEP = replace(CONFIG, num_layers=4)
EXPERTS = replace(CONFIG, num_layers=4, moe=MoESpec(num_experts=4, top_k=2, hidden=10, every=2, aux_loss_weight=0.0))
LENGTH = 32
TIMEOUT_S = 500.0  # creating groups and planning DTensors is slow on a busy machine


def make_setup(sizes: dict[str, int], *, micro_batches: int = 1, zero: int = 3, experts: bool = False) -> TrainingSetup:
    config = EXPERTS if experts else DEEP
    return TrainingSetup(sizes, "packed", length=LENGTH, micro_batches=micro_batches, zero=zero, config=config)


@dataclass(frozen=True)
class Phase:
    """Some steps on a number of ranks; one rank is plain torch."""

    ranks: int
    resumable: ResumableTraining

    def run(self, pool: RankPool, folder: Path, until: int) -> list[TrainingRun]:
        if self.ranks == 1:
            return pool.run(resume_single_process, 1, self.resumable.setup, folder, until, timeout_s=TIMEOUT_S)
        return pool.run(resume_on_mesh, self.ranks, self.resumable, folder, until, timeout_s=TIMEOUT_S)


def check_resumed_training(pools: dict[int, RankPool], phases: list[Phase], folder: Path, each: int = 2) -> None:
    """Trains some steps in each phase, and compares with one process that does all of them."""
    total = each * len(phases)
    setup = phases[0].resumable.setup
    expected = train_single_process(setup.mask, setup.length, setup.config, total)
    for number, phase in enumerate(phases):
        done = each * number
        for pool in pools.values():
            if pool is not pools[phase.ranks]:
                pool.close()  # its processes would only take memory; the next call starts new ones
        for trained in phase.run(pools[phase.ranks], folder, done + each):
            found = torch.tensor([trained.losses, trained.norms], dtype=torch.float64)
            both = [expected.losses[done : done + each], expected.norms[done : done + each]]
            assert_close(found, torch.tensor(both, dtype=torch.float64), atol=1e-10, name=f"phase {number}")
            if number == len(phases) - 1:
                for name, weight in trained.weights.items():
                    assert_close(weight, expected.weights[name], atol=1e-10, name=name)
    assert latest_checkpoint(folder) == folder / f"step-{total:08d}"


def test_resume_from_pipeline_to_tp_to_single_process(pool: RankPool, tmp_path: Path) -> None:
    phases = [
        Phase(
            4,
            ResumableTraining(
                make_setup({"pp": 2, "dp_shard": 2, "ep": 2}, micro_batches=4, experts=True), "zbv-zero-bubble"
            ),
        ),
        Phase(4, ResumableTraining(make_setup({"ring": 2, "tp": 2}, experts=True))),
        Phase(1, ResumableTraining(make_setup({}, experts=True))),
    ]
    check_resumed_training({4: pool, 1: pool}, phases, tmp_path)


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, RankPool]]:
    found = {size: RankPool(size) for size in (1, 2, 4)}
    yield found
    for each in found.values():
        each.close()


@pytest.mark.long
@pytest.mark.parametrize(
    "phases",
    [
        [
            Phase(2, ResumableTraining(make_setup({"ring": 2}))),
            Phase(4, ResumableTraining(make_setup({"dp_replicate": 2, "ulysses": 2}))),
            Phase(1, ResumableTraining(make_setup({}))),
        ],
        [
            Phase(2, ResumableTraining(make_setup({"tp": 2}))),
            Phase(4, ResumableTraining(make_setup({"dp_shard": 2, "tp": 2}))),
            Phase(1, ResumableTraining(make_setup({}))),
        ],
        [
            Phase(2, ResumableTraining(make_setup({"pp": 2}, micro_batches=2))),
            Phase(4, ResumableTraining(make_setup({"pp": 4}, micro_batches=4))),
            Phase(2, ResumableTraining(make_setup({"dp_shard": 2}, zero=2))),
            Phase(1, ResumableTraining(make_setup({}))),
        ],
        [
            Phase(2, ResumableTraining(make_setup({"dp_shard": 2, "ep": 2}, experts=True))),
            Phase(4, ResumableTraining(make_setup({"ring": 4, "ep": 2}, experts=True))),
            Phase(4, ResumableTraining(make_setup({"ring": 2, "tp": 2, "ep": 2}, experts=True))),
            Phase(1, ResumableTraining(make_setup({}, experts=True))),
        ],
    ],
    ids=["context", "tensor", "stages", "experts"],
)
def test_resume_on_other_numbers_of_ranks(pools: dict[int, RankPool], phases: list[Phase], tmp_path: Path) -> None:
    check_resumed_training(pools, phases, tmp_path)


# ---- saving and loading a small model


def small() -> tuple[nn.Linear, torch.optim.Optimizer]:
    """Returns a model and an optimizer with state, the same on every rank."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.autograd.backward(model(torch.ones(1, 3)).sum())
    optimizer.step()
    return model, optimizer


def save_after_killed_save(group: dist.ProcessGroup, folder: Path) -> None:
    model, optimizer = small()
    save_checkpoint(folder, [model], optimizer, TrainingProgress(3, 30), group=group)
    good = model.weight.detach().clone()
    (folder / "step-00000004.partial").mkdir(exist_ok=True)  # as left by a killed run
    nn.init.zeros_(model.weight)
    assert load_checkpoint(folder, [model], optimizer, group=group) == TrainingProgress(3, 30)
    assert torch.equal(model.weight, good)
    save_checkpoint(folder, [model], optimizer, TrainingProgress(5, 50), group=group)
    dist.barrier(group)
    assert not list(folder.glob("*.partial"))


def test_partial_checkpoints_are_ignored(pool: RankPool, tmp_path: Path) -> None:
    pool.run(save_after_killed_save, 2, tmp_path)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000005"


def save_four_keep_two(group: dist.ProcessGroup, folder: Path) -> None:
    model, optimizer = small()
    for step in range(1, 5):
        save_checkpoint(folder, [model], optimizer, TrainingProgress(step, step), keep=2, group=group)


def test_keep_removes_old_checkpoints(pool: RankPool, tmp_path: Path) -> None:
    pool.run(save_four_keep_two, 2, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def random_numbers(group: dist.ProcessGroup, folder: Path) -> None:
    model, optimizer = small()
    torch.manual_seed(group.rank())
    save_checkpoint(folder, [model], optimizer, TrainingProgress(1, 1), group=group)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_checkpoint(folder, [model], optimizer, group=group)
    assert torch.equal(torch.rand(3), expected)


def test_rng_states_are_restored(pool: RankPool, tmp_path: Path) -> None:
    pool.run(random_numbers, 2, tmp_path)


def load_from_empty_folder(group: dist.ProcessGroup, folder: Path) -> None:
    model, optimizer = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert load_checkpoint(folder, [model], optimizer, group=group) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_empty_folder_returns_none(pool: RankPool, tmp_path: Path) -> None:
    pool.run(load_from_empty_folder, 2, tmp_path / "never")


def load_other_model(group: dist.ProcessGroup, folder: Path, layers: list[tuple[int, int]]) -> None:
    model = nn.Sequential(*(nn.Linear(*sizes) for sizes in layers))
    optimizer = torch.optim.SGD(model.parameters())
    load_checkpoint(folder, [model], optimizer, group=group)


def two_layers(group: dist.ProcessGroup, folder: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters())
    save_checkpoint(folder, [model], optimizer, TrainingProgress(1, 1), group=group)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([(3, 2)], "has 2 weights that the model does not have: 1.bias, 1.weight"),
        ([(3, 2), (2, 3)], r"1.weight is (3, 2), but the checkpoint has (2, 2)"),
        ([(3, 2), (2, 2), (2, 2)], "2.weight is (2, 2), but the checkpoint does not have it"),
    ],
)
def test_other_model_raises(pool: RankPool, tmp_path: Path, layers: list[tuple[int, int]], message: str) -> None:
    pool.run(two_layers, 2, tmp_path)
    for error in pool.expect_error(load_other_model, 2, tmp_path, layers):
        assert error.type_name == CheckpointError.__name__
        assert message in error.message


def load_other_optimizer(group: dist.ProcessGroup, folder: Path) -> None:
    """Loads an AdamW checkpoint into SGD, which raises and changes neither model nor optimizer."""
    model, optimizer = small()
    save_checkpoint(folder, [model], optimizer, TrainingProgress(1, 1), group=group)
    model, _ = small()
    nn.init.ones_(model.weight)
    other = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.5)
    torch.autograd.backward(model(torch.ones(1, 3)).sum())
    other.step()
    momentum = other.state[model.weight]["momentum_buffer"].clone()
    with pytest.raises(CheckpointError, match="trained by another optimizer than SGD; only one has amsgrad, betas"):
        load_checkpoint(folder, [model], other, group=group)
    assert torch.equal(model.weight, torch.ones(2, 3))
    assert torch.equal(other.state[model.weight]["momentum_buffer"], momentum)


def test_other_optimizer_raises_and_changes_nothing(pool: RankPool, tmp_path: Path) -> None:
    pool.run(load_other_optimizer, 2, tmp_path)


def load_untrained_parameter(group: dist.ProcessGroup, folder: Path) -> None:
    model, _ = small()
    save_checkpoint(folder, [model], torch.optim.SGD([model.weight]), TrainingProgress(1, 1), group=group)
    optimizer = torch.optim.SGD(model.parameters())
    load_checkpoint(folder, [model], optimizer, group=group)


def save_invalid(group: dist.ProcessGroup, folder: Path, how: str) -> None:
    model, optimizer = small()
    progress = TrainingProgress(1 + group.rank() if how == "progress" else 1, 1)
    owner, _ = small()
    stages = [owner] if how == "stages" else [model]
    save_checkpoint(folder, stages, optimizer, progress, keep=0 if how == "keep" else None, group=group)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("keep", "keep=0: must be at least 1"),
        ("progress", "disagree on progress"),
        ("stages", "a parameter of shape (2, 3) that is in none of the model parts"),
    ],
)
def test_invalid_saves_raise(pool: RankPool, tmp_path: Path, how: str, message: str) -> None:
    assert all(message in error.message for error in pool.expect_error(save_invalid, 2, tmp_path, how))
    assert not list(tmp_path.iterdir())


def test_untrained_parameter_raises(pool: RankPool, tmp_path: Path) -> None:
    for error in pool.expect_error(load_untrained_parameter, 2, tmp_path):
        assert "bias was trained by none" in error.message


def test_saving_a_step_again_raises(pool: RankPool, tmp_path: Path) -> None:
    pool.run(two_layers, 2, tmp_path)
    for error in pool.expect_error(two_layers, 2, tmp_path):
        assert "already exists" in error.message
