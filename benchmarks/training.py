"""Trains one recipe on a mesh of ranks, or in one process, and reports what the run showed."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import ringattn
from benchmarks.bubble import Timeline, from_first_op, idle_share
from benchmarks.corpus import VOCABULARY, Corpus
from benchmarks.inputs import LAYOUTS
from benchmarks.profiling import peak_bytes
from benchmarks.runner import Session
from benchmarks.traffic import Traffic
from ringattn import parallel
from ringattn.attention.sharding import IGNORED_LABEL
from ringattn.parallel import Decoder, MicroBatch, PipelineSchedule, TimedOp, axis_size, make_cp_attention
from ringattn.parallel.decoder import AttentionFn
from ringattn.parallel.pipeline_schedule import SCHEDULES
from ringattn.types import Masks

MAX_NORM = 1.0
Batch = Mapping[str, Any]
Tick = Callable[[], None]


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how; the fields are flags."""

    context: Annotated[int, "tokens in a sequence, over all ranks"] = 16384
    sequences: Annotated[int | None, "in a batch; default: one per data-parallel share and micro-batch"] = None
    steps: int = 8
    layers: int = 2
    dim: int = 128
    heads: int = 4
    kv_heads: int = 2
    experts: Annotated[int, "in each layer; 0 is a dense model"] = 0
    top_k: Annotated[int, "experts per token"] = 2
    window: Annotated[int | None, "how many tokens before itself a token sees; default: all"] = None
    documents: Annotated[int | None, "mean length of packed documents; default: not packed"] = None
    lr: float = 3e-3
    layout: Annotated[str, ("zigzag", "contiguous", "striped")] = "zigzag"
    micro_batches: Annotated[int | None, "parts of a batch; default: the number of stages"] = None
    schedule: Annotated[str, SCHEDULES, "of pipeline stages"] = "1f1b"
    zero: Annotated[int, (0, 2, 3)] = 3
    dtype: Annotated[str, ("float64", "float32", "bfloat16", "float16"), "of weights and computing"] = "float32"
    compile: Annotated[bool, "compile layers; with --documents only their feed-forwards"] = False
    backend: Annotated[str | None, "a kernel of `ringattn info`; default: the first that can"] = None

    def on(self, sizes: Mapping[str, int]) -> Recipe:
        """Returns the recipe with the defaults that depend on the sizes of the axes."""
        parts = self.micro_batches or sizes.get("pp", 1)
        shares = sizes.get("dp_replicate", 1) * sizes.get("dp_shard", 1)
        return replace(self, micro_batches=parts, sequences=self.sequences or shares * parts)

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def corpus(self) -> Corpus:
        return Corpus(self.context, self.sequences or 1, self.steps, self.window, self.documents)

    @property
    def num_parts(self) -> int:
        return self.micro_batches or 1

    def model(self, device: torch.device) -> Decoder:
        """Returns the decoder, with equal weights everywhere."""
        torch.manual_seed(0)
        hidden = 3 * self.dim
        moe = parallel.MoESpec(self.experts, self.top_k, hidden // self.top_k) if self.experts else None
        make = partial(parallel.make_moe, num_micro_batches=self.num_parts) if moe else None
        heads = {"num_heads": self.heads, "num_kv_heads": self.kv_heads}
        config = parallel.DecoderConfig(
            VOCABULARY, num_layers=self.layers, dim=self.dim, **heads, hidden=hidden, moe=moe
        )
        return Decoder(config, moe_factory=make).to(device, self.torch_dtype)

    def pipeline(self, mesh: DeviceMesh) -> PipelineSchedule | None:
        """Returns the schedule of the stages of a mesh; None without stages."""
        stages = axis_size(mesh, "pp")
        if stages == 1:
            return None
        if self.compile and SCHEDULES[self.schedule].split_backward:
            raise SystemExit(f"--compile: {self.schedule} computes the gradients of weights separately; use 1f1b")
        return parallel.plan_pipeline(self.schedule, self.layers, stages, self.num_parts)


@dataclass(frozen=True)
class Run:
    """The results of a training run.

    Args:
        losses, seconds: of each step.
        tokens_per_s: without the first step, which compiles and connects.
        state_mib: weights and optimizer state of each process.
        peak_mib: the rest of the memory of a step, of each process.
        sent: bytes of each rank in a step, by axis and operation.
        bubbles: of each step, if there are stages.
        ops: of each rank's stages in the last step.
    """

    losses: list[float]
    seconds: list[float]
    tokens_per_s: float
    state_mib: list[float]
    peak_mib: list[float]
    sent: dict[str, dict[str, list[int]]]
    bubbles: list[float]
    ops: Timeline

    def record(self) -> dict[str, Any]:
        """Returns all results but the operations."""
        return {name: value for name, value in asdict(self).items() if name != "ops"}

    def worst_difference(self, other: Run) -> float:
        """Returns the largest relative difference of the losses."""
        return max(abs(a - b) / abs(b) for a, b in zip(self.losses, other.losses, strict=True))


@dataclass(frozen=True)
class _Trainee:
    """A whole model, or this rank's part, and the functions of a step."""

    modules: list[Decoder]
    gradients: Callable[[Batch], Tensor]  # forward and backward; returns the loss
    clip: Callable[[list[nn.Parameter]], object]
    barrier: Callable[[], None]
    ops: Callable[[], list[TimedOp]]  # of the last step
    traffic: Traffic | None


class _Target(NamedTuple):
    """What the loss of a micro-batch needs besides logits."""

    labels: Tensor
    num_valid: Tensor


Loss = Callable[[Tensor, _Target], Tensor]


def train_together(here: Session, recipe: Recipe, mesh: DeviceMesh, tick: Tick) -> Run:
    """Trains over all ranks of a mesh; returns the results of all of them. All ranks call it together."""
    layout = LAYOUTS[recipe.layout](ringattn.causal(), recipe.context, parallel.context_mesh(mesh).size())
    attend = make_cp_attention(mesh, layout, backend=recipe.backend)
    order = _sequence_order(recipe, mesh)
    batches = [
        parallel.local_batch(_rows_of(batch, order), mesh, layout) for batch in recipe.corpus.batches(here.device)
    ]

    def loss(logits: Tensor, target: _Target) -> Tensor:
        return parallel.cross_entropy(logits, target.labels, target.num_valid, mesh)

    stages, backward, ops = _stages(here, recipe, mesh, loss)

    def gradients(share: Batch) -> Tensor:
        num_valid = parallel.count_valid(share["shift_labels"], mesh)
        return parallel.all_reduce_loss(backward(_micro_batches(share, recipe, num_valid, lambda part: attend)), mesh)

    clip = partial(parallel.clip_gradients, mesh=mesh, max_norm=MAX_NORM)
    trained = _train(here, recipe, _Trainee(stages, gradients, clip, dist.barrier, ops, Traffic(mesh)), batches, tick)
    of_ranks = [trained] * here.world_size
    dist.all_gather_object(of_ranks, trained)
    return _merged(recipe, [run for run, _ in of_ranks], [steps for _, steps in of_ranks])


def train_alone(here: Session, recipe: Recipe, tick: Tick = lambda: None) -> Run:
    """Trains in this process, with torch's own attention and a thread for each rank, or for each core if fewer."""
    torch.set_num_threads(min(here.world_size, os.cpu_count() or 1))
    model = recipe.model(here.device)

    def attention_for(part: Batch) -> AttentionFn:
        return _dense_attention(recipe.corpus.dense_mask(part["position_ids"]))

    def loss(logits: Tensor, target: _Target) -> Tensor:
        wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        targets = target.labels.flatten()
        return F.cross_entropy(wide, targets, reduction="sum", ignore_index=IGNORED_LABEL) / target.num_valid

    def gradients(batch: Batch) -> Tensor:
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED_LABEL)
        shifted = {**batch, "shift_labels": labels}
        return _backward(model, loss, _micro_batches(shifted, recipe, (labels != IGNORED_LABEL).sum(), attention_for))

    clip = partial(torch.nn.utils.clip_grad_norm_, max_norm=MAX_NORM)
    trainee = _Trainee([model], gradients, clip, lambda: None, list, None)
    run, _ = _train(here, recipe, trainee, recipe.corpus.batches(here.device), tick)
    torch.set_num_threads(1)
    return run


def allowed_difference(here: Session, recipe: Recipe, alone: Run) -> float:
    """Returns the tolerance for the losses beside one process.

    In 16 bits it is twice the difference between one process in this dtype and in fp32, plus a rounding.
    """
    if recipe.torch_dtype.itemsize > 2:
        return 1e-10 if recipe.torch_dtype == torch.float64 else 1e-4
    exact = train_alone(here, replace(recipe, dtype="float32"))
    return 2 * alone.worst_difference(exact) + torch.finfo(recipe.torch_dtype).eps


def _train(
    here: Session, recipe: Recipe, trainee: _Trainee, batches: list[dict[str, Any]], tick: Tick
) -> tuple[Run, list[list[TimedOp]]]:
    """Returns the results of this process, and the operations of its stages in each step."""
    owned = [parameter for module in trainee.modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(owned, lr=recipe.lr, foreach=False)  # weights are on several meshes

    def backward(batch: Batch) -> float:
        optimizer.zero_grad()
        loss = trainee.gradients(batch)
        trainee.clip(owned)
        return float(loss)

    losses, seconds, ops = [], [], []
    for batch in batches:
        trainee.barrier()
        start = time.perf_counter()
        loss = backward(batch)
        optimizer.step()
        if here.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
        ops.append(trainee.ops())
        tick()
    sent = {}
    if trainee.traffic is not None:
        with trainee.traffic as traffic:
            backward(batches[0])
        sent = {axis: {name: [count] for name, count in by.items()} for axis, by in traffic.sent.items()}
    optimizer.zero_grad()
    peak = peak_bytes(lambda: backward(batches[0]))
    moments = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    state = sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in [*owned, *moments])
    rate = recipe.corpus.tokens / statistics.median(seconds[1:] or seconds)
    return Run(losses, seconds, rate, [state / 2**20], [peak / 2**20], sent, [], []), ops


def _stages(
    here: Session, recipe: Recipe, mesh: DeviceMesh, loss: Loss
) -> tuple[list[Decoder], Callable[[list[MicroBatch]], Tensor], Callable[[], list[TimedOp]]]:
    """Returns this rank's stages, the forward and backward of micro-batches through them, and their operations."""
    schedule, model = recipe.pipeline(mesh), recipe.model(here.device)
    stages = [model] if schedule is None else parallel.cut_stages(model, schedule, mesh["pp"].get_local_rank())
    wide = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(recipe.torch_dtype, torch.float32))
    for stage in stages:
        parallel.parallelize(stage, mesh, zero=recipe.zero, precision=wide)
        for layer in stage.layers.values() if recipe.compile else ():
            part = layer if recipe.documents is None else layer.feed_forward
            assert isinstance(part, nn.Module)
            part.compile()
    if schedule is not None:
        pipeline = parallel.Pipeline(
            stages, schedule, mesh["pp"], loss_fn=loss, dim=recipe.dim, dtype=recipe.torch_dtype,
            tp_size=axis_size(mesh, "tp"),
        )  # fmt: skip
        return stages, pipeline.step, pipeline.timeline

    return stages, partial(_backward, model, loss), list


def _backward(model: nn.Module, loss: Loss, parts: list[MicroBatch]) -> Tensor:
    """Runs forward and backward of micro-batches one after the other; returns the sum of their losses."""
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        assert isinstance(part.target, _Target)
        share = loss(model(part.tokens, **part.arguments), part.target)
        torch.autograd.backward(share)
        total = total.to(share.device) + share.detach()
    return total


def _sequence_order(recipe: Recipe, mesh: DeviceMesh) -> list[int]:
    """Returns an order of the sequences in which each micro-batch of all ranks is one part of the whole batch."""
    count, parts, shares = recipe.corpus.sequences, recipe.num_parts, parallel.data_parallel_rank(mesh)[1]
    if count % (parts * shares):
        raise SystemExit(f"--sequences {count}: must be a multiple of {parts} micro-batches x {shares} shares")
    found: list[int] = torch.arange(count).view(parts, shares, -1).transpose(0, 1).flatten().tolist()
    return found


def _rows_of(batch: Batch, rows: Sequence[int]) -> dict[str, Any]:
    """Returns some sequences of a batch."""

    def pick(value: Any) -> Any:
        if isinstance(value, ringattn.Mask):
            return value
        return value[list(rows)] if isinstance(value, Tensor) else [value[row] for row in rows]

    return {name: pick(value) for name, value in batch.items()}


def _micro_batches(
    share: Batch, recipe: Recipe, num_valid: Tensor, attention_for: Callable[[Batch], AttentionFn]
) -> list[MicroBatch]:
    each = share["input_ids"].shape[0] // recipe.num_parts
    found = []
    for index in range(recipe.num_parts):
        part = _rows_of(share, range(index * each, (index + 1) * each))
        arguments = {"positions": part["position_ids"], "mask": part["mask"], "attention_fn": attention_for(part)}
        found.append(MicroBatch(part["input_ids"], arguments, _Target(part["shift_labels"], num_valid)))
    return found


def _dense_attention(dense_mask: Tensor | None) -> AttentionFn:
    """Returns torch's own attention under a dense mask; None is causal."""
    mask = None if dense_mask is None else dense_mask[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor, _: Masks) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return out.transpose(1, 2)

    return attend


def _merged(recipe: Recipe, runs: list[Run], ops: list[list[list[TimedOp]]]) -> Run:
    """Returns the results of all ranks as one run; a step takes as long as on the slowest rank."""
    seconds = [max(of_ranks) for of_ranks in zip(*(run.seconds for run in runs), strict=True)]
    sent: dict[str, dict[str, list[int]]] = {}
    for axis, operation in dict.fromkeys((name, by) for run in runs for name in run.sent for by in run.sent[name]):
        counts = [run.sent.get(axis, {}).get(operation, [0])[0] for run in runs]
        sent.setdefault(axis, {})[operation] = counts
    steps = [from_first_op(step) for step in zip(*ops, strict=True)] if ops[0][0] else []
    return replace(
        runs[0],
        seconds=seconds,
        tokens_per_s=recipe.corpus.tokens / statistics.median(seconds[1:] or seconds),
        state_mib=[run.state_mib[0] for run in runs],
        peak_mib=[run.peak_mib[0] for run in runs],
        sent=sent,
        bubbles=[idle_share(step)[1] for step in steps],
        ops=steps[-1] if steps else [],
    )
