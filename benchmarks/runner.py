"""What every benchmark needs: its ranks, timing in turns, progress, JSON lines and tables."""

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
from torch.utils.benchmark import select_unit

Work = Callable[[], object]
# Runs a piece of work and returns its seconds. A rank whose work is None only takes part in the synchronization.
Clock = Callable[[Work | None], float]
Record = Mapping[str, Any]
PASSES = ("fwd", "bwd")


@dataclass(frozen=True)
class Contender:
    """One way to do a piece of work.

    Args:
        name: unique among the contenders.
        work: does it once on this rank; None where this rank only waits for the others.
        threads: of torch on each working rank.
    """

    name: str
    work: Work | None
    threads: int = 1


class Timings(dict[str, list[float]]):
    """The seconds of each contender in each round."""

    def median(self, name: str) -> float:
        return statistics.median(self[name])

    def ratio(self, baseline: str, name: str) -> float:
        """Returns how many times faster `name` is than `baseline`: the median of the rounds' own ratios."""
        return statistics.median(a / b for a, b in zip(self[baseline], self[name], strict=True))

    def summary(self, name: str) -> dict[str, Any]:
        """Returns the times of a contender for a record."""
        return {"min_s": min(self[name]), "median_s": self.median(name), "rounds_s": self[name]}


@dataclass(frozen=True)
class Session:
    """Where a benchmark runs.

    Args:
        rank, world_size: of this process.
        device: for tensors.
        out: the folder of the results.
        distributed: whether there is a process group.
    """

    rank: int
    world_size: int
    device: torch.device
    out: Path = Path("results")
    distributed: bool = True

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    @property
    def clock(self) -> Clock:
        return RankClock(self.device) if self.distributed else DeviceClock(self.device)

    def print(self, *lines: object) -> None:
        """Prints lines on the main rank."""
        if self.is_main:
            print(*lines, sep="\n", flush=True)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        """Shows a progress bar on the main rank; yields the function that advances it by one."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, disable=not self.is_main) as bar:
            task = bar.add_task(title, total=total)
            yield lambda: bar.advance(task)

    def time(self, title: str, contenders: Sequence[Contender], rounds: int, warmup: int = 1) -> Timings:
        """Times contenders in turns, with a progress bar; all ranks call it together."""
        with self.progress(title, len(contenders) * (rounds + warmup)) as tick:
            return time_in_turns(contenders, rounds, warmup, self.clock, tick)

    def records(self, name: str) -> Records:
        """Returns the records that go to `out`/`name`.jsonl."""
        return Records(self.out / f"{name}.jsonl" if self.is_main else None)

    def maximum(self, value: int) -> int:
        """Returns the largest value of all ranks; a collective."""
        largest = torch.tensor([value], device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)


@contextmanager
def session(out: Path, device: str | None = None, *, distributed: bool = True) -> Iterator[Session]:
    """Joins the ranks that torchrun started: NCCL with a GPU for each, or gloo with a thread for each.

    Without `distributed`, this process is the only one and there is no process group.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not distributed:
        yield Session(0, 1, place, out, False)
        return
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    if place.type == "cuda":
        place = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(place)
    else:
        torch.set_num_threads(1)
    try:
        yield Session(dist.get_rank(), dist.get_world_size(), place, out)
        dist.barrier()
    finally:
        dist.destroy_process_group()


class RankClock:
    """The seconds of the slowest rank, from the moment when all ranks are ready; all ranks call it together."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, work: Work | None) -> float:
        dist.barrier()
        start = time.perf_counter()
        if work is not None:
            work()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        seconds = torch.tensor([time.perf_counter() - start], dtype=torch.float64, device=self._device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return seconds.item()


class DeviceClock:
    """The median seconds of several runs in one process, so many that short work can be timed.

    On CUDA, events time a run, and the second-level cache is flushed before it.
    """

    MIN_S = 0.02  # work is repeated until it has taken this long in total
    MAX_RUNS = 50
    FLUSH_BYTES = 512 << 20  # several times the second-level cache of any GPU

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._flush = torch.empty(self.FLUSH_BYTES, dtype=torch.int8, device=device) if cuda else None

    def __call__(self, work: Work | None) -> float:
        if work is None:
            raise ValueError("work=None: one process has no other ranks to wait for")
        seconds: list[float] = []
        while not seconds or (sum(seconds) < self.MIN_S and len(seconds) < self.MAX_RUNS):
            seconds.append(self._once(work))
        return statistics.median(seconds)

    def _once(self, work: Work) -> float:
        if self._flush is None:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flush.zero_()  # meanwhile the host enqueues the launches, so that their overhead does not count
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def time_in_turns(
    contenders: Sequence[Contender], rounds: int, warmup: int, clock: Clock, tick: Callable[[], None] = lambda: None
) -> Timings:
    """Returns the seconds of each contender in each round after the warm-up.

    Contenders take turns within a round, so that other load on the machine affects all of them. Every other round
    runs in reverse order, so that no contender always follows the same one.
    """
    seconds = Timings({contender.name: [] for contender in contenders})
    for number in range(warmup + rounds):
        for contender in contenders if number % 2 else reversed(contenders):
            torch.set_num_threads(contender.threads)
            taken = clock(contender.work)
            if number >= warmup:
                seconds[contender.name].append(taken)
            tick()
    return seconds


class Records(list[dict[str, Any]]):
    """The records of a benchmark on the main rank, also written to a file as JSON lines; empty on other ranks.

    Args:
        path: of the file; None on ranks that write nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")

    def add(self, *parts: Record) -> None:
        """Appends a record, given as one or more mappings."""
        if self._path is not None:
            self.append({name: value for part in parts for name, value in part.items()})
            with self._path.open("a") as file:
                file.write(json.dumps(self[-1]) + "\n")

    def show(self, title: str, columns: str) -> None:
        """Prints a Markdown table of the records that were not left out.

        Args:
            title: above the table.
            columns: field names with spaces between them; a name may have a format, such as loss:.6f.
        """
        if self._path is None:
            return
        formats = dict(column.partition(":")[::2] for column in columns.split())
        names = list(formats)
        body = [
            [format(r[name], formats[name]) if formats[name] else cell(name, r.get(name)) for name in names]
            for r in self
            if "left_out" not in r
        ]
        widths = [max(map(len, column)) for column in zip(names, *body, strict=True)]
        lines = [f"| {' | '.join(x.ljust(w) for x, w in zip(row, widths, strict=True))} |" for row in (names, *body)]
        print("", title, "", lines[0], f"|{'|'.join('-' * (w + 2) for w in widths)}|", *lines[1:], sep="\n", flush=True)


def cell(name: str, value: Any) -> str:
    """Returns a value as text, by its type and the unit at the end of its name."""
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(cell(name, x) for x in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(name, x)}" for key, x in value.items())
    if name.endswith("_bytes"):
        return f"{value / 2**20:,.2f} MiB"
    if name.endswith("_per_s"):
        return f"{value / 1e9:.4g} G" if value > 1e7 else f"{value:,.0f}"
    if name.endswith("_s"):
        unit, seconds = select_unit(abs(value) or 1.0)
        return f"{value / seconds:.4g} {unit}"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
