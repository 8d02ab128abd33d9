"""One recipe of training, followed on a mesh of ranks and in one process; and what each run showed."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import ringattn
from benchmarks.bubble import from_the_first, idle_part
from benchmarks.corpus import Corpus
from benchmarks.measure import peak_bytes
from benchmarks.session import Session
from benchmarks.traffic import Traffic
from ringattn.attention.sharding import IGNORED_LABEL
from ringattn.parallel import (
    Decoder,
    DecoderConfig,
    MicroBatch,
    Pipeline,
    PipelineSchedule,
    TimedOp,
    all_reduce_loss,
    axis_size,
    clip_gradients,
    context_mesh,
    count_valid,
    cross_entropy,
    cut_stages,
    data_parallel_rank,
    local_batch,
    make_cp_attention,
    make_moe,
    parallelize,
    plan_pipeline,
)
from ringattn.parallel.decoder import AttentionFn
from ringattn.parallel.pipeline_schedule import SCHEDULES
from ringattn.types import Masks

LAYOUTS = {"zigzag": ringattn.zigzag, "contiguous": ringattn.contiguous, "striped": ringattn.striped}
MAX_NORM = 1.0
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how; the same on any mix.

    Args:
        config: of the decoder.
        corpus: its batches.
        micro_batches: parts of a batch, in which gradients are summed up.
        schedule: of stages, where there are any.
        layout: a name out of `LAYOUTS`.
        zero: the stage of ZeRO.
        dtype: of weights and of computing; losses and sums of gradients are fp32 at least.
        lr: of AdamW.
        compiled: whether layers are compiled; only their feed-forwards where each batch has documents of its own.
        backend: a kernel; None is the first that can.
    """

    config: DecoderConfig
    corpus: Corpus
    micro_batches: int = 1
    schedule: str = "1f1b"
    layout: str = "zigzag"
    zero: int = 3
    dtype: torch.dtype = torch.float32
    lr: float = 3e-3
    compiled: bool = False
    backend: str | None = None

    def model(self, device: torch.device) -> Decoder:
        """Returns the decoder, with the same weights everywhere."""
        torch.manual_seed(0)
        experts = partial(make_moe, num_micro_batches=self.micro_batches)
        return Decoder(self.config, moe_factory=None if self.config.moe is None else experts).to(device, self.dtype)

    def course(self, mesh: DeviceMesh) -> PipelineSchedule | None:
        """Returns how layers and micro-batches go through the stages of a mesh; None without stages."""
        stages = axis_size(mesh, "pp")
        if stages == 1:
            return None
        if self.compiled and SCHEDULES[self.schedule].split_backward:
            raise SystemExit(f"--compile: {self.schedule} computes gradients of weights by themselves; take 1f1b")
        return plan_pipeline(self.schedule, self.config.num_layers, stages, self.micro_batches)


@dataclass(frozen=True)
class Run:
    """What one training run showed: of each step; of each process; and of one step, the bytes that each rank sent."""

    losses: list[float]
    norms: list[float]
    seconds: list[float]
    tokens_per_s: float  # without the first step, which compiles and connects
    state_mib: list[float]  # weights and optimizer state
    peak_mib: list[float]  # of a step, beyond that
    sent: dict[str, dict[str, list[int]]]  # by axis and operation
    bubbles: list[float]
    actions: list[list[TimedOp]]  # of the last step


@dataclass(frozen=True)
class _Trainee:
    """A model, be it whole or this rank's part, and how it is trained."""

    modules: list[Decoder]
    gradients: Callable[[Batch], Tensor]  # forward and backward; gives the loss
    clip: Callable[[list[nn.Parameter]], Tensor]  # gives the norm
    ready: Callable[[], None]  # waits for the other ranks
    actions: Callable[[], list[TimedOp]]  # of the stages here, in the last step
    traffic: Traffic | None


@dataclass(frozen=True)
class _Target:
    """What the loss of a micro-batch needs beside logits."""

    labels: Tensor
    num_valid: Tensor


def train_together(here: Session, recipe: Recipe, mesh: DeviceMesh, tick: Callable[[], None]) -> Run:
    """Trains over all ranks of a mesh; returns what all of them showed. All ranks call it together."""
    layout = LAYOUTS[recipe.layout](recipe.corpus.context, context_mesh(mesh).size())
    attend = make_cp_attention(mesh, layout, backend=recipe.backend)
    order = _order(recipe, mesh)
    batches = [local_batch(_picked(batch, order), mesh, layout) for batch in recipe.corpus.batches(here.device)]

    def loss(logits: Tensor, target: _Target) -> Tensor:
        return cross_entropy(logits, target.labels, target.num_valid, mesh)

    stages, backward, actions = _stages(here, recipe, mesh, loss)

    def gradients(share: Batch) -> Tensor:
        num_valid = count_valid(share["shift_labels"], mesh)
        return all_reduce_loss(backward(_micro_batches(share, recipe.micro_batches, num_valid, attend)), mesh)

    clip = partial(clip_gradients, mesh=mesh, max_norm=MAX_NORM)
    run, taken = _train(
        here, recipe, _Trainee(stages, gradients, clip, dist.barrier, actions, Traffic(mesh)), batches, tick
    )
    everyone: list[tuple[Run, list[list[TimedOp]]]] = [(run, taken)] * here.world_size
    dist.all_gather_object(everyone, (run, taken))
    return _merged(recipe, [each for each, _ in everyone], [steps for _, steps in everyone])


def train_alone(here: Session, recipe: Recipe, tick: Callable[[], None]) -> Run:
    """Trains in this process alone, with torch's own attention and as many threads as there are ranks, or cores."""
    torch.set_num_threads(min(here.world_size, os.cpu_count() or 1))
    model = recipe.model(here.device)
    batches = recipe.corpus.batches(here.device)

    def gradients(batch: Batch) -> Tensor:
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED_LABEL)
        num_valid = (labels != IGNORED_LABEL).sum()
        total = torch.zeros((), dtype=torch.float64, device=here.device)
        for tokens, positions, targets in zip(
            *(x.chunk(recipe.micro_batches) for x in (batch["input_ids"], batch["position_ids"], labels)), strict=True
        ):
            logits = model(
                tokens, positions=positions, mask=None, attention_fn=_plain_attend(recipe.corpus.allowed(positions))
            )
            wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
            share = F.cross_entropy(wide, targets.flatten(), reduction="sum", ignore_index=IGNORED_LABEL) / num_valid
            torch.autograd.backward(share)
            total += share.detach()
        return total

    clip = partial(torch.nn.utils.clip_grad_norm_, max_norm=MAX_NORM)
    trainee = _Trainee([model], gradients, clip, lambda: None, list, None)
    run, _ = _train(here, recipe, trainee, batches, tick)
    torch.set_num_threads(1)
    return run


def worst_difference(run: Run, other: Run) -> float:
    """Returns the largest relative difference between the losses of two runs."""
    return max(abs(a - b) / abs(b) for a, b in zip(run.losses, other.losses, strict=True))


def allowed_difference(here: Session, recipe: Recipe, alone: Run) -> float:
    """Returns how far losses may be from those of one process.

    In 16 bits that is as far as those of one process are from the same in fp32, both ways, and a rounding.
    """
    if recipe.dtype.itemsize > 2:
        return 1e-10 if recipe.dtype == torch.float64 else 1e-4
    exact = train_alone(here, replace(recipe, dtype=torch.float32), lambda: None)
    return 2 * worst_difference(alone, exact) + torch.finfo(recipe.dtype).eps


def _train(
    here: Session, recipe: Recipe, trainee: _Trainee, batches: list[dict[str, Any]], tick: Callable[[], None]
) -> tuple[Run, list[list[TimedOp]]]:
    """Trains; returns what this process showed, and what its stages did in each step."""
    owned = [parameter for module in trainee.modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(owned, lr=recipe.lr, foreach=False)  # weights lie on several meshes

    def backward(batch: Batch) -> tuple[float, float]:
        optimizer.zero_grad()
        loss = trainee.gradients(batch)
        return float(loss), float(trainee.clip(owned))

    losses, norms, seconds, actions = [], [], [], []
    for batch in batches:
        trainee.ready()
        start = time.perf_counter()
        loss, norm = backward(batch)
        optimizer.step()
        if here.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
        norms.append(norm)
        actions.append(trainee.actions())
        tick()
    sent = {}
    if trainee.traffic is not None:
        with trainee.traffic as traffic:
            backward(batches[0])
        sent = {axis: {op: [count] for op, count in by.items()} for axis, by in traffic.sent.items()}
    optimizer.zero_grad()
    peak = peak_bytes(lambda: backward(batches[0]))
    tokens_per_s = recipe.corpus.tokens / statistics.median(seconds[1:] or seconds)
    state = sum(_bytes_of(x) for x in owned) + sum(
        _bytes_of(x) for of_one in optimizer.state.values() for x in of_one.values() if isinstance(x, Tensor)
    )
    return Run(losses, norms, seconds, tokens_per_s, [state / 2**20], [peak / 2**20], sent, [], []), actions


def _stages(
    here: Session, recipe: Recipe, mesh: DeviceMesh, loss: Callable[[Tensor, _Target], Tensor]
) -> tuple[list[Decoder], Callable[[list[MicroBatch]], Tensor], Callable[[], list[TimedOp]]]:
    """The stages of this rank; what runs micro-batches forward and backward through them; and when they computed."""
    course, model = recipe.course(mesh), recipe.model(here.device)
    stages = [model] if course is None else cut_stages(model, course, mesh["pp"].get_local_rank())
    wide = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(recipe.dtype, torch.float32))
    for stage in stages:
        parallelize(stage, mesh, zero=recipe.zero, precision=wide)
        for layer in stage.layers.values() if recipe.compiled else ():
            part = layer if recipe.corpus.documents is None else layer.feed_forward
            assert isinstance(part, nn.Module)
            part.compile()
    if course is not None:
        pipeline = Pipeline(
            stages, course, mesh["pp"], loss_fn=loss, dim=recipe.config.dim, dtype=recipe.dtype,
            tp_size=axis_size(mesh, "tp"),
        )  # fmt: skip
        return stages, pipeline.step, pipeline.timeline

    def one_after_the_other(parts: list[MicroBatch]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=here.device)
        for part in parts:
            assert isinstance(part.target, _Target)
            share = loss(model(part.tokens, **part.arguments), part.target)
            torch.autograd.backward(share)
            total += share.detach()
        return total

    return stages, one_after_the_other, list


def _order(recipe: Recipe, mesh: DeviceMesh) -> list[int]:
    """The order in which sequences are dealt: what all ranks have in a micro-batch is one part of the whole batch."""
    count, parts = recipe.corpus.sequences, recipe.micro_batches
    shares = data_parallel_rank(mesh)[1]
    if count % (parts * shares):
        raise SystemExit(f"--sequences {count}: must be a multiple of {parts} micro-batches x {shares} shares")
    found: list[int] = torch.arange(count).view(parts, shares, -1).transpose(0, 1).flatten().tolist()
    return found


def _picked(batch: Batch, rows: Sequence[int]) -> dict[str, Any]:
    """Some sequences of a batch."""

    def pick(value: Any) -> Any:
        if isinstance(value, ringattn.Mask):
            return value
        return value[list(rows)] if isinstance(value, Tensor) else [value[row] for row in rows]

    return {name: pick(value) for name, value in batch.items()}


def _micro_batches(share: Batch, count: int, num_valid: Tensor, attend: AttentionFn) -> list[MicroBatch]:
    """Cuts this rank's share of a batch."""
    each = share["input_ids"].shape[0] // count
    parts = [_picked(share, range(index * each, (index + 1) * each)) for index in range(count)]
    return [
        MicroBatch(
            part["input_ids"],
            {"positions": part["position_ids"], "mask": part["mask"], "attention_fn": attend},
            _Target(part["shift_labels"], num_valid),
        )
        for part in parts
    ]


def _plain_attend(allowed: Tensor | None) -> AttentionFn:
    """Torch's own attention, under a mask that is told in full; None is causal."""
    bias = None if allowed is None else allowed[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Masks) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=bias is None, enable_gqa=True
        ).transpose(1, 2)

    return attend


def _merged(recipe: Recipe, runs: list[Run], taken: list[list[list[TimedOp]]]) -> Run:
    """What all ranks showed, as one run; the slowest rank's time is that of a step."""
    seconds = [max(of_ranks) for of_ranks in zip(*(run.seconds for run in runs), strict=True)]
    sent: dict[str, dict[str, list[int]]] = {}
    for axis, operation in dict.fromkeys((name, by) for run in runs for name in run.sent for by in run.sent[name]):
        counts = [run.sent.get(axis, {}).get(operation, [0])[0] for run in runs]
        sent.setdefault(axis, {})[operation] = counts
    steps = [from_the_first(step) for step in zip(*taken, strict=True)] if taken[0][0] else []
    return replace(
        runs[0],
        seconds=seconds,
        tokens_per_s=recipe.corpus.tokens / statistics.median(seconds[1:] or seconds),
        state_mib=[run.state_mib[0] for run in runs],
        peak_mib=[run.peak_mib[0] for run in runs],
        sent=sent,
        bubbles=[idle_part(step)[1] for step in steps],
        actions=steps[-1] if steps else [],
    )


def _bytes_of(x: Tensor) -> int:
    return x.to_local().nbytes if isinstance(x, DTensor) else x.nbytes
