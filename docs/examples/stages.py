"""A pipeline with experts, stopped and resumed from a checkpoint, has the losses of an uninterrupted run."""

import shutil
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from ringattn import causal, contiguous
from ringattn.parallel import (
    Decoder,
    DecoderConfig,
    MicroBatch,
    MoESpec,
    Pipeline,
    TrainingProgress,
    build_mesh,
    count_valid,
    cross_entropy,
    cut_stages,
    load_checkpoint,
    make_cp_attention,
    make_moe,
    parallelize,
    plan_pipeline,
    save_checkpoint,
)

LENGTH, SEQUENCES, STEPS = 24, 4, 4
EXPERTS = MoESpec(num_experts=4, top_k=2, hidden=16, every=2, aux_loss_weight=0.01)  # in every second layer
CONFIG = DecoderConfig(vocab_size=32, num_layers=4, dim=16, num_heads=4, num_kv_heads=2, hidden=24, moe=EXPERTS)

dist.init_process_group("gloo")
mesh = build_mesh(pp=dist.get_world_size())  # on 16 ranks: build_mesh(pp=2, dp_shard=2, ring=4, ep=8)
attention = make_cp_attention(mesh, contiguous(LENGTH, 1))


def loss_fn(logits, target):  # noqa: ANN001, ANN201
    """Returns a micro-batch's share of the loss, on the last stage."""
    labels, num_valid = target
    return cross_entropy(logits, labels, num_valid, mesh)


def train(steps: int, folder: Path | None = None) -> list[torch.Tensor]:
    """Trains up to a number of steps, from the latest checkpoint; returns the losses of the steps run here."""
    torch.manual_seed(0)
    schedule = plan_pipeline("1f1b", CONFIG.num_layers, mesh["pp"].size(), num_micro_batches=SEQUENCES)
    model = Decoder(CONFIG, moe_factory=partial(make_moe, num_micro_batches=SEQUENCES))
    stages = cut_stages(model, schedule, mesh["pp"].get_local_rank())
    for stage in stages:
        parallelize(stage, mesh)
    pipeline = Pipeline(stages, schedule, mesh["pp"], loss_fn=loss_fn, dim=CONFIG.dim, dtype=torch.float32)
    optimizer = torch.optim.AdamW([p for stage in stages for p in stage.parameters()], lr=1e-2)
    progress = load_checkpoint(folder, stages, optimizer) if folder else None  # None without a checkpoint
    losses = []
    for step in range(progress.step if progress else 0, steps):
        torch.manual_seed(step)
        tokens = torch.randint(32, (SEQUENCES, 1, LENGTH + 1))
        num_valid = count_valid(tokens[..., 1:], mesh)  # of the whole step
        arguments = {"positions": torch.arange(LENGTH)[None], "mask": causal(), "attention_fn": attention}
        micro_batches = [MicroBatch(row[:, :-1], arguments, (row[:, 1:], num_valid)) for row in tokens]
        optimizer.zero_grad()
        losses.append(pipeline.step(micro_batches))
        optimizer.step()
    if folder:
        save_checkpoint(folder, stages, optimizer, TrainingProgress(steps, steps * SEQUENCES))
    return losses


folder = Path("example-checkpoints")
first, rest = train(2, folder), train(STEPS, folder)
assert len(rest) == STEPS - 2
torch.testing.assert_close(torch.stack(first + rest), torch.stack(train(STEPS)))
dist.barrier()
if dist.get_rank() == 0:
    shutil.rmtree(folder)
dist.destroy_process_group()
