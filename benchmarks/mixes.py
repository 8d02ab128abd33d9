"""Mixes of axes side by side: the same training on each, its memory, and the bytes that its axes move.

    torchrun --nproc-per-node=8 -m benchmarks.mixes --out results/mixes

Each mix trains the same model on the same batches, and its losses are those of one process, or the program fails. A mix
is written as its axes' sizes, with a schedule where it has stages, and `experts=8` where the model has some:
"pp=2,dp_shard=4,schedule=gpipe". A mix that is given must multiply to the number of ranks.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks import plots
from benchmarks.bubble import theory_of
from benchmarks.measure import Lines, progress
from benchmarks.session import session
from benchmarks.train import SIZES, add_recipe, recipe_of
from benchmarks.training import Recipe, allowed_difference, train_alone, train_together, worst_difference
from ringattn.parallel import build_mesh

OF_EIGHT = (
    "dp_replicate=8",
    "dp_shard=8",
    "ring=8",
    "ulysses=8",
    "ring=4,ulysses=2",
    "dp_replicate=2,ring=4",
    "dp_shard=2,ring=4",
    "ring=2,tp=4",
    "dp_shard=2,ring=2,tp=2",
    "pp=4,ring=2",
    "pp=2,ring=2,tp=2",
    "pp=2,ring=4,schedule=interleaved-1f1b",
    "pp=2,ring=4,schedule=zbv-zero-bubble",
    "ring=8,experts=8",
    "ring=8,ep=8,experts=8",
    "pp=2,dp_shard=2,ring=2,ep=4,experts=8",
)
MIB = 2**20


@dataclass(frozen=True)
class Mix:
    """A mix by its name."""

    name: str

    @property
    def sizes(self) -> dict[str, int]:
        """Of its axes."""
        return {name: int(value) for name, value in self._parts.items() if name in SIZES}

    def given(self, args: argparse.Namespace) -> argparse.Namespace:
        """The flags, with what the mix says itself."""
        own = {name: value for name, value in self._parts.items() if name not in SIZES}
        experts = {"experts": int(own.pop("experts"))} if "experts" in own else {}
        return argparse.Namespace(**{**vars(args), **own, **experts})

    @property
    def _parts(self) -> dict[str, str]:
        return dict(part.split("=") for part in self.name.split(","))


def known(name: str) -> Mix:
    """Returns a mix by its name."""
    parts = [part.partition("=") for part in name.split(",")]
    wrong = [key for key, _, value in parts if key not in (*SIZES, "schedule", "experts") or not value]
    wrong += [key for key, _, value in parts if key != "schedule" and not value.isdigit()]
    if wrong:
        raise argparse.ArgumentTypeError(f"{name}: {wrong[0]} must be an axis with its size, schedule, or experts")
    return Mix(name)


def table(records: Sequence[dict[str, Any]]) -> Table:
    """Returns what was measured as a table; what is sent is the mean over ranks."""
    everything = dict.fromkeys(axis for record in records for axis in record["sent"])
    axes = [axis for axis in everything if max(sent_mib(record, axis) for record in records) >= 0.005]
    title = "MiB: weights and optimizer state, beyond that in a step (the fullest rank); sent by a rank in a step"
    shown = Table("mix", "loss", "tokens/s", "state", "peak", *axes, "bubble", "theory", title=title)
    for r in records:
        moved = [f"{sent_mib(r, axis):.2f}" if axis in r["sent"] else "" for axis in axes]
        bubble = ["", ""] if r["theory"] is None else [f"{r['bubble']:.0%}", f"{r['theory']:.0%}"]
        memory = (f"{max(r['state_mib']):.2f}", f"{max(r['peak_mib']):.2f}")
        shown.add_row(r["mix"], f"{r['difference']:.0e}", f"{r['tokens_per_s']:,.0f}", *memory, *moved, *bubble)
    return shown


def sent_mib(record: dict[str, Any], axis: str) -> float:
    """Returns what a rank sends along an axis in a step, the mean over ranks."""
    by_operation: dict[str, list[int]] = record["sent"].get(axis, {})
    return sum(statistics.mean(counts) for counts in by_operation.values()) / MIB


def main() -> None:
    """Measures by flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixes", nargs="+", type=known, default=[Mix(name) for name in OF_EIGHT])
    add_recipe(parser)
    parser.set_defaults(context=256, sequences=8, steps=3, layers=4, dim=64, heads=8, kv_heads=4)
    parser.add_argument("--out", type=Path, default=Path("results/mixes"))
    args = parser.parse_args()
    with session() as here:
        lines = Lines(args.out / "mixes.jsonl") if here.rank == 0 else None
        alone: dict[Recipe, Any] = {}
        records = []
        with progress("steps", len(args.mixes) * args.steps, here.rank == 0) as tick:
            for mix in args.mixes:
                recipe, mesh = recipe_of(mix.given(args), mix.sizes), build_mesh(**mix.sizes)
                run = train_together(here, recipe, mesh, tick)
                if lines is None:
                    continue
                if recipe not in alone:
                    alone[recipe] = train_alone(here, recipe, lambda: None)
                course = recipe.course(mesh)
                shown = {key: value for key, value in asdict(run).items() if key != "actions"}
                record = {
                    "mix": mix.name,
                    "tokens": recipe.corpus.tokens,
                    "difference": worst_difference(run, alone[recipe]),
                    "allowed": allowed_difference(here, recipe, alone[recipe]),
                    "bubble": statistics.median(run.bubbles[1:] or run.bubbles) if run.bubbles else None,
                    "theory": None if course is None else theory_of(run.actions, course),
                    **shown,
                }
                records.append(record)
                lines.add(record)
        if lines is not None:
            Console(width=190).print(table(records))
            plots.mixes(lines.path, args.out / "mixes.png")
            print(f"picture: {args.out / 'mixes.png'}")
            if wrong := [r["mix"] for r in records if not r["difference"] < r["allowed"]]:
                raise SystemExit(f"losses differ from those of one process by more than rounding: {', '.join(wrong)}")
        dist.barrier()


if __name__ == "__main__":
    main()
