"""Training on any mix, stages of a pipeline included, from wherever the last checkpoint is."""

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

from ringattn.parallel.checkpoint import Progress, load_checkpoint, save_checkpoint
from ringattn.parallel.context_parallel import local_batch, make_cp_attention
from ringattn.parallel.decoder import AttentionFn, Decoder
from ringattn.parallel.grad_norm import clip_gradients
from ringattn.parallel.mesh import axis_size, context_mesh
from ringattn.parallel.parallelize_decoder import parallelize
from ringattn.parallel.pipeline import MicroBatch, Pipeline, cut_stages
from ringattn.parallel.pipeline_schedule import plan_pipeline
from ringattn.parallel.vocab_parallel_loss import count_valid, cross_entropy, sum_over_token_ranks
from tests.harness.cases import LAYOUT_CASES
from tests.harness.compare import assert_close
from tests.parallel.training import (
    LEARNING_RATE,
    MAX_NORM,
    SEQUENCES,
    Mix,
    Trained,
    batches,
    cut_share,
    make_model,
    mesh_of,
    steps_alone,
    whole,
)


@dataclass(frozen=True)
class Target:
    """What the loss of a micro-batch needs beside logits."""

    labels: Tensor
    num_valid: Tensor


@dataclass(frozen=True)
class Resumable:
    """A training that can stop and go on: `schedule` where the mix has stages."""

    mix: Mix
    schedule: str = "1f1b"

    def train(
        self,
        until: int,
        folder: Path | None = None,
        *,
        every: int = 10**6,
        after_step: Callable[[int], None] = lambda step: None,
    ) -> Trained:
        """Trains up to a number of steps, from the last checkpoint in a folder, and saves there."""
        mix = self.mix
        mesh = mesh_of(tuple(mix.sizes.items()))
        build = next(case.build for case in LAYOUT_CASES if case.name == mix.layout)
        layout = build(mix.length, context_mesh(mesh).size())
        attend = make_cp_attention(mesh, layout)
        stages, backward = self._prepared(mesh)
        owned = [parameter for stage in stages for parameter in stage.parameters()]
        optimizer = torch.optim.AdamW(owned, lr=LEARNING_RATE)
        found = load_checkpoint(folder, stages, optimizer) if folder is not None else None
        losses, norms = [], []
        every_batch = batches(mix.mask, mix.length, mix.config.vocab_size, until)
        for step in range(0 if found is None else found.samples // SEQUENCES, until):
            share = local_batch(every_batch[step], mesh, layout)
            optimizer.zero_grad()
            total = backward(cut_batch(share, mix.micro_batches, count_valid(share["shift_labels"], mesh), attend))
            norms.append(float(clip_gradients(owned, mesh, MAX_NORM)))
            optimizer.step()
            losses.append(float(sum_over_token_ranks(total, mesh)))
            if folder is not None and ((step + 1) % every == 0 or step + 1 == until):
                save_checkpoint(folder, stages, optimizer, Progress(step + 1, (step + 1) * SEQUENCES), keep=2)
            after_step(step + 1)
        return Trained(losses, norms, {name: whole(p) for stage in stages for name, p in stage.named_parameters()})

    def _prepared(self, mesh: DeviceMesh) -> tuple[list[Decoder], Callable[[list[MicroBatch]], Tensor]]:
        """This rank's stages, and what runs micro-batches forward and backward through them."""
        mix, model = self.mix, make_model(self.mix.config)

        def loss(logits: Tensor, target: Target) -> Tensor:
            return cross_entropy(logits, target.labels, target.num_valid, mesh)

        if axis_size(mesh, "pp") == 1:
            parallelize(model, mesh, zero=mix.zero)

            def one_after_the_other(parts: list[MicroBatch]) -> Tensor:
                total = torch.zeros((), dtype=torch.float64)
                for part in parts:
                    share = loss(model(part.tokens, **part.arguments), part.target)  # type: ignore[arg-type]
                    torch.autograd.backward(share)
                    total += share.detach()
                return total

            return [model], one_after_the_other
        course = plan_pipeline(self.schedule, mix.config.num_layers, axis_size(mesh, "pp"), mix.micro_batches)
        stages = cut_stages(model, course, mesh["pp"].get_local_rank())
        for stage in stages:
            parallelize(stage, mesh, zero=mix.zero)
        tp, dim = axis_size(mesh, "tp"), mix.config.dim
        pipeline = Pipeline(stages, course, mesh["pp"], loss=loss, dim=dim, dtype=torch.float64, row_shards=tp)

        def evaluated_before(parts: list[MicroBatch]) -> Tensor:
            evaluated, total = pipeline.evaluate(parts), pipeline.step(parts)
            assert_close(evaluated, total, atol=1e-10, name="loss of the evaluation")
            return total

        return stages, evaluated_before


def cut_batch(share: dict[str, Any], count: int, num_valid: Tensor, attend: AttentionFn) -> list[MicroBatch]:
    """This rank's share of a batch as micro-batches."""
    return [
        MicroBatch(
            micro["input_ids"],
            {"positions": micro["position_ids"], "mask": micro["mask"], "attend": attend},
            Target(micro["shift_labels"], num_valid),
        )
        for micro in cut_share(share, count)
    ]


def train_in_stages(group: dist.ProcessGroup, mix: Mix, schedule: str, steps: int) -> Trained:
    """Trains on a mesh of all ranks, from the start."""
    return Resumable(mix, schedule).train(steps)


def train_on(group: dist.ProcessGroup, resumable: Resumable, folder: Path, until: int) -> Trained:
    """Goes on from the last checkpoint, on a mesh of all ranks."""
    return resumable.train(until, folder)


def train_on_alone(group: dist.ProcessGroup, mix: Mix, folder: Path, until: int) -> Trained:
    """Goes on from the last checkpoint, in this process alone."""
    model = make_model(mix.config)
    optimizer: Optimizer = torch.optim.AdamW(model.parameters(), lr=123.0)  # the checkpoint's own takes its place
    found = load_checkpoint(folder, [model], optimizer, group=group)
    assert found is not None
    every_batch = batches(mix.mask, mix.length, mix.config.vocab_size, until)
    trained = steps_alone(model, optimizer, mix.mask, every_batch[found.samples // SEQUENCES :])
    save_checkpoint(folder, [model], optimizer, Progress(until, until * SEQUENCES), group=group)
    return trained
