"""What the kernels are meant to reach, as data, beside what was measured.

    python -m benchmarks.goals results/kernels/kernels.jsonl [more.jsonl ...]

Prints each goal, what was measured and whether it is met; exits with 1 if one is missed, or if nothing was measured
for any. Where several records belong to one goal, the worst of them counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.kernel_rivals import DENSE_MASK, PADDED

Record = Mapping[str, Any]

# What makes two records contenders of one race.
_RACE = ("file", "device", "case", "seq_len", "dtype", "heads", "kv_heads", "head_dim", "backward", "threads")


@dataclass(frozen=True)
class Goal:
    """One thing to reach.

    Args:
        about: for people.
        contender: whose records count.
        where: what these records hold; a tuple means one of these.
        measured: what to take from a record and all records of its race; None if nothing can be said.
        least: what must be reached.
    """

    about: str
    contender: str
    where: Mapping[str, Any]
    measured: Callable[[Record, Sequence[Record]], float | None]
    least: float

    def applies(self, record: Record) -> bool:
        """Whether a record counts."""
        if record.get("contender") != self.contender or "left_out" in record:
            return False
        wanted = {name: value if isinstance(value, tuple) else (value,) for name, value in self.where.items()}
        return all(record.get(name) in values for name, values in wanted.items())


def beside(*names: str) -> Callable[[Record, Sequence[Record]], float | None]:
    """Measures how many times faster a record is than the fastest contender with one of these names in its race."""

    def measured(record: Record, race: Sequence[Record]) -> float | None:
        rivals = [r for r in race if r["contender"] in names]
        return _times_faster(record, rivals)

    return measured


def beside_torch(ways: tuple[str, ...]) -> Callable[[Record, Sequence[Record]], float | None]:
    """Measures the same beside those of torch's ways whose names end in one of `ways`."""

    def measured(record: Record, race: Sequence[Record]) -> float | None:
        rivals = [r for r in race if r.get("kind") == "torch" and r["contender"].endswith(ways)]
        return _times_faster(record, rivals)

    return measured


def _times_faster(record: Record, rivals: Sequence[Record]) -> float | None:
    if not rivals:
        return None
    best = min(rivals, key=lambda r: r["median_s"])
    return float(statistics.median(a / b for a, b in zip(best["rounds_s"], record["rounds_s"], strict=True)))


def of_dense(record: Record, race: Sequence[Record]) -> float | None:
    """Measures the rate for each unit of area beside the dense causal one."""
    value: float | None = record.get("of_dense")
    return value


MET, MISSED, UNKNOWN = "met", "MISSED", "not measured"
_TORCH = beside("torch flash", "torch cudnn")
_ON_GPU = {"case": "causal", "dtype": "bfloat16", "head_dim": 128, "seq_len": (16384, 65536)}
_ON_CPU = {"case": "causal", "seq_len": 8192, "head_dim": (64, 128)}
# In short sequences documents are short, too, and edges are a large part of any window.
_EVEN = {"case": ("window", "packed"), "seq_len": (8192, 16384, 65536)}

GOALS = (
    Goal("Triton, dense causal forward, beside torch's best", "triton", {**_ON_GPU, "backward": False}, _TORCH, 0.75),
    Goal("Triton, dense causal backward, beside torch's best", "triton", {**_ON_GPU, "backward": True}, _TORCH, 0.7),
    *(
        Goal(f"the adapter {adapter}, beside the kernel it wraps", adapter, _ON_GPU, beside(wrapped), 0.95)
        for adapter, wrapped in (
            ("flash2", "flash-attn 2"),
            ("flash3", "flash-attn 3"),
            ("flash4", "flash-attn 4"),
            ("cudnn", "torch cudnn"),
            ("sdpa", "torch flash"),
        )
    ),
    *(
        Goal(
            f"packed documents {name}, {backend}, beside torch padded or with a dense mask",
            backend,
            {"case": "packed", "seq_len": 65536, "backward": backward},
            beside_torch((DENSE_MASK, PADDED)),
            1.5,
        )
        for backend in ("triton",)
        for name, backward in (("forward", False), ("backward", True))
    ),
    *(
        Goal(f"windows and packed documents as fast by area as dense, {backend}", backend, _EVEN, of_dense, 0.85)
        for backend in ("triton", "native")
    ),
    *(
        Goal(
            f"native {dtype} dense causal {name}, beside torch",
            "native",
            {**_ON_CPU, "dtype": dtype, "backward": backward},
            beside("torch"),
            least,
        )
        for dtype, name, backward, least in (
            ("float32", "forward", False, 1.0),
            ("float32", "backward", True, 1.0),
            ("bfloat16", "forward", False, 1.6),
            ("bfloat16", "backward", True, 1.3),
        )
    ),
)


@dataclass(frozen=True)
class Verdict:
    """A goal, the worst that was measured for it (None if nothing was), and of how many records."""

    goal: Goal
    value: float | None
    num_records: int

    @property
    def told(self) -> str:
        """For people."""
        if self.value is None:
            return UNKNOWN
        return MET if self.value >= self.goal.least else MISSED


def judge(goals: Sequence[Goal], records: Iterable[Record]) -> list[Verdict]:
    """Returns a verdict for each goal; of several records the worst counts."""
    races: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if "contender" in record and "left_out" not in record:
            races.setdefault(tuple(record.get(name) for name in _RACE), []).append(record)
    verdicts = []
    for goal in goals:
        values = [goal.measured(record, race) for race in races.values() for record in race if goal.applies(record)]
        known = [value for value in values if value is not None]
        verdicts.append(Verdict(goal, min(known, default=None), len(known)))
    return verdicts


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the verdicts and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON lines of benchmarks.kernels")
    args = parser.parse_args(argv)
    records = [
        {**json.loads(line), "file": str(path)} for path in args.results for line in path.read_text().splitlines()
    ]
    verdicts = judge(GOALS, records)
    table = Table("goal", "at least", "measured (worst)", "records", "", title="goals of the kernels")
    for verdict in verdicts:
        value = "" if verdict.value is None else f"{verdict.value:.2f}"
        table.add_row(verdict.goal.about, f"{verdict.goal.least:.2f}", value, str(verdict.num_records), verdict.told)
    Console(width=130).print(table)
    told = Counter(verdict.told for verdict in verdicts)
    print(", ".join(f"{told[word]} {word}" for word in (MET, MISSED, UNKNOWN)))
    return 0 if told[MET] and not told[MISSED] else 1


if __name__ == "__main__":
    raise SystemExit(main())
