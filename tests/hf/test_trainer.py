"""Training through Trainer over ranks is training in one process: losses, gradient norms, weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.harness import ranks
from tests.harness.compare import assert_close
from tests.harness.ranks import RankPool
from tests.hf.training import Trained, Training, by_one_process, by_trainer, refused

# Trainer logs losses in fp32.
FP32 = 1e-6


@pytest.fixture(scope="module")
def pair() -> Iterator[RankPool]:
    """Two ranks that are all there are: Trainer takes the default group."""
    yield from ranks.pool(2)


def assert_same(found: list[Trained], expected: Trained, atol: float = 1e-10) -> None:
    for trained in found:
        for name, tolerance in (("losses", FP32), ("norms", atol)):
            a, b = (torch.tensor(getattr(run, name), dtype=torch.float64) for run in (trained, expected))
            assert_close(a, b, atol=tolerance, name=name)
        assert trained.weights.keys() == expected.weights.keys()
        for name in expected.weights:
            assert_close(trained.weights[name], expected.weights[name], atol=atol, name=name)
        assert abs(trained.evaluation - expected.evaluation) < FP32
        assert trained.logits is not None
        assert expected.logits is not None
        assert_close(trained.logits, expected.logits, atol=FP32, name="logits", check_dtype=False)


@pytest.mark.parametrize(
    "training",
    [
        Training(),
        Training(steps=3, packed=True, accumulation=2, checkpoint=True),
    ],
    ids=["20_steps", "packed_accumulated_checkpointed"],
)
def test_two_ranks(pair: RankPool, training: Training) -> None:
    expected = by_one_process(training)
    assert expected.losses[-1] < expected.losses[0]
    assert_same(pair.run(by_trainer, 2, training, 2), expected)


@pytest.mark.parametrize("cp_size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_four_ranks(pool: RankPool, cp_size: int) -> None:
    training = Training(packed=True)
    assert_same(pool.run(by_trainer, 4, training, cp_size), by_one_process(training))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("Qwen2ForCausalLM", {"label_smoothing_factor": 0.1}, "labels are shifted before they are sharded"),
        (
            "Qwen2ForCausalLM",
            {"average_tokens_across_devices": False},
            "the loss is normalised by the tokens of all ranks",
        ),
        ("BertForMaskedLM", {}, "write a loop with handle.loss"),
    ],
    ids=["smoothing", "averaging", "loss"],
)
def test_refusals(pair: RankPool, model: str, options: dict[str, object], message: str) -> None:
    for error in pair.expect_error(refused, 2, model, options):
        assert message in error.message
