"""The main job: train a small byte-level transformer on real text, on any mix of axes, beside one process.

    torchrun --nproc-per-node=2 -m benchmarks.train --context 16384 --steps 8 --out results/demo
    torchrun --nproc-per-node=8 -m benchmarks.train --pp 2 --ring 2 --tp 2 --documents 300 --context 1024

The text is the Python standard library's own source. First all ranks train together, as a ring if no axis is given;
then rank 0 trains the same model on the same batches by itself, with torch's own attention and as many threads as
there are ranks. Both losses are printed step by step: they are equal to rounding, or the program fails. steps.jsonl has
a line for each step, train.jsonl one for each run: memory of each rank, and the bytes that each sends in a step, by
axis. Pictures go to --out, too: the losses, and one ring step or what each stage did when. On GPUs it runs unchanged,
over NCCL.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import plots
from benchmarks.bubble import theory_of
from benchmarks.corpus import VOCABULARY, Corpus
from benchmarks.measure import Lines, progress
from benchmarks.session import Session, session
from benchmarks.timeline import record
from benchmarks.training import (
    LAYOUTS,
    Recipe,
    Run,
    allowed_difference,
    train_alone,
    train_together,
    worst_difference,
)
from ringattn.parallel import DecoderConfig, MoESpec, build_mesh, describe_mesh
from ringattn.parallel.mesh import AXES, EXPERT_AXIS
from ringattn.parallel.pipeline_schedule import SCHEDULES

SIZES = tuple(axis.name for axis in (*AXES, EXPERT_AXIS))
DTYPES = ("float64", "float32", "bfloat16", "float16")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of what is trained."""
    parser.add_argument("--context", type=int, default=16384, help="tokens in a sequence, over all ranks")
    parser.add_argument("--sequences", type=int, help="in a batch; one for each share and micro-batch if not given")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--experts", type=int, default=0, help="in each layer; 0 is a dense model")
    parser.add_argument("--top-k", type=int, default=2, help="experts that a token goes to")
    parser.add_argument("--window", type=int, help="how many tokens before itself a token sees; all if not given")
    parser.add_argument("--documents", type=int, help="mean length of packed documents; not packed if not given")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--layout", choices=LAYOUTS, default="zigzag")
    parser.add_argument("--micro-batches", type=int, help="parts of a batch; as many as stages if not given")
    parser.add_argument("--schedule", choices=SCHEDULES, default="1f1b", help="of stages")
    parser.add_argument("--zero", type=int, choices=(0, 2, 3), default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and of computing")
    parser.add_argument("--compile", action="store_true", help="layers; feed-forwards only with --documents")
    parser.add_argument("--backend", help="a kernel out of `ringattn info`; the first that can if not given")


def recipe_of(args: argparse.Namespace, sizes: Mapping[str, int]) -> Recipe:
    """Returns what the flags say is trained; on a mix of these sizes, where they leave that open."""
    micro_batches = args.micro_batches or sizes.get("pp", 1)
    shares = sizes.get("dp_replicate", 1) * sizes.get("dp_shard", 1)
    hidden = 3 * args.dim
    return Recipe(
        DecoderConfig(
            vocab_size=VOCABULARY,
            num_layers=args.layers,
            dim=args.dim,
            num_heads=args.heads,
            num_kv_heads=args.kv_heads,
            hidden=hidden,
            moe=MoESpec(args.experts, args.top_k, hidden // args.top_k) if args.experts else None,
        ),
        Corpus(args.context, args.sequences or shares * micro_batches, args.steps, args.window, args.documents),
        micro_batches,
        args.schedule,
        args.layout,
        args.zero,
        getattr(torch, args.dtype),
        args.lr,
        args.compile,
        args.backend,
    )


def main() -> None:
    """Trains by flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=1, help="ranks along this axis")
    add_recipe(parser)
    parser.add_argument("--out", type=Path, default=Path("results/demo"))
    args = parser.parse_args()
    with session() as here:
        sizes = {name: size for name in SIZES if (size := getattr(args, name)) != 1} or {"ring": here.world_size}
        recipe = recipe_of(args, sizes)
        mesh = build_mesh(**sizes)
        if here.rank == 0:
            print(describe_mesh(mesh))
        with progress(f"{here.world_size} ranks   ", args.steps, here.rank == 0) as tick:
            ring = train_together(here, recipe, mesh, tick)
        only_ring = list(sizes) == ["ring"]
        spans = record(here, LAYOUTS[args.layout](args.context, here.world_size), recipe.config) if only_ring else []
        if here.rank == 0:
            with progress("1 process ", args.steps, True) as tick:
                single = train_alone(here, recipe, tick)
            course = recipe.course(mesh)
            theory = None if course is None else theory_of(ring.actions, course)
            report(args, here, recipe, ring, single, {"mix": sizes, "theory": theory})
            named = ", ".join(f"{name} {size}" for name, size in sizes.items())
            plots.losses(ring.losses, single.losses, named, args.out / "losses.png")
            if only_ring:
                plots.timeline(spans, args.out / "timeline.png")
            elif course is not None:
                moves = [[action for action in of_rank if action.op.kind != "L"] for of_rank in ring.actions]
                plots.pipelines({args.schedule: moves}, args.out / "timeline.png")
            print("pictures:", ", ".join(map(str, sorted(args.out.glob("*.png")))))
            check(here, recipe, ring, single)
        dist.barrier()


def report(
    args: argparse.Namespace, here: Session, recipe: Recipe, ring: Run, single: Run, mix: Mapping[str, Any]
) -> None:
    """Prints and writes what both runs showed."""
    steps = Lines(args.out / "steps.jsonl")
    name = f"{here.world_size} ranks"
    staged = mix["theory"] is not None
    bubble = f"  {'bubble':>7}  {'theory':>7}" if staged else ""
    print(f"{'step':>4}  {name:>10}  {'1 process':>10}  {'difference':>10}  {'tokens/s':>10}{bubble}")
    for step, (loss, other, seconds) in enumerate(zip(ring.losses, single.losses, ring.seconds, strict=True)):
        speed, measured = recipe.corpus.tokens / seconds, ring.bubbles[step] if staged else None
        bubble = f"  {measured:>7.1%}  {mix['theory']:>7.1%}" if measured is not None else ""
        print(f"{step:>4}  {loss:>10.6f}  {other:>10.6f}  {loss - other:>10.1e}  {speed:>10,.0f}{bubble}")
        steps.add({"step": step, "loss": loss, "one_process": other, "tokens_per_s": speed, "bubble": measured})
    lines = Lines(args.out / "train.jsonl")
    for title, run in ((name, ring), ("1 process", single)):
        shown = {key: value for key, value in asdict(run).items() if key != "actions"}
        lines.add({"run": title, **mix, "context": args.context, "sequences": recipe.corpus.sequences, **shown})
        peaks, states = (", ".join(f"{mib:,.1f}" for mib in of_ranks) for of_ranks in (run.peak_mib, run.state_mib))
        print(f"{title:>10}: {run.tokens_per_s:>8,.0f} tokens/s; memory by rank, MiB: peak of a step {peaks}, ", end="")
        print(f"beyond weights and optimizer state {states}")
    for axis, by_operation in ring.sent.items():
        told = ", ".join(f"{max(counts):,} by {operation}" for operation, counts in by_operation.items())
        print(f"{axis:>12}: {told}: bytes of a step, of the rank that sends most")


def check(here: Session, recipe: Recipe, ring: Run, single: Run) -> None:
    """Fails if the losses of the two runs differ by more than rounding."""
    worst, allowed = worst_difference(ring, single), allowed_difference(here, recipe, single)
    corpus = recipe.corpus
    print(f"{corpus.steps} steps, {corpus.context:,} tokens of context: losses equal to {worst:.1e} (relative)")
    if not worst < allowed:
        raise SystemExit(f"the losses of the two runs differ by more than rounding, {allowed:.1e}")


if __name__ == "__main__":
    main()
