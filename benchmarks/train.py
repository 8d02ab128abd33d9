"""Trains a small byte-level transformer on real text, on any mix of mesh axes, beside one process.

    python -m benchmarks train --ranks 2 --context 16384 --steps 8 --out results/demo
    python -m benchmarks train --ranks 8 --pp 2 --ring 2 --tp 2 --documents 300 --context 1024
    python -m benchmarks mixes --mixes ring=8 pp=2,ring=4,schedule=gpipe dp_shard=8,ep=8,experts=8

The text is the source of Python's standard library. All ranks train together, as a ring if no axis is given. Then rank
0 trains the same model on the same batches alone, with torch's own attention and a thread for each rank. The losses
must agree up to rounding, else the program exits with an error. `train` writes a line for each step to steps.jsonl, and
one for each run to train.jsonl: the memory of each rank, and the bytes that each sends in a step, by axis. `mixes`
compares mixes of axes; a mix lists the sizes of its axes, and may name a schedule and a number of experts.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from torch.distributed.device_mesh import DeviceMesh

from benchmarks import plots, timeline
from benchmarks.bubble import theoretical_bubble
from benchmarks.inputs import LAYOUTS, Shape
from benchmarks.registry import benchmark
from benchmarks.runner import Session
from benchmarks.training import Recipe, Run, allowed_difference, train_alone, train_together
from ringattn import causal
from ringattn.parallel import PipelineSchedule, build_mesh, describe_mesh
from ringattn.parallel.mesh import AXES, EXPERT_AXIS

AXIS_NAMES = tuple(axis.name for axis in (*AXES, EXPERT_AXIS))


@dataclass(frozen=True)
class AxisSizes:
    """The number of ranks along each axis."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1
    ep: int = 1


ONLY_RING, DEMO = AxisSizes(), Recipe()


def _theory(run: Run, schedule: PipelineSchedule | None) -> float | None:
    return None if schedule is None else theoretical_bubble(run.ops, schedule)


@benchmark("train", help="trains a small decoder on any mix of axes, beside one process (the demo)", ranks=2)
def train(here: Session, axes: AxisSizes = ONLY_RING, recipe: Recipe = DEMO) -> None:
    """Trains on one mix."""
    sizes = {name: size for name, size in asdict(axes).items() if size != 1} or {"ring": here.world_size}
    recipe, mesh, only_ring = recipe.on(sizes), build_mesh(**sizes), list(sizes) == ["ring"]
    here.print(describe_mesh(mesh))
    with here.progress(f"{here.world_size} ranks   ", recipe.steps) as tick:
        together = train_together(here, recipe, mesh, tick)
    spans = []
    if only_ring:
        layout = LAYOUTS[recipe.layout](causal(), recipe.context, here.world_size)
        shape = Shape(recipe.heads, recipe.kv_heads, recipe.dim // recipe.heads, "float32")
        spans = timeline.record(here, layout, shape)
    if not here.is_main:
        return
    with here.progress("1 process ", recipe.steps) as tick:
        alone = train_alone(here, recipe, tick)
    schedule = recipe.pipeline(mesh)
    runs = {f"{here.world_size} ranks": together, "1 process": alone}
    _report(here, recipe, runs, sizes, _theory(together, schedule))
    name = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    plots.losses(together.losses, alone.losses, name, here.out / "losses.png")
    if only_ring:
        plots.timeline(spans, here.out / "timeline.png")
    elif schedule is not None:
        ops = [[op for op in of_rank if op.op.kind != "L"] for of_rank in together.ops]
        plots.pipelines({recipe.schedule: ops}, here.out / "timeline.png")
    worst, allowed = together.worst_difference(alone), allowed_difference(here, recipe, alone)
    print(f"{recipe.steps} steps, {recipe.context:,} tokens of context: losses equal to {worst:.1e} (relative)")
    if not worst < allowed:
        raise SystemExit(f"the losses of the two runs differ by more than rounding, {allowed:.1e}")


def _report(
    here: Session, recipe: Recipe, runs: Mapping[str, Run], mix: Mapping[str, int], theory: float | None
) -> None:
    steps, records = here.records("steps"), here.records("train")
    together, alone = runs.values()
    for step, (loss, other, seconds) in enumerate(zip(together.losses, alone.losses, together.seconds, strict=True)):
        losses = {"step": step, "loss": loss, "one_process": other, "difference": loss - other}
        bubble = {"bubble": together.bubbles[step], "theory": theory} if together.bubbles else {}
        steps.add(losses, {"tokens_per_s": recipe.corpus.tokens / seconds}, bubble)
    steps.show("losses", "step loss:.6f one_process:.6f difference tokens_per_s bubble theory")
    for name, run in runs.items():
        sizes = {"run": name, "mix": mix, "context": recipe.context, "sequences": recipe.sequences, "theory": theory}
        records.add(sizes, run.record())
    records.show(
        "memory of each rank: peak of a step beyond weights and optimizer state", "run tokens_per_s peak_mib state_mib"
    )
    for axis, by_operation in together.sent.items():
        counts = ", ".join(f"{max(counts):,} by {operation}" for operation, counts in by_operation.items())
        print(f"{axis:>12}: {counts}: bytes of a step, of the rank that sends most")


@dataclass(frozen=True)
class Mix:
    """A mix of axes, by its name, such as pp=2,ring=4,schedule=gpipe,experts=8."""

    name: str

    def __post_init__(self) -> None:
        for key, _, value in (part.partition("=") for part in self.name.split(",")):
            if key not in (*AXIS_NAMES, "schedule", "experts") or not (value if key == "schedule" else value.isdigit()):
                raise ValueError(f"{self.name}: {key} must be an axis with its size, schedule, or experts")

    @property
    def _parts(self) -> dict[str, str]:
        return dict(part.split("=") for part in self.name.split(","))

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of its axes."""
        return {name: int(size) for name, size in self._parts.items() if name in AXIS_NAMES}

    def mesh(self) -> DeviceMesh:
        sizes: dict[str, Any] = dict(self.sizes)
        return build_mesh(**sizes)

    def applied_to(self, recipe: Recipe) -> Recipe:
        """Returns the recipe with the mix's schedule and experts."""
        parts = self._parts
        schedule, experts = parts.get("schedule", recipe.schedule), int(parts.get("experts", recipe.experts))
        return replace(recipe, schedule=schedule, experts=experts).on(self.sizes)


MIXES_OF_8 = (
    "dp_replicate=8", "dp_shard=8", "ring=8", "ulysses=8", "ring=4,ulysses=2", "dp_replicate=2,ring=4",
    "dp_shard=2,ring=4", "ring=2,tp=4", "dp_shard=2,ring=2,tp=2", "pp=4,ring=2", "pp=2,ring=2,tp=2",
    "pp=2,ring=4,schedule=interleaved-1f1b", "pp=2,ring=4,schedule=zbv-zero-bubble", "ring=8,experts=8",
    "ring=8,ep=8,experts=8", "pp=2,dp_shard=2,ring=2,ep=4,experts=8",
)  # fmt: skip
DEFAULT_MIXES = tuple(map(Mix, MIXES_OF_8))
SMALL = Recipe(context=256, sequences=8, steps=3, layers=4, dim=64, heads=8, kv_heads=4)


def _mix_record(here: Session, mix: Mix, recipe: Recipe, run: Run, alone: Run, theory: float | None) -> dict[str, Any]:
    sent = {axis: sum(statistics.mean(counts) for counts in by.values()) / 2**20 for axis, by in run.sent.items()}
    return {
        "mix": mix.name,
        "tokens": recipe.corpus.tokens,
        "difference": run.worst_difference(alone),
        "allowed": allowed_difference(here, recipe, alone),
        "bubble": statistics.median(run.bubbles[1:] or run.bubbles) if run.bubbles else None,
        "theory": theory,
        "max_state_mib": max(run.state_mib),
        "max_peak_mib": max(run.peak_mib),
        "sent_mib": {axis: mib for axis, mib in sent.items() if mib >= 0.005},  # losses and norms are less
        **run.record(),
    }


@benchmark("mixes", help="training on mixes of axes: memory, and the bytes that each axis sends", ranks=8)
def mixes(here: Session, mixes: Annotated[Sequence[Mix], Mix] = DEFAULT_MIXES, recipe: Recipe = SMALL) -> None:
    """Trains on each mix; its axes must multiply to the number of ranks. `sent_mib` is the mean over ranks."""
    alone: dict[Recipe, Run] = {}
    records = here.records("mixes")
    with here.progress("steps", len(mixes) * recipe.steps) as tick:
        for mix in mixes:
            mixed, mesh = mix.applied_to(recipe), mix.mesh()
            run = train_together(here, mixed, mesh, tick)
            if here.is_main:
                alone[mixed] = alone.get(mixed) or train_alone(here, mixed)
                theory = _theory(run, mixed.pipeline(mesh))
                records.add(_mix_record(here, mix, mixed, run, alone[mixed], theory))
    columns = "mix difference tokens_per_s max_state_mib max_peak_mib sent_mib bubble theory"
    records.show("memory: weights and optimizer state, and the peak of a step beyond them", columns)
    if here.is_main:
        plots.mixes(records, here.out / "mixes.png")
    if wrong := [r["mix"] for r in records if not r["difference"] < r["allowed"]]:
        raise SystemExit(f"losses differ by more than rounding from the run in one process: {', '.join(wrong)}")
