"""The bubbles of pipeline schedules: what part of the time ranks idle, measured beside theory.

    torchrun --nproc-per-node=4 -m benchmarks.bubble --micro-batches 8 --out results/bubble

Stages only wait: a unit of time for a forward, one for the gradient of the input, one for that of the weights. So
what is measured is the schedule and torch's machinery; there may be more ranks than cores. A rank with two stages waits
half as long in each: the work of a rank is the same under every schedule.

Beside what was measured stand the formula and an ideal: the same order of moves if passing things on took no time.
Pictures show what each rank did when.
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
from ringattn.parallel.bubble import Action, Move, bubble_formula, bubble_fraction, ideal_actions
from ringattn.parallel.pipeline import KINDS, Course, MicroBatch, Pipeline, plan_course


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


def _seconds_of(move: Move, unit_s: float) -> float:
    """How long a move waits. Of the first stage, whose input has no gradient, torch does all backward in W."""
    if move.stage == 0 and move.kind in "IW":
        return 0.0 if move.kind == "I" else 2 * unit_s
    return 2 * unit_s if move.kind == "B" else unit_s


def measure(here: Session, course: Course, unit_s: float, rounds: int) -> tuple[dict[str, Any], list[list[Action]]]:
    """Runs a schedule; returns a record, and what each rank did in the last round. All ranks call it together."""
    mesh = init_device_mesh(here.device.type, (here.world_size,), mesh_dim_names=("pp",))
    mine = course.stages_of(here.rank)
    stage_s = unit_s / len(mine)
    stages = [WaitingStage(stage_s) for _ in mine]
    pipeline = Pipeline(stages, course, mesh, loss=lambda out, _: out.sum(), dim=1, dtype=torch.float32)
    batches = [MicroBatch(torch.zeros(1, 1, dtype=torch.int64), {}, None)] * course.num_micro_batches
    fractions, windows, all_actions = [], [], []
    for number in range(rounds + 1):
        dist.barrier()
        pipeline.step(batches)
        everyone: list[Any] = [None] * here.world_size
        dist.all_gather_object(everyone, [action for action in pipeline.actions() if action.move.kind != "L"])
        if number == 0:  # torch makes its connections in the first one
            continue
        all_actions = from_the_first(everyone)
        window_s, fraction = idle_part(all_actions)
        windows.append(window_s)
        fractions.append(fraction)
    order = {rank: [action.move for action in actions] for rank, actions in enumerate(all_actions)}
    ideal = ideal_actions(order, lambda move: _seconds_of(move, stage_s), len(course.layers))
    ideal_s = max(actions[-1].stop_s for actions in ideal.values())
    record = {
        "schedule": course.schedule,
        "ranks": here.world_size,
        "stages_per_rank": len(mine),
        "micro_batches": course.num_micro_batches,
        "unit_ms": unit_s * 1e3,
        "step_s": statistics.median(windows),
        "bubble": statistics.median(fractions),
        "formula": formula_of(course),
        "ideal": statistics.mean(bubble_fraction(actions, ideal_s) for actions in ideal.values()),
    }
    return record, all_actions


def formula_of(course: Course) -> float:
    """Returns what part of the time ranks idle by theory, where F, I and W take as long."""
    waited = 1 / 3 if KINDS[course.schedule].in_parts else 1.0
    return bubble_formula(course.num_ranks, course.num_micro_batches, len(course.stages_of(0)), waited=waited)


def idle_part(everyone: Sequence[Sequence[Action]]) -> tuple[float, float]:
    """Returns how long a step took from its first move to its last, and what part of it ranks idled in the mean."""
    window_s = max(actions[-1].stop_s for actions in everyone)
    return window_s, statistics.mean(bubble_fraction(actions, window_s) for actions in everyone)


def from_the_first(everyone: Sequence[Sequence[Action]]) -> list[list[Action]]:
    """Clocks start at the same moment on all ranks; the step starts with the first rank's first move."""
    zero = everyone[0][0].start_s
    return [[Action(move, start - zero, stop - zero) for move, start, stop in actions] for actions in everyone]


def table(records: Sequence[dict[str, Any]]) -> Table:
    """Returns what was measured as a table."""
    shown = Table("schedule", "stages per rank", "micro-batches", "bubble", "formula", "ideal order", "step, s")
    for r in records:
        numbers = (f"{r['bubble']:.1%}", f"{r['formula']:.1%}", f"{r['ideal']:.1%}", f"{r['step_s']:.2f}")
        shown.add_row(r["schedule"], str(r["stages_per_rank"]), str(r["micro_batches"]), *numbers)
    return shown


def main() -> None:
    """Measures each schedule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8])
    parser.add_argument("--unit-ms", type=float, default=200.0, help="waiting of a rank for a forward")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/bubble"))
    args = parser.parse_args()
    with session() as here:
        courses = [
            plan_course(name, here.world_size * per_rank, here.world_size, count, stages_per_rank=per_rank)
            for count in args.micro_batches
            for name in args.schedules
            for per_rank in [max(KINDS[name].fewest, 2 if KINDS[name].most is None else 1)]
        ]
        lines = Lines(args.out / "bubble.jsonl") if here.rank == 0 else None
        records = []
        with progress("schedules", len(courses), here.rank == 0) as tick:
            for course in courses:
                record, actions = measure(here, course, args.unit_ms / 1e3, args.rounds)
                records.append(record)
                if lines is not None:
                    lines.add(record)
                    name = f"{course.schedule}-{course.num_micro_batches}.png"
                    plots.pipeline(actions, course.schedule, args.out / name)
                tick()
        if here.rank == 0:
            Console().print(table(records))


if __name__ == "__main__":
    main()
