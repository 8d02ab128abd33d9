"""Measuring: contenders side by side in one run, and memory counted at the allocator."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ringattn.comm.buffer_pool import clear_pools


@dataclass(frozen=True)
class Contender:
    """One way to do a piece of work.

    work: does it once on this rank; None where this rank only waits for the others.
    threads: how many threads of torch each working rank uses.
    """

    name: str
    work: Callable[[], object] | None
    threads: int


# Runs a piece of work and returns its seconds; None is the turn of a rank that only waits for the others.
Clock = Callable[[Callable[[], object] | None], float]


def of_all_ranks(work: Callable[[], object] | None) -> float:
    """Returns the seconds from the moment when all ranks are ready until all are done; all ranks call it together."""
    dist.barrier()
    start = time.perf_counter()
    if work is not None:
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - start


class OneDevice:
    """The clock of a single process: the median of several runs, as many as are needed to see short ones.

    On CUDA a run is timed by events, and begins with a second-level cache that holds nothing of the last one.

    Args:
        device: where the work runs.
    """

    LEAST_S = 0.02  # work is repeated until it has taken so long, at most so often
    MOST_RUNS = 50
    FLUSH_BYTES = 256 << 20  # several times the second-level cache of any GPU

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._flush = torch.empty(self.FLUSH_BYTES, dtype=torch.int8, device=device) if cuda else None

    def __call__(self, work: Callable[[], object] | None) -> float:
        """Returns the seconds of `work`, the median of its runs."""
        if work is None:
            raise ValueError("work=None: a process alone waits for nobody")
        times: list[float] = []
        while not times or (sum(times) < self.LEAST_S and len(times) < self.MOST_RUNS):
            times.append(self._once(work))
        return statistics.median(times)

    def _once(self, work: Callable[[], object]) -> float:
        if self._flush is None:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        # While the flush runs, the host gets ahead: its launches do not count unless they are what takes the time.
        self._flush.zero_()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def race(
    contenders: Sequence[Contender], rounds: int, warmup: int, tick: Callable[[], None], clock: Clock = of_all_ranks
) -> dict[str, list[float]]:
    """Returns the seconds of each contender in each round, by `clock`.

    Contenders take turns within a round, so that what disturbs the machine disturbs them alike.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number in range(warmup + rounds):
        # Every other round goes backwards: nobody always comes after the same one.
        for contender in contenders if number % 2 else reversed(contenders):
            torch.set_num_threads(contender.threads)
            taken = clock(contender.work)
            if number >= warmup:
                seconds[contender.name].append(taken)
            tick()
    return seconds


def ratio(seconds: Mapping[str, list[float]], baseline: str, name: str) -> float:
    """Returns how many times faster `name` is than `baseline`: the median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(seconds[baseline], seconds[name], strict=True))


def peak_bytes(work: Callable[[], object]) -> int:
    """Returns the most memory that `work` held at once beyond what was there before, in bytes.

    On CUDA it is the allocator's own peak; on the CPU it is summed up from the profiler's allocation events. Buffers
    that a process group keeps for later calls are freed first, so that they count.
    """
    clear_pools()
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


# What moves numbers as they are, whatever was asked for: others end in one of these.
_COPYING = ("aten::copy_", "aten::cat", "aten::index", "aten::index_select", "aten::index_copy_")


def copying_seconds(work: Callable[[], object]) -> float:
    """Returns how long `work` copies tensors, on the GPU where there is one, and otherwise on the CPU."""
    on_gpu = torch.cuda.is_available()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if on_gpu else [kinds.CPU]) as profile:
        work()
    events = [event for event in profile.key_averages() if event.key in _COPYING]
    return sum(float(event.self_device_time_total if on_gpu else event.self_cpu_time_total) for event in events) / 1e6


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
