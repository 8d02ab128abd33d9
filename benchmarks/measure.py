"""Measuring: contenders side by side in one run, and memory counted at the allocator."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@dataclass(frozen=True)
class Contender:
    """One way to do a piece of work.

    work: does it once on this rank; None where this rank only waits for the others.
    threads: how many threads of torch each working rank uses.
    """

    name: str
    work: Callable[[], object] | None
    threads: int


def race(contenders: list[Contender], rounds: int, warmup: int, tick: Callable[[], None]) -> dict[str, list[float]]:
    """Returns the seconds of each contender in each round; all ranks call it together.

    Contenders take turns within a round, so that what disturbs the machine disturbs them alike. A time runs from
    the moment when all ranks are ready until all are done.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number in range(warmup + rounds):
        # Every other round goes backwards: nobody always comes after the same one.
        for contender in contenders if number % 2 else reversed(contenders):
            torch.set_num_threads(contender.threads)
            dist.barrier()
            start = time.perf_counter()
            if contender.work is not None:
                contender.work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            dist.barrier()
            if number >= warmup:
                seconds[contender.name].append(time.perf_counter() - start)
            tick()
    return seconds


def ratio(seconds: Mapping[str, list[float]], baseline: str, name: str) -> float:
    """Returns how many times faster `name` is than `baseline`: the median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(seconds[baseline], seconds[name], strict=True))


def peak_bytes(work: Callable[[], object]) -> int:
    """Returns the most memory that `work` held at once beyond what was there before, in bytes.

    On CUDA it is the allocator's own peak; on the CPU it is summed up from the profiler's allocation events.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@contextmanager
def progress(title: str, total: int, visible: bool) -> Iterator[Callable[[], None]]:
    """Shows a progress bar on one rank; yields what moves it on by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not visible) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


class Lines:
    """Results as JSON lines in a file that the first one creates."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def add(self, record: Mapping[str, Any]) -> None:
        """Appends one record."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
