"""The paged decode kernel on one GPU: what share of the memory's bandwidth it reaches, replayed from a CUDA graph.

    python -m benchmarks.paged --out results/paged

One layer of Llama-3-8B's shape by default: 32 query heads, 8 kv heads of 128, in bfloat16, one new token. Each case is
a length and a page size; pages are shuffled over the pool. Beside it stands the rate of a plain copy on the same
device, bytes read and written together. Between two runs the second-level cache is flushed. JSON lines; exits with 1 if
a case misses the goal.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import Lines
from ringattn.kernels.contract import ProblemSpec, Queries, State
from ringattn.kernels.paged import PageTables, Pools, VisibleKeys, select_paged
from ringattn.score import Score

# Of the rate of a copy, in bfloat16.
GOAL = 0.9
# What lies between two runs in memory: several times the second-level cache of any GPU.
FLUSH_BYTES = 512 << 20
COPY_BYTES = 2 << 30


@dataclass(frozen=True)
class Case:
    """What is decoded."""

    length: int
    page_size: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of the keys and values of all sequences, each once."""
        return 2 * self.batch * self.length * self.kv_heads * self.head_dim * self.dtype.itemsize


@dataclass
class Problem:
    """A case's tensors, and its launch."""

    q: Tensor
    k: Tensor
    v: Tensor
    tables: PageTables
    visible: VisibleKeys
    out: Tensor
    lse: Tensor

    @classmethod
    def of(cls, case: Case, device: torch.device) -> Problem:
        """Makes one of random numbers, its pages in random order."""
        c, per_sequence = case, -(-case.length // case.page_size)
        entries = c.batch * per_sequence
        k, v = (
            torch.randn(entries, c.kv_heads, c.page_size, c.head_dim, dtype=c.dtype, device=device).transpose(1, 2)
            for _ in range(2)
        )
        q = torch.randn(c.batch, 1, c.heads, c.head_dim, dtype=c.dtype, device=device)
        slots = torch.arange(per_sequence * c.page_size, dtype=torch.int32, device=device)
        slots = torch.where(slots < c.length, slots, -1).reshape(per_sequence, c.page_size).repeat(c.batch, 1)
        pages = torch.randperm(entries, device=device).int()
        starts = torch.arange(c.batch + 1, dtype=torch.int32, device=device) * per_sequence
        stop = torch.full((c.batch, 1), c.length, dtype=torch.int32, device=device)
        out = torch.zeros(c.batch, 1, c.heads, c.head_dim, device=device)
        lse = torch.full((c.batch, c.heads, 1), -torch.inf, device=device)
        return cls(q, k, v, PageTables(pages, slots, starts), VisibleKeys(torch.zeros_like(stop), stop), out, lse)

    def attend(self, backend: str | None) -> None:
        """One step of decoding in one layer."""
        heads, kv_heads, dim = self.q.shape[2], self.k.shape[2], self.q.shape[3]
        score = Score(dim**-0.5)
        call = ProblemSpec(self.q.device.type, self.q.dtype, heads, kv_heads, dim, dim, False, score)
        self.out.zero_()
        self.lse.fill_(-torch.inf)
        kernel, state = select_paged(backend, call), State(self.out, self.lse)
        kernel.forward(Queries(self.q), Pools(self.k, self.v), self.tables, self.visible, score, state)

    def error(self) -> float:
        """The largest difference to the first sequence's first kv head's dense attention in fp32."""
        group = self.q.shape[2] // self.k.shape[2]
        entries = slice(0, int(self.tables.starts[1]))
        pages, seen = self.tables.pages[entries].long(), self.tables.slots[entries].flatten() >= 0
        k, v = (pool[pages, :, 0].flatten(0, 1)[seen].float() for pool in (self.k, self.v))
        scores = self.q[0, 0, :group].float() @ k.T * self.q.shape[3] ** -0.5
        return float((scores.softmax(-1) @ v - self.out[0, 0, :group]).abs().max())


def captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Returns a graph of some work, which has run before on a stream of its own."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def seconds_of(work: Callable[[], object], rounds: int) -> float:
    """Returns the median seconds of some work on the device, whose cache holds nothing of it."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        flush.zero_()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1e3)
    return statistics.median(times)


def copy_rate(rounds: int) -> float:
    """Returns the bytes a second of a plain copy, read and written."""
    source = torch.empty(COPY_BYTES, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds_of(lambda: target.copy_(source), rounds)


def measured(case: Case, backend: str | None, rounds: int) -> tuple[float, float]:
    """Returns the median seconds of a replay, and the error of its result."""
    problem = Problem.of(case, torch.device("cuda"))
    graph = captured(lambda: problem.attend(backend))
    seconds = seconds_of(graph.replay, rounds)
    return seconds, problem.error()


def main() -> int:
    """Measures all cases; returns 1 if one misses the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/paged"))
    parser.add_argument("--lengths", nargs="+", type=int, default=[32768, 131072, 1048576])
    parser.add_argument("--page-sizes", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--backend")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no GPU: there is nothing to measure")
        return 2
    lines, copied, worst = Lines(options.out / "paged.jsonl"), copy_rate(options.rounds), math.inf
    print(f"{torch.cuda.get_device_name()}: a copy moves {copied / 1e9:.0f} GB/s")
    for length in options.lengths:
        for page_size in options.page_sizes:
            shape = options.batch, options.heads, options.kv_heads, options.head_dim
            case = Case(length, page_size, *shape, torch.bfloat16)
            seconds, error = measured(case, options.backend, options.rounds)
            rate = case.num_bytes / seconds
            worst = min(worst, rate / copied) if error < 1e-2 else 0.0
            told = {"length": length, "page_size": page_size, "microseconds": seconds * 1e6, "gb_per_s": rate / 1e9}
            shares = {"copy_gb_per_s": copied / 1e9, "share_of_copy": rate / copied, "error": error}
            lines.add({**told, **shares, "batch": options.batch, "device": torch.cuda.get_device_name()})
            print(
                f"{length:>9} tokens in pages of {page_size:>3}: {seconds * 1e6:9.1f} us, {rate / 1e9:6.0f} GB/s, "
                f"{rate / copied:.0%} of a copy, error {error:.1e}",
                flush=True,
            )
    print(f"goal {GOAL:.0%} of a copy: {'reached' if worst >= GOAL else f'missed, at least {worst:.0%}'}")
    return 0 if worst >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
