"""A pipeline of stages with experts, stopped and gone on with from a checkpoint, has the losses of one that was not."""

import shutil
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from ringattn import causal, contiguous
from ringattn.parallel.checkpoint import Progress, load_checkpoint, save_checkpoint
from ringattn.parallel.context_parallel import make_cp_attention
from ringattn.parallel.decoder import Decoder, DecoderConfig, MoESpec
from ringattn.parallel.expert_parallel import make_moe
from ringattn.parallel.mesh import build_mesh
from ringattn.parallel.parallelize_decoder import parallelize
from ringattn.parallel.pipeline import MicroBatch, Pipeline, cut_stages
from ringattn.parallel.pipeline_schedule import plan_pipeline
from ringattn.parallel.vocab_parallel_loss import count_valid, cross_entropy

LENGTH, SEQUENCES, STEPS = 24, 4, 4
EXPERTS = MoESpec(num_experts=4, top_k=2, hidden=16, every=2, aux_loss_weight=0.01)  # in every second layer
CONFIG = DecoderConfig(vocab_size=32, num_layers=4, dim=16, num_heads=4, num_kv_heads=2, hidden=24, moe=EXPERTS)

dist.init_process_group("gloo")
mesh = build_mesh(pp=dist.get_world_size())  # build_mesh(pp=2, dp_shard=2, ring=4, ep=8): as below, on 16 ranks
attend = make_cp_attention(mesh, contiguous(LENGTH, 1))


def loss(logits, target):  # noqa: ANN001, ANN201
    """A micro-batch's share of the loss, on the last stage."""
    labels, num_valid = target
    return cross_entropy(logits, labels, num_valid, mesh)


def train(steps: int, folder: Path | None = None) -> list[torch.Tensor]:
    """Trains up to a number of steps, from the last checkpoint; returns the losses of the steps that it made."""
    torch.manual_seed(0)
    course = plan_pipeline("1f1b", CONFIG.num_layers, mesh["pp"].size(), num_micro_batches=SEQUENCES)
    model = Decoder(CONFIG, moe=partial(make_moe, num_micro_batches=SEQUENCES))
    stages = cut_stages(model, course, mesh["pp"].get_local_rank())
    for stage in stages:
        parallelize(stage, mesh)
    pipeline = Pipeline(stages, course, mesh["pp"], loss=loss, dim=CONFIG.dim, dtype=torch.float32)
    optimizer = torch.optim.AdamW([p for stage in stages for p in stage.parameters()], lr=1e-2)
    found = load_checkpoint(folder, stages, optimizer) if folder else None  # None: from the start
    losses = []
    for step in range(found.step if found else 0, steps):
        torch.manual_seed(step)
        tokens = torch.randint(32, (SEQUENCES, 1, LENGTH + 1))
        num_valid = count_valid(tokens[..., 1:], mesh)  # of the whole step
        told = {"positions": torch.arange(LENGTH)[None], "mask": causal(), "attend": attend}
        batches = [MicroBatch(row[:, :-1], told, (row[:, 1:], num_valid)) for row in tokens]
        optimizer.zero_grad()
        losses.append(pipeline.step(batches))
        optimizer.step()
    if folder:
        save_checkpoint(folder, stages, optimizer, Progress(steps, steps * SEQUENCES))
    return losses


folder = Path("checkpoints-of-the-example")
first, rest = train(2, folder), train(STEPS, folder)
assert len(rest) == STEPS - 2
torch.testing.assert_close(torch.stack(first + rest), torch.stack(train(STEPS)))
dist.barrier()
if dist.get_rank() == 0:
    shutil.rmtree(folder)
dist.destroy_process_group()
