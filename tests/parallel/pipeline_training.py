"""Training on any mesh, including pipelines, resumed from the latest checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from ringattn.parallel import (
    Decoder,
    MicroBatch,
    Pipeline,
    TrainingProgress,
    all_reduce_loss,
    axis_size,
    clip_gradients,
    context_mesh,
    count_valid,
    cross_entropy,
    cut_stages,
    load_checkpoint,
    local_batch,
    make_cp_attention,
    parallelize,
    plan_pipeline,
    save_checkpoint,
)
from ringattn.parallel.decoder import AttentionFn
from tests.harness.cases import LAYOUT_CASES
from tests.harness.compare import assert_close
from tests.parallel.training import (
    LEARNING_RATE,
    MAX_NORM,
    SEQUENCES,
    TrainingRun,
    TrainingSetup,
    batches,
    full_tensor,
    make_model,
    mesh_of,
    run_steps_single_process,
    split_batch,
)


@dataclass(frozen=True)
class Target:
    """The target of a micro-batch for the loss function."""

    labels: Tensor
    num_valid: Tensor


@dataclass(frozen=True)
class ResumableTraining:
    """A training run that can stop and resume; `schedule` is for setups with pipeline stages."""

    setup: TrainingSetup
    schedule: str = "1f1b"

    def train(
        self,
        until: int,
        folder: Path | None = None,
        *,
        every: int = 10**6,
        after_step: Callable[[int], None] = lambda step: None,
    ) -> TrainingRun:
        """Trains up to step `until`, from the latest checkpoint in a folder, and saves there every `every` steps."""
        setup = self.setup
        mesh = mesh_of(tuple(setup.sizes.items()))
        build = next(case.build for case in LAYOUT_CASES if case.name == setup.layout)
        layout = build(setup.length, context_mesh(mesh).size())
        attend = make_cp_attention(mesh, layout)
        stages, backward = self._build(mesh)
        owned = [parameter for stage in stages for parameter in stage.parameters()]
        optimizer = torch.optim.AdamW(owned, lr=LEARNING_RATE)
        progress = load_checkpoint(folder, stages, optimizer) if folder is not None else None
        losses, norms = [], []
        all_batches = batches(setup.mask, setup.length, setup.config.vocab_size, until)
        for step in range(0 if progress is None else progress.samples // SEQUENCES, until):
            part = local_batch(all_batches[step], mesh, layout)
            optimizer.zero_grad()
            total = backward(
                make_micro_batches(part, setup.micro_batches, count_valid(part["shift_labels"], mesh), attend)
            )
            norms.append(float(clip_gradients(owned, mesh, MAX_NORM)))
            optimizer.step()
            losses.append(float(all_reduce_loss(total, mesh)))
            if folder is not None and ((step + 1) % every == 0 or step + 1 == until):
                save_checkpoint(folder, stages, optimizer, TrainingProgress(step + 1, (step + 1) * SEQUENCES), keep=2)
            after_step(step + 1)
        return TrainingRun(
            losses, norms, {name: full_tensor(p) for stage in stages for name, p in stage.named_parameters()}
        )

    def _build(self, mesh: DeviceMesh) -> tuple[list[Decoder], Callable[[list[MicroBatch]], Tensor]]:
        """Returns this rank's stages, and a function that runs micro-batches forward and backward."""
        setup, model = self.setup, make_model(self.setup.config)

        def loss_fn(logits: Tensor, target: Target) -> Tensor:
            return cross_entropy(logits, target.labels, target.num_valid, mesh)

        if axis_size(mesh, "pp") == 1:
            parallelize(model, mesh, zero=setup.zero)

            def accumulate(micro_batches: list[MicroBatch]) -> Tensor:
                total = torch.zeros((), dtype=torch.float64)
                for micro_batch in micro_batches:
                    loss = loss_fn(model(micro_batch.tokens, **micro_batch.arguments), micro_batch.target)  # type: ignore[arg-type]
                    torch.autograd.backward(loss)
                    total += loss.detach()
                return total

            return [model], accumulate
        schedule = plan_pipeline(self.schedule, setup.config.num_layers, axis_size(mesh, "pp"), setup.micro_batches)
        stages = cut_stages(model, schedule, mesh["pp"].get_local_rank())
        for stage in stages:
            parallelize(stage, mesh, zero=setup.zero)
        tp, dim = axis_size(mesh, "tp"), setup.config.dim
        pipeline = Pipeline(stages, schedule, mesh["pp"], loss_fn=loss_fn, dim=dim, dtype=torch.float64, tp_size=tp)

        def evaluate_then_step(micro_batches: list[MicroBatch]) -> Tensor:
            evaluated, total = pipeline.evaluate(micro_batches), pipeline.step(micro_batches)
            assert_close(evaluated, total, atol=1e-10, name="loss of the evaluation")
            return total

        return stages, evaluate_then_step


def make_micro_batches(batch: dict[str, Any], count: int, num_valid: Tensor, attend: AttentionFn) -> list[MicroBatch]:
    """Splits this rank's part of a batch into micro-batches."""
    return [
        MicroBatch(
            micro["input_ids"],
            {"positions": micro["position_ids"], "mask": micro["mask"], "attention_fn": attend},
            Target(micro["shift_labels"], num_valid),
        )
        for micro in split_batch(batch, count)
    ]


def train_pipeline(group: dist.ProcessGroup, setup: TrainingSetup, schedule: str, steps: int) -> TrainingRun:
    """Trains on a mesh of all ranks, from step 0."""
    return ResumableTraining(setup, schedule).train(steps)


def resume_on_mesh(group: dist.ProcessGroup, resumable: ResumableTraining, folder: Path, until: int) -> TrainingRun:
    """Resumes from the latest checkpoint, on a mesh of all ranks."""
    return resumable.train(until, folder)


def resume_single_process(group: dist.ProcessGroup, setup: TrainingSetup, folder: Path, until: int) -> TrainingRun:
    """Resumes from the latest checkpoint, in this process alone."""
    model = make_model(setup.config)
    optimizer: Optimizer = torch.optim.AdamW(model.parameters(), lr=123.0)  # replaced by the checkpoint's
    progress = load_checkpoint(folder, [model], optimizer, group=group)
    assert progress is not None
    all_batches = batches(setup.mask, setup.length, setup.config.vocab_size, until)
    trained = run_steps_single_process(model, optimizer, setup.mask, all_batches[progress.samples // SEQUENCES :])
    save_checkpoint(folder, [model], optimizer, TrainingProgress(until, until * SEQUENCES), group=group)
    return trained
