"""The goals of the kernels, checked against the records of `kernels`.

    python -m benchmarks goals results/kernels/kernels.jsonl [more.jsonl ...]

Prints each goal, the measured value and whether it is met. Exits with 1 if a goal is missed, or if no goal was
measured. If several records belong to a goal, the worst one counts.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kernel_baselines import DENSE_MASK, PADDED
from benchmarks.registry import benchmark
from benchmarks.runner import Record, Session

# Records that agree in these fields took turns with each other.
_SAME_RUN = ("file", "device", "case", "seq_len", "dtype", "heads", "kv_heads", "head_dim", "backward", "threads")
MET, MISSED, UNKNOWN = "met", "MISSED", "not measured"


@dataclass(frozen=True)
class Goal:
    """A minimum for one contender.

    Args:
        about: a description.
        contender: whose records count.
        where: the values that its records must have; a tuple allows each of its values.
        beside: the baselines, of which the fastest of a run counts: names of contenders, or of torch's ways, such as
            "padded" for "torch, padded". Without baselines, the value is the rate by area relative to the dense one.
        minimum: of the speedup over the baseline, or of the relative rate.
    """

    about: str
    contender: str
    where: Mapping[str, Any]
    beside: tuple[str, ...]
    minimum: float

    def applies(self, record: Record) -> bool:
        allowed = {name: value if isinstance(value, tuple) else (value,) for name, value in self.where.items()}
        return record["contender"] == self.contender and all(record.get(name) in allowed[name] for name in allowed)

    def value(self, record: Record, run: Sequence[Record]) -> float | None:
        """Returns the value of a record among all records of its run; None if it is unknown."""
        if not self.beside:
            return record.get("of_dense")
        baselines = [r for r in run if r["contender"] in self.beside or self._is_way_of_torch(r)]
        if not baselines:
            return None
        best = min(baselines, key=lambda r: r["median_s"])
        return float(statistics.median(a / b for a, b in zip(best["rounds_s"], record["rounds_s"], strict=True)))

    def _is_way_of_torch(self, record: Record) -> bool:
        return record.get("kind") == "torch" and record["contender"].partition(", ")[2] in self.beside


_ON_GPU = {"case": "causal", "dtype": "bfloat16", "head_dim": 128, "seq_len": (16384, 65536)}
_ON_CPU = {"case": "causal", "seq_len": 8192, "head_dim": (64, 128)}
_PACKED = {"case": "packed", "seq_len": 65536}
# In shorter sequences documents are short, too, and edges are a large part of any window.
_SPARSE = {"case": ("window", "packed"), "seq_len": (8192, 16384, 65536)}
_WRAPPED = {
    "flash2": "flash-attn 2",
    "flash3": "flash-attn 3",
    "flash4": "flash-attn 4",
    "cudnn": "torch cudnn",
    "sdpa": "torch flash",
}
_NATIVE = (("float32", False, 1.0), ("float32", True, 1.0), ("bfloat16", False, 1.6), ("bfloat16", True, 1.3))


def _goals() -> Iterable[Goal]:
    for backward, minimum in ((False, 0.75), (True, 0.7)):
        where, best = {**_ON_GPU, "backward": backward}, ("torch flash", "torch cudnn")
        yield Goal(f"dense causal {_PASS[backward]} on GPUs", "triton", where, best, minimum)
    for name, wrapped in _WRAPPED.items():
        yield Goal("beside the kernel that it wraps", name, _ON_GPU, (wrapped,), 0.95)
    for backward in (False, True):
        where = {**_PACKED, "backward": backward}
        yield Goal(f"packed documents {_PASS[backward]}", "triton", where, (DENSE_MASK, PADDED), 1.5)
    for name in ("triton", "native"):
        yield Goal("windows and packed documents, rate by area over the dense rate", name, _SPARSE, (), 0.85)
    for dtype, backward, minimum in _NATIVE:
        where = {**_ON_CPU, "dtype": dtype, "backward": backward}
        yield Goal(f"{dtype} dense causal {_PASS[backward]} on CPUs", "native", where, ("torch",), minimum)


_PASS = {False: "forward", True: "backward"}
GOALS = tuple(_goals())


@dataclass(frozen=True)
class Verdict:
    """A goal, the worst measured value (None if there is none), and the number of records."""

    goal: Goal
    value: float | None
    num_records: int

    @property
    def word(self) -> str:
        if self.value is None:
            return UNKNOWN
        return MET if self.value >= self.goal.minimum else MISSED


def judge(goals: Sequence[Goal], records: Iterable[Record]) -> list[Verdict]:
    """Returns a verdict for each goal."""
    runs: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if "contender" in record and "left_out" not in record:
            runs.setdefault(tuple(record.get(name) for name in _SAME_RUN), []).append(record)
    verdicts = []
    for goal in goals:
        values = [goal.value(record, run) for run in runs.values() for record in run if goal.applies(record)]
        known = [value for value in values if value is not None]
        verdicts.append(Verdict(goal, min(known, default=None), len(known)))
    return verdicts


@benchmark("goals", help="the goals of the kernels, beside the records of the benchmark `kernels`")
def goals(here: Session, results: Sequence[Path]) -> None:
    """Prints a verdict for each goal."""
    records = [{**json.loads(line), "file": str(path)} for path in results for line in path.read_text().splitlines()]
    verdicts, table = judge(GOALS, records), here.records("goals")
    for verdict in verdicts:
        goal, found = verdict.goal, {"worst": verdict.value, "records": verdict.num_records, "verdict": verdict.word}
        table.add(
            {"kernel": goal.contender, "goal": goal.about, "beside": list(goal.beside), "minimum": goal.minimum}, found
        )
    table.show("goals of the kernels", "kernel goal beside minimum worst records verdict")
    counts = Counter(verdict.word for verdict in verdicts)
    print(", ".join(f"{counts[word]} {word}" for word in (MET, MISSED, UNKNOWN)))
    if counts[MISSED] or not counts[MET]:
        raise SystemExit(1)
