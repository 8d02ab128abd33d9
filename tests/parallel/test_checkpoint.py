"""Checkpoints: saved under one mix, resumed under another; losses and weights as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ringattn.errors import CheckpointError
from ringattn.parallel.checkpoint import Progress, latest, load_checkpoint, save_checkpoint
from ringattn.parallel.decoder import MoESpec
from tests.harness.compare import assert_close
from tests.harness.ranks import RankPool
from tests.parallel.pipeline_training import Resumable, train_on, train_on_alone
from tests.parallel.training import CONFIG, Mix, Trained, train_alone

DEEP = replace(CONFIG, num_layers=4)
EXPERTS = replace(CONFIG, num_layers=4, moe=MoESpec(num_experts=4, top_k=2, hidden=10, every=2, aux_loss_weight=0.0))
LENGTH = 32
TIMEOUT_S = 500.0  # making groups and planning DTensors take long on a busy machine


def mix(sizes: dict[str, int], *, micro_batches: int = 1, zero: int = 3, experts: bool = False) -> Mix:
    config = EXPERTS if experts else DEEP
    return Mix(sizes, "packed", length=LENGTH, micro_batches=micro_batches, zero=zero, config=config)


@dataclass(frozen=True)
class Leg:
    """Some steps on some ranks; one rank is plain torch."""

    ranks: int
    resumable: Resumable

    def run(self, pool: RankPool, folder: Path, until: int) -> list[Trained]:
        if self.ranks == 1:
            return pool.run(train_on_alone, 1, self.resumable.mix, folder, until, timeout_s=TIMEOUT_S)
        return pool.run(train_on, self.ranks, self.resumable, folder, until, timeout_s=TIMEOUT_S)


def check_journey(pools: dict[int, RankPool], legs: list[Leg], folder: Path, each: int = 2) -> None:
    """Trains some steps on each leg, and compares with one process that does all of them."""
    total = each * len(legs)
    told = legs[0].resumable.mix
    expected = train_alone(told.mask, told.length, told.config, total)
    for number, leg in enumerate(legs):
        done = each * number
        for pool in pools.values():
            if pool is not pools[leg.ranks]:
                pool.close()  # its processes would only take memory; the next call starts new ones
        for trained in leg.run(pools[leg.ranks], folder, done + each):
            found = torch.tensor([trained.losses, trained.norms], dtype=torch.float64)
            both = [expected.losses[done : done + each], expected.norms[done : done + each]]
            assert_close(found, torch.tensor(both, dtype=torch.float64), atol=1e-10, name=f"leg {number}")
            if number == len(legs) - 1:
                for name, weight in trained.weights.items():
                    assert_close(weight, expected.weights[name], atol=1e-10, name=name)
    assert latest(folder) == folder / f"step-{total:08d}"


def test_stages_then_tensors_then_one_process(pool: RankPool, tmp_path: Path) -> None:
    legs = [
        Leg(4, Resumable(mix({"pp": 2, "dp_shard": 2, "ep": 2}, micro_batches=4, experts=True), "zbv-zero-bubble")),
        Leg(4, Resumable(mix({"ring": 2, "tp": 2}, experts=True))),
        Leg(1, Resumable(mix({}, experts=True))),
    ]
    check_journey({4: pool, 1: pool}, legs, tmp_path)


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, RankPool]]:
    found = {size: RankPool(size) for size in (1, 2, 4)}
    yield found
    for each in found.values():
        each.close()


@pytest.mark.long
@pytest.mark.parametrize(
    "legs",
    [
        [
            Leg(2, Resumable(mix({"ring": 2}))),
            Leg(4, Resumable(mix({"dp_replicate": 2, "ulysses": 2}))),
            Leg(1, Resumable(mix({}))),
        ],
        [
            Leg(2, Resumable(mix({"tp": 2}))),
            Leg(4, Resumable(mix({"dp_shard": 2, "tp": 2}))),
            Leg(1, Resumable(mix({}))),
        ],
        [
            Leg(2, Resumable(mix({"pp": 2}, micro_batches=2))),
            Leg(4, Resumable(mix({"pp": 4}, micro_batches=4))),
            Leg(2, Resumable(mix({"dp_shard": 2}, zero=2))),
            Leg(1, Resumable(mix({}))),
        ],
        [
            Leg(2, Resumable(mix({"dp_shard": 2, "ep": 2}, experts=True))),
            Leg(4, Resumable(mix({"ring": 4, "ep": 2}, experts=True))),
            Leg(4, Resumable(mix({"ring": 2, "tp": 2, "ep": 2}, experts=True))),
            Leg(1, Resumable(mix({}, experts=True))),
        ],
    ],
    ids=["context", "tensor", "stages", "experts"],
)
def test_from_two_ranks_to_four_to_one(pools: dict[int, RankPool], legs: list[Leg], tmp_path: Path) -> None:
    check_journey(pools, legs, tmp_path)


# ---- what is there, and what is not


def small() -> tuple[nn.Linear, torch.optim.Optimizer]:
    """The same on every rank."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.autograd.backward(model(torch.ones(1, 3)).sum())
    optimizer.step()
    return model, optimizer


def killed_while_saving(group: dist.ProcessGroup, folder: Path) -> None:
    model, optimizer = small()
    save_checkpoint(folder, [model], optimizer, Progress(3, 30), group=group)
    good = model.weight.detach().clone()
    (folder / "step-00000004.partial").mkdir(exist_ok=True)  # as a run leaves it that was killed
    nn.init.zeros_(model.weight)
    assert load_checkpoint(folder, [model], optimizer, group=group) == Progress(3, 30)
    assert torch.equal(model.weight, good)
    save_checkpoint(folder, [model], optimizer, Progress(5, 50), group=group)
    dist.barrier(group)
    assert not list(folder.glob("*.partial"))


def test_the_last_whole_one_counts(pool: RankPool, tmp_path: Path) -> None:
    pool.run(killed_while_saving, 2, tmp_path)
    assert latest(tmp_path) == tmp_path / "step-00000005"


def keeps(group: dist.ProcessGroup, folder: Path) -> None:
    model, optimizer = small()
    for step in range(1, 5):
        save_checkpoint(folder, [model], optimizer, Progress(step, step), keep=2, group=group)


def test_old_ones_go(pool: RankPool, tmp_path: Path) -> None:
    pool.run(keeps, 2, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def random_numbers(group: dist.ProcessGroup, folder: Path) -> None:
    model, optimizer = small()
    torch.manual_seed(group.rank())
    save_checkpoint(folder, [model], optimizer, Progress(1, 1), group=group)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_checkpoint(folder, [model], optimizer, group=group)
    assert torch.equal(torch.rand(3), expected)


def test_random_numbers_go_on(pool: RankPool, tmp_path: Path) -> None:
    pool.run(random_numbers, 2, tmp_path)


def nothing_there(group: dist.ProcessGroup, folder: Path) -> None:
    model, optimizer = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert load_checkpoint(folder, [model], optimizer, group=group) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_there_is_none(pool: RankPool, tmp_path: Path) -> None:
    pool.run(nothing_there, 2, tmp_path / "never")


def other_model(group: dist.ProcessGroup, folder: Path, layers: list[tuple[int, int]]) -> None:
    model = nn.Sequential(*(nn.Linear(*sizes) for sizes in layers))
    optimizer = torch.optim.SGD(model.parameters())
    load_checkpoint(folder, [model], optimizer, group=group)


def two_layers(group: dist.ProcessGroup, folder: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters())
    save_checkpoint(folder, [model], optimizer, Progress(1, 1), group=group)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([(3, 2)], "has 2 weights that the model has not: 1.bias, 1.weight"),
        ([(3, 2), (2, 3)], r"1.weight is (3, 2), but the checkpoint has (2, 2)"),
        ([(3, 2), (2, 2), (2, 2)], "2.weight is (2, 2), but the checkpoint does not have it"),
    ],
)
def test_another_model_raises(pool: RankPool, tmp_path: Path, layers: list[tuple[int, int]], message: str) -> None:
    pool.run(two_layers, 2, tmp_path)
    for error in pool.expect_error(other_model, 2, tmp_path, layers):
        assert error.type_name == CheckpointError.__name__
        assert message in error.message


def another_optimizer(group: dist.ProcessGroup, folder: Path) -> None:
    """Loads what AdamW had saved into SGD, which raises; nothing of model or optimizer is changed."""
    model, optimizer = small()
    save_checkpoint(folder, [model], optimizer, Progress(1, 1), group=group)
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


def test_another_optimizer_raises_and_changes_nothing(pool: RankPool, tmp_path: Path) -> None:
    pool.run(another_optimizer, 2, tmp_path)


def more_to_change(group: dist.ProcessGroup, folder: Path) -> None:
    model, _ = small()
    save_checkpoint(folder, [model], torch.optim.SGD([model.weight]), Progress(1, 1), group=group)
    optimizer = torch.optim.SGD(model.parameters())
    load_checkpoint(folder, [model], optimizer, group=group)


def saved_wrongly(group: dist.ProcessGroup, folder: Path, how: str) -> None:
    model, optimizer = small()
    progress = Progress(1 + group.rank() if how == "progress" else 1, 1)
    owner, _ = small()
    stages = [owner] if how == "stages" else [model]
    save_checkpoint(folder, stages, optimizer, progress, keep=0 if how == "keep" else None, group=group)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("keep", "keep=0: must be at least 1"),
        ("progress", "disagree on progress"),
        ("stages", "a parameter of shape (2, 3) that is in none of the stages"),
    ],
)
def test_what_cannot_be_saved(pool: RankPool, tmp_path: Path, how: str, message: str) -> None:
    assert all(message in error.message for error in pool.expect_error(saved_wrongly, 2, tmp_path, how))
    assert not list(tmp_path.iterdir())


def test_a_parameter_that_was_not_trained_raises(pool: RankPool, tmp_path: Path) -> None:
    for error in pool.expect_error(more_to_change, 2, tmp_path):
        assert "bias was trained by none" in error.message


def test_saving_a_step_again_raises(pool: RankPool, tmp_path: Path) -> None:
    pool.run(two_layers, 2, tmp_path)
    for error in pool.expect_error(two_layers, 2, tmp_path):
        assert "is there already" in error.message
