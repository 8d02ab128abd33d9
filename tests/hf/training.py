"""Training runs: through Trainer on every rank, and in one process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

import ringattn.hf as rhf
from tests.hf.architectures import architecture
from tests.hf.exact import Exact

LENGTH = 13
VOCABULARY = 37
DOCUMENTS = (5, 1, 7)


def samples(count: int, packed: bool) -> list[dict[str, Tensor]]:
    """Sequences that can be learned, some with few labels; packed ones hold three documents."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        first = torch.randint(VOCABULARY - 3, (1,), generator=generator)
        ids = (first + torch.arange(LENGTH)) % (VOCABULARY - 3) + 3
        labels = ids.clone()
        labels[: 3 * (number % 4)] = -100
        sample = {"input_ids": ids, "labels": labels}
        if packed:
            sample["position_ids"] = torch.cat([torch.arange(length) for length in DOCUMENTS])
        found.append(sample)
    return found


@dataclass(frozen=True)
class Training:
    """A training run; `cp_size` ranks share a sequence."""

    model: str = "Qwen2ForCausalLM"  # with a sliding window
    steps: int = 20
    batch: int = 2  # of all ranks
    accumulation: int = 1
    packed: bool = False
    checkpoint: bool = False

    def arguments(self, folder: str, cp_size: int = 1, dp_size: int = 1) -> TrainingArguments:
        """Returns Trainer's arguments."""
        config = ParallelismConfig(cp_size=cp_size, dp_shard_size=dp_size) if cp_size > 1 else None
        return TrainingArguments(
            output_dir=folder,
            parallelism_config=config,
            per_device_train_batch_size=self.batch // dp_size,
            per_device_eval_batch_size=self.batch // dp_size,
            gradient_accumulation_steps=self.accumulation,
            max_steps=self.steps,
            learning_rate=0.01,
            adam_epsilon=1e-4,  # smaller ones make much of the rounding of gradients that should be 0
            max_grad_norm=0.5,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            use_cpu=True,
        )


@dataclass
class Trained:
    """The results of a run on one rank."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    evaluation: float = 0.0
    logits: Tensor | None = None


def finish(trainer: Trainer, training: Training) -> Trained:
    """Trains and evaluates; returns the results."""
    with Exact():
        trainer.train()
        predictions = trainer.predict(samples(2 * training.batch + 1, training.packed))  # type: ignore[arg-type]
    assert trainer.model is not None
    assert predictions.metrics is not None
    history = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return Trained(
        [entry["loss"] for entry in history],
        [entry["grad_norm"] for entry in history],
        {name: x.detach().clone() for name, x in trainer.model.state_dict().items()},
        predictions.metrics["test_loss"],
        torch.as_tensor(predictions.predictions),
    )


@contextmanager
def as_launched(rank: int, world_size: int) -> Iterator[None]:
    """Sets the environment variables of torchrun, and resets the global state of accelerate before and after."""
    environment = {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world_size)),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
        "OMP_NUM_THREADS": "1",
    }
    forget()
    with mock.patch.dict(os.environ, environment if world_size > 1 else {}):
        try:
            yield
        finally:
            forget()


def forget() -> None:
    """Makes accelerate forget how this process was set up."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def build(training: Training) -> PreTrainedModel:
    model: Any = architecture(training.model).build()
    if training.checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": exact_again})
    return model  # type: ignore[no-any-return]


def exact_again() -> tuple[AbstractContextManager[None], Exact]:
    """For a checkpoint: its second run is in the backward, which is not within `Exact`."""
    return nullcontext(), Exact()


def by_trainer(group: dist.ProcessGroup, training: Training, cp_size: int) -> Trained:
    """Trains through Trainer on the ranks of the default group."""
    world_size = group.size()
    with as_launched(group.rank(), world_size), tempfile.TemporaryDirectory() as folder:
        model = build(training)
        before = model.config._attn_implementation
        arguments = training.arguments(folder, cp_size, world_size // cp_size)
        data: Any = samples(training.steps * training.batch * training.accumulation, training.packed)
        trained = finish(rhf.RingTrainer(model=model, args=arguments, train_dataset=data), training)
        assert model.config._attn_implementation == before
        return trained


def refused(group: dist.ProcessGroup, model: str, options: dict[str, Any]) -> None:
    """Trains with an option that is not supported."""
    with as_launched(group.rank(), group.size()), tempfile.TemporaryDirectory() as folder:
        training = Training(model)
        arguments = training.arguments(folder, group.size())
        for name, value in options.items():
            setattr(arguments, name, value)
        data: Any = samples(4, packed=False)
        rhf.RingTrainer(model=build(training), args=arguments, train_dataset=data).train()


def by_one_process(training: Training) -> Trained:
    """Trains through Trainer in this process."""
    with as_launched(0, 1), tempfile.TemporaryDirectory() as folder:
        data: Any = samples(training.steps * training.batch * training.accumulation, training.packed)
        trainer = Trainer(model=build(training), args=training.arguments(folder), train_dataset=data)
        return finish(trainer, training)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
