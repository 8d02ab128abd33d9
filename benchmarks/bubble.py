"""The bubbles of pipeline schedules: what part of the time ranks idle, measured beside theory.

    torchrun --nproc-per-node=4 -m benchmarks.bubble --micro-batches 8 --out results/bubble

Stages only wait: a unit of time for a forward, one for the gradient of the input, one for that of the weights. So
what is measured is the schedule and torch's machinery; there may be more ranks than cores. A rank with two stages waits
half as long in each: the work of a rank is the same under every schedule. On a busy machine ranks wake up late; the
longer a move, the less that matters.

Beside what was measured stands theory: the same order of moves, if passing things on took no time. The program fails
where they are too far apart. Pictures show what each rank did when.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks import plots
from benchmarks.measure import Lines, progress
from benchmarks.session import Session, session
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


class _WaitBackward(torch.autograd.Function):
    """The identity, whose backward takes its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return grads[0], None


class WaitingStage(nn.Module):
    """A stage that waits, in forward, for the gradient of its input, and for that of its weight."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        """Takes (B, S) tokens or what another stage gave, and gives (B, S, 1)."""
        time.sleep(self.seconds)
        hidden = x if x.is_floating_point() else torch.zeros(*x.shape, 1)
        mixed = hidden + _wait_backward(self.weight, self.seconds)
        return _wait_backward(mixed, self.seconds).clone()  # torch detaches it in place, which a view forbids


def _wait_backward(x: Tensor, seconds: float) -> Tensor:
    waited: Tensor = _WaitBackward.apply(x, seconds)  # type: ignore[no-untyped-call]
    return waited


def measure(
    here: Session, course: PipelineSchedule, unit_s: float, rounds: int
) -> tuple[dict[str, Any], list[list[TimedOp]]]:
    """Runs a schedule; returns a record, and what each rank did. All ranks call it together.

    What is told is the quickest round: what else there is on a machine can only make one longer.
    """
    mesh = init_device_mesh(here.device.type, (here.world_size,), mesh_dim_names=("pp",))
    mine = course.stages_of(here.rank)
    stage_s = unit_s / len(mine)
    stages = [WaitingStage(stage_s) for _ in mine]
    pipeline = Pipeline(stages, course, mesh, loss_fn=lambda out, _: out.sum(), dim=1, dtype=torch.float32)
    batches = [MicroBatch(torch.zeros(1, 1, dtype=torch.int64), {}, None)] * course.num_micro_batches
    seen: list[list[list[TimedOp]]] = []
    for number in range(rounds + 1):
        dist.barrier()
        pipeline.step(batches)
        everyone: list[Any] = [None] * here.world_size
        dist.all_gather_object(everyone, [action for action in pipeline.timeline() if action.op.kind != "L"])
        if number > 0:  # torch makes its connections in the first one
            seen.append(from_the_first(everyone))
    quickest = min(seen, key=lambda actions: idle_part(actions)[0])
    step_s, bubble = idle_part(quickest)
    record = {
        "schedule": course.name,
        "ranks": here.world_size,
        "stages_per_rank": len(mine),
        "micro_batches": course.num_micro_batches,
        "unit_ms": unit_s * 1e3,
        "step_s": step_s,
        "bubble": bubble,
        "theory": theory_of(quickest, course),
    }
    return record, quickest


def theory_of(everyone: Sequence[Sequence[TimedOp]], course: PipelineSchedule) -> float:
    """Returns what part of the time ranks would idle that do the same in the same order, if only moves took time."""
    moves = [[action.op for action in actions if action.op.kind != "L"] for actions in everyone]
    return simulated_bubble(dict(enumerate(moves)), course.num_stages)


def idle_part(everyone: Sequence[Sequence[TimedOp]]) -> tuple[float, float]:
    """Returns how long a step took from its first move to its last, and what part of it ranks idled in the mean."""
    window_s = max(actions[-1].stop_s for actions in everyone)
    return window_s, statistics.mean(bubble_fraction(actions, window_s) for actions in everyone)


def from_the_first(everyone: Sequence[Sequence[TimedOp]]) -> list[list[TimedOp]]:
    """Clocks start at the same moment on all ranks; the step starts with the first rank's first move."""
    zero = everyone[0][0].start_s
    return [[TimedOp(move, start - zero, stop - zero) for move, start, stop in actions] for actions in everyone]


def table(records: Sequence[dict[str, Any]]) -> Table:
    """Returns what was measured as a table."""
    shown = Table("schedule", "stages per rank", "micro-batches", "bubble", "theory", "bubble / theory", "step, s")
    for r in records:
        numbers = (f"{r['bubble']:.1%}", f"{r['theory']:.1%}", f"{r['bubble'] / r['theory']:.2f}", f"{r['step_s']:.2f}")
        shown.add_row(r["schedule"], str(r["stages_per_rank"]), str(r["micro_batches"]), *numbers)
    return shown


def check(records: Sequence[dict[str, Any]], within: float) -> None:
    """Fails if a bubble is further than a part of it from theory, or a schedule idles more than a simpler one."""
    wrong = [
        f"{r['schedule']}: {r['bubble']:.1%} beside {r['theory']:.1%}"
        for r in records
        if abs(r["bubble"] / r["theory"] - 1) > within
    ]
    ranked = {"1f1b": 0, "interleaved-1f1b": 1, "interleaved-zero-bubble": 2, "zbv-zero-bubble": 2}
    wrong += [
        f"{better['schedule']} idles {better['bubble']:.1%}, {simple['schedule']} {simple['bubble']:.1%}"
        for better in records
        for simple in records
        if better["micro_batches"] == simple["micro_batches"]
        and ranked.get(better["schedule"], 0) > ranked.get(simple["schedule"], 0)
        and better["bubble"] >= simple["bubble"]
    ]
    if wrong:
        raise SystemExit(f"bubbles are to be within {within:.0%} of theory, and in its order: {'; '.join(wrong)}")


def main() -> None:
    """Measures each schedule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES))
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8])
    parser.add_argument("--unit-ms", type=float, default=200.0, help="waiting of a rank for a forward")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--within", type=float, default=0.2, help="fails if a bubble is further from theory")
    parser.add_argument("--out", type=Path, default=Path("results/bubble"))
    args = parser.parse_args()
    with session() as here:
        courses = [
            plan_pipeline(name, here.world_size * per_rank, here.world_size, count, stages_per_rank=per_rank)
            for count in args.micro_batches
            for name in args.schedules
            for per_rank in [max(SCHEDULES[name].min_stages, 2 if SCHEDULES[name].max_stages is None else 1)]
        ]
        lines = Lines(args.out / "bubble.jsonl") if here.rank == 0 else None
        records = []
        taken: dict[int, dict[str, list[list[TimedOp]]]] = {}
        with progress("schedules", len(courses), here.rank == 0) as tick:
            for course in courses:
                record, actions = measure(here, course, args.unit_ms / 1e3, args.rounds)
                records.append(record)
                taken.setdefault(course.num_micro_batches, {})[course.name] = actions
                if lines is not None:
                    lines.add(record)
                tick()
        if here.rank == 0:
            for count, runs in taken.items():
                plots.pipelines(runs, args.out / f"{count}-micro-batches.png")
            Console().print(table(records))
            check(records, args.within)


if __name__ == "__main__":
    main()
