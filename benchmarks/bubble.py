"""The bubbles of pipeline schedules: the idle share of the ranks, measured beside theory.

Stages only sleep: one unit of time for a forward, one for the gradient of the input, one for the gradient of the
weights. This measures the schedule and torch's machinery, with more ranks than cores if wanted. A rank with two stages
sleeps half as long in each, so a rank's work is the same under every schedule. On a busy machine ranks wake up late,
which matters less for longer units. Theory is the idle share in the same order of operations if only operations took
time. Exits with an error where the two differ too much. Figures show what each rank does when.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import product
from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks import plots
from benchmarks.registry import benchmark
from benchmarks.runner import Record, Session
from ringattn.parallel import (
    MicroBatch,
    Pipeline,
    PipelineSchedule,
    TimedOp,
    bubble_fraction,
    plan_pipeline,
    simulated_bubble,
)
from ringattn.parallel.pipeline_schedule import SCHEDULES

Timeline = Sequence[Sequence[TimedOp]]  # of each rank


class _SleepInBackward(torch.autograd.Function):
    """The identity, whose backward sleeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return grads[0], None


class SleepingStage(nn.Module):
    """A stage that sleeps in its forward, for the gradient of its input, and for the gradient of its weight."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        """Takes (B, S) tokens or another stage's (B, S, 1); returns (B, S, 1)."""
        time.sleep(self.seconds)
        hidden = x if x.is_floating_point() else torch.zeros(*x.shape, 1)
        weight: Tensor = _SleepInBackward.apply(self.weight, self.seconds)  # type: ignore[no-untyped-call]
        out: Tensor = _SleepInBackward.apply(hidden + weight, self.seconds)  # type: ignore[no-untyped-call]
        return out.clone()  # torch detaches it in place, which a view forbids


def measure(here: Session, schedule: PipelineSchedule, unit_s: float, rounds: int) -> tuple[dict[str, Any], Timeline]:
    """Runs a schedule; returns a record and each rank's operations in the fastest round. All ranks call it together."""
    mesh = init_device_mesh(here.device.type, (here.world_size,), mesh_dim_names=("pp",))
    mine = schedule.stages_of(here.rank)
    stages = [SleepingStage(unit_s / len(mine)) for _ in mine]
    pipeline = Pipeline(stages, schedule, mesh, loss_fn=lambda out, _: out.sum(), dim=1, dtype=torch.float32)
    batches = [MicroBatch(torch.zeros(1, 1, dtype=torch.int64), {}, None)] * schedule.num_micro_batches
    seen: list[Timeline] = []
    for _ in range(rounds + 1):
        dist.barrier()
        pipeline.step(batches)
        of_ranks: list[Any] = [None] * here.world_size
        dist.all_gather_object(of_ranks, [op for op in pipeline.timeline() if op.op.kind != "L"])
        seen.append(from_first_op(of_ranks))
    # The first round makes torch's connections. Other load on the machine can only make a round longer.
    fastest = min(seen[1:], key=lambda ops: idle_share(ops)[0])
    step_s, bubble = idle_share(fastest)
    case = {"schedule": schedule.name, "ranks": here.world_size, "stages_per_rank": len(mine)}
    case |= {"micro_batches": schedule.num_micro_batches, "unit_ms": unit_s * 1e3}
    theory = theoretical_bubble(fastest, schedule)
    return {**case, "step_s": step_s, "bubble": bubble, "theory": theory, "bubble_of_theory": bubble / theory}, fastest


def theoretical_bubble(ops: Timeline, schedule: PipelineSchedule) -> float:
    """Returns the idle share of ranks that run the same operations in the same order, if nothing else took time."""
    moves = {rank: [op.op for op in of_rank if op.op.kind != "L"] for rank, of_rank in enumerate(ops)}
    return simulated_bubble(moves, schedule.num_stages)


def idle_share(ops: Timeline) -> tuple[float, float]:
    """Returns the seconds of a step from its first operation to its last, and the mean idle share of the ranks."""
    step_s = max(of_rank[-1].stop_s for of_rank in ops)
    return step_s, statistics.mean(bubble_fraction(list(of_rank), step_s) for of_rank in ops)


def from_first_op(ops: Timeline) -> list[list[TimedOp]]:
    """Returns the operations with times from the first rank's first operation; the ranks' clocks start together."""
    zero = ops[0][0].start_s
    return [[TimedOp(move, start - zero, stop - zero) for move, start, stop in of_rank] for of_rank in ops]


def check(records: Sequence[Record], tolerance: float) -> None:
    """Exits if a bubble differs from theory by more than a share of it, or exceeds the bubble of a simpler schedule."""
    wrong = [
        f"{r['schedule']}: {r['bubble']:.1%} beside {r['theory']:.1%}"
        for r in records
        if abs(r["bubble"] / r["theory"] - 1) > tolerance
    ]
    order = {"1f1b": 0, "interleaved-1f1b": 1, "interleaved-zero-bubble": 2, "zbv-zero-bubble": 2}
    wrong += [
        f"{better['schedule']} idles {better['bubble']:.1%}, {simple['schedule']} {simple['bubble']:.1%}"
        for better, simple in product(records, records)
        if better["micro_batches"] == simple["micro_batches"]
        and order.get(better["schedule"], 0) > order.get(simple["schedule"], 0)
        and better["bubble"] >= simple["bubble"]
    ]
    if wrong:
        raise SystemExit(f"bubbles must be within {tolerance:.0%} of theory, and in its order: {'; '.join(wrong)}")


@benchmark("bubble", help="the bubbles of pipeline schedules beside theory, with stages that only sleep", ranks=4)
def bubble(
    here: Session,
    schedules: Annotated[Sequence[str], SCHEDULES] = tuple(SCHEDULES),
    micro_batches: Sequence[int] = (8,),
    unit_ms: Annotated[float, "a rank's sleep for a forward"] = 200.0,
    rounds: int = 3,
    tolerance: Annotated[float, "the largest relative difference to theory"] = 0.2,
) -> None:
    """Measures each schedule."""
    records = here.records("bubble")
    timelines: dict[int, dict[str, Timeline]] = {count: {} for count in micro_batches}
    with here.progress("schedules", len(micro_batches) * len(schedules)) as tick:
        for count, name in product(micro_batches, schedules):
            per_rank = max(SCHEDULES[name].min_stages, 2 if SCHEDULES[name].max_stages is None else 1)
            ranks = here.world_size
            schedule = plan_pipeline(name, ranks * per_rank, ranks, count, stages_per_rank=per_rank)
            record, timelines[count][name] = measure(here, schedule, unit_ms / 1e3, rounds)
            records.add(record)
            tick()
    records.show(
        "idle share of the ranks", "schedule stages_per_rank micro_batches bubble theory bubble_of_theory step_s"
    )
    if here.is_main:
        for count, runs in timelines.items():
            plots.pipelines(runs, here.out / f"{count}-micro-batches.png")
        check(records, tolerance)
