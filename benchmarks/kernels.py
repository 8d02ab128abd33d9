"""Speed of the kernels: every backend beside torch's own kernels, and beside flash-attn where it is installed.

    python -m benchmarks.kernels --threads 2 --out results/kernels
    python -m benchmarks.kernels --cases causal packed --lengths 16384 65536 --head-dims 128

One process, one device, one call. A backend's time is that of one call of the kernel contract, which merges into an
fp32 state, or adds to fp32 gradients, that are there already; a rival's is that of its own forward, or of its
backward alone. Rates count the area of the tiles only: 4 D operations for a (query, key) pair of a head forward, 2.5
times as many backward. All contenders of a case take turns, a plain matrix product in the same dtype among them.

The columns: `× torch` is the median of the rounds' ratios to the fastest of torch's ways; `of matmul` is the share of
the matrix product's rate; `of dense` is the rate beside that of the same contender in the dense causal case.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import plots
from benchmarks.kernel_cases import CASES, Problem
from benchmarks.kernel_rivals import Way, ways
from benchmarks.measure import Clock, Contender, Lines, OneDevice, progress, race, ratio
from ringattn.errors import BackendError
from ringattn.kernels import BACKENDS, BackwardQueries, BlockKernel, Gradients, Keys, Queries, refusals
from ringattn.softmax import empty_state

MATMUL = "matmul"
# Contenders must compute the same thing: the cosine between their results and the first one's.
LEAST_COSINE = 0.999
# Who takes longer for a single call is left out.
PATIENCE_S = 30.0

Work = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Candidate:
    """Someone who may take part: `prepare` makes the work, and what brings its results into the common form."""

    name: str
    kind: str
    prepare: Callable[[], tuple[Work, Callable[[Tensor], Tensor]]]


@dataclass(frozen=True)
class Entry:
    """Someone who takes part."""

    contender: Contender
    kind: str
    flops: float


def backend_work(kernel: BlockKernel, problem: Problem, tensors: Sequence[Tensor]) -> Work:
    """Returns one call of the contract: (out,) of the rows that the tiles mention, or (dq, dk, dv)."""
    q, k, v, dout = tensors
    tiles, score, queries, keys = problem.pattern.tiles, problem.score, Queries(q), Keys(k, v)
    out, lse = state = empty_state(q, v.shape[3])
    if not problem.backward:

        def forward() -> tuple[Tensor, ...]:
            kernel.forward(queries, keys, tiles, score, state)
            return (out[:, tiles.bounding_box.q],)

        return forward
    kernel.forward(queries, keys, tiles, score, state)
    delta = (dout.to(out.dtype) * out).sum(-1).transpose(1, 2).contiguous()
    backward_queries = BackwardQueries(q, dout, lse, delta)
    gradients = Gradients(*(torch.zeros(x.shape, dtype=out.dtype, device=x.device) for x in (q, k, v)))

    def backward() -> tuple[Tensor, ...]:
        kernel.backward(backward_queries, keys, tiles, score, gradients)
        return gradients

    return backward


def rival_work(way: Way, problem: Problem, tensors: Sequence[Tensor]) -> Work:
    """Returns one forward, or one backward of a forward that is done: (out,) or (dq, dk, dv) in the way's own form."""
    # Detached, as packing may return the very tensor, which others use as well.
    q, k, v = (way.pack(x).detach().requires_grad_(problem.backward) for x in tensors[:3])
    if not problem.backward:
        return lambda: (way.attention(q, k, v),)
    dout = way.pack(tensors[3][:, problem.pattern.tiles.bounding_box.q])
    out = way.attention(q, k, v)
    return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def candidates(problem: Problem, device: torch.device, backends: Sequence[str]) -> Iterator[Candidate]:
    """Yields everyone who may take part in a problem, torch first."""
    tensors = problem.tensors(device)
    for way in ways(problem, device):

        def prepare_rival(way: Way = way) -> tuple[Work, Callable[[Tensor], Tensor]]:
            return rival_work(way, problem, tensors), way.unpack

        yield Candidate(way.name, way.kind, prepare_rival)
    for name in backends:

        def prepare(name: str = name) -> tuple[Work, Callable[[Tensor], Tensor]]:
            if why := refusals(name, problem.call(device)):
                raise BackendError("; ".join(why))
            return backend_work(BACKENDS[name], problem, tensors), lambda x: x

        yield Candidate(name, "backend", prepare)


def entries(problem: Problem, device: torch.device, backends: Sequence[str]) -> tuple[list[Entry], dict[str, str]]:
    """Tries everyone once: returns those who take part, and why others do not."""
    found, refused = [_matmul(problem, device)], {}
    first: list[Tensor] = []
    for candidate in candidates(problem, device, backends):
        try:
            work, unpack = candidate.prepare()
            taken, raw = tried(work, device)
            if taken > PATIENCE_S:  # compiling, perhaps
                taken, raw = tried(work, device)
            shown = [unpack(x.detach()) for x in raw]
        except BackendError as error:
            refused[candidate.name] = str(error)
            continue
        except Exception as error:
            # Whatever a foreign kernel thinks of these inputs, the others can still be measured.
            refused[candidate.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if taken > PATIENCE_S:
            refused[candidate.name] = f"took {taken:.0f} s for a call; {PATIENCE_S:.0f} s are allowed"
            continue
        first = first or [x.clone() for x in shown]
        if (worst := min(map(cosine, shown, first))) < LEAST_COSINE:
            refused[candidate.name] = f"computed something else: the cosine to the first one's results is {worst:.4f}"
            continue
        found.append(Entry(Contender(candidate.name, work, problem.threads), candidate.kind, problem.flops))
    return found, refused


def tried(work: Work, device: torch.device) -> tuple[float, Sequence[Tensor]]:
    """Returns how long one call took, its compiling included, and its results."""
    start = perf_counter()
    raw = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start, raw


def cosine(a: Tensor, b: Tensor) -> float:
    """Returns the cosine between two tensors of one shape, -1 if either holds NaN."""
    x, y = a.flatten().float(), b.flatten().float()
    value = float((x @ y) / (x.norm() * y.norm()))
    return value if value == value else -1.0


def _matmul(problem: Problem, device: torch.device) -> Entry:
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, problem.dtype)) for _ in range(2))
    return Entry(Contender(MATMUL, lambda: a @ b, problem.threads), MATMUL, 2.0 * size**3)


def as_records(problem: Problem, found: Sequence[Entry], seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Returns a record for each entry."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rivals = [entry.contender.name for entry in found if entry.kind == "torch"]
    baseline = min(rivals, key=medians.__getitem__) if rivals else None
    product_flops = found[0].flops
    told = []
    for entry in found:
        name = entry.contender.name
        told.append(
            {
                **asdict(problem),
                "contender": name,
                "kind": entry.kind,
                "area": problem.area,
                "flops": entry.flops,
                "flop_per_s": entry.flops / medians[name],
                "median_s": medians[name],
                "baseline": baseline,
                "ratio": ratio(seconds, baseline, name) if baseline and entry.kind != MATMUL else None,
                "of_matmul": ratio(seconds, MATMUL, name) * entry.flops / product_flops,
                "rounds_s": seconds[name],
            }
        )
    return told


class DenseRates:
    """The share of the matmul rate that each contender reaches in the dense causal case."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Any, ...], float] = {}

    def compare(self, record: dict[str, Any]) -> float | None:
        """Returns a record's share over the same contender's dense one; None while that is not known.

        Shares of the matmul rate are compared, not rates: the matrix product ran in the same rounds as each.
        """
        names = ("contender", "seq_len", "dtype", "heads", "kv_heads", "head_dim", "backward", "threads")
        key = tuple(record[name] for name in names)
        if record["case"] == "causal":
            self._seen[key] = record["of_matmul"]
        dense = self._seen.get(key)
        return record["of_matmul"] / dense if dense and record["kind"] != MATMUL else None


def problems(args: argparse.Namespace) -> list[Problem]:
    """Returns every combination of the flags, the dense causal case first in each."""
    cases = sorted(args.cases, key=list(CASES).index)
    settings = product(args.threads, args.dtypes, args.head_dims, args.kv_heads, args.lengths, args.passes, cases)
    return [
        Problem(case, length, dtype, args.heads, kv_heads, head_dim, backward=name == "bwd", threads=threads)
        for threads, dtype, head_dim, kv_heads, length, name, case in settings
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the flags, with defaults that suit the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    # The last of the table is the last resort: not made to be fast, and timed only when asked for.
    fast = list(BACKENDS)[:-1]
    about = "; ".join(f"{case.name}: {case.about}" for case in CASES.values())
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help=about)
    parser.add_argument("--backends", nargs="+", default=fast, choices=list(BACKENDS))
    parser.add_argument("--passes", nargs="+", default=["fwd", "bwd"], choices=("fwd", "bwd"))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"] if cuda else ["float32", "bfloat16"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384] if cuda else [2048])
    parser.add_argument("--heads", type=int, default=16 if cuda else 4)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[16, 4] if cuda else [4, 1])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--rounds", type=int, default=7 if cuda else 3)
    parser.add_argument("--warmup", type=int, default=2 if cuda else 0)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--out", type=Path, default=Path("results/kernels"))
    return parser.parse_args(argv)


def measure(problem: Problem, args: argparse.Namespace, clock: Clock) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Returns the records of one problem, and why others did not take part."""
    torch.set_num_threads(problem.threads)
    found, refused = entries(problem, torch.device(args.device), args.backends)
    contenders = [entry.contender for entry in found]
    seconds = race(contenders, args.rounds, args.warmup, lambda: None, clock)
    return as_records(problem, found, seconds), refused


def main(argv: Sequence[str] | None = None) -> None:
    """Measures by flags."""
    args = parse(argv)
    lines, dense, clock = Lines(args.out / "kernels.jsonl"), DenseRates(), OneDevice(torch.device(args.device))
    cuda = args.device == "cuda"
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    names = ("case", "tokens", "dtype", "D", "heads", "threads", "pass", "contender", "ms")
    table = Table(*names, "TFLOP/s" if cuda else "GFLOP/s", "× torch", "of matmul", "of dense", title=device)
    left_out: dict[str, str] = {}
    todo, unit = problems(args), 1e12 if cuda else 1e9
    with progress("kernels", len(todo), True) as tick:
        for problem in todo:
            records, refused = measure(problem, args, clock)
            for record in records:
                record |= {"of_dense": dense.compare(record), "device": device, "torch": torch.__version__}
                lines.add(record)
            add_section(table, problem, records, unit)
            for name, reason in refused.items():
                lines.add({**asdict(problem), "contender": name, "left_out": reason, "device": device})
                left_out.setdefault(name, f"{problem.case}, {problem.dtype}: {reason}")
            tick()
    Console(width=150).print(table)
    for name, reason in left_out.items():
        print(f"{name} did not take part everywhere; first in {reason}")
    plots.kernels(lines.path, args.out / "kernels.png")
    print(f"picture: {args.out / 'kernels.png'}")


def add_section(table: Table, problem: Problem, records: Sequence[dict[str, Any]], unit: float) -> None:
    """Adds a problem's records to the table, each contender a line."""
    heads, direction = f"{problem.heads}/{problem.kv_heads}", "bwd" if problem.backward else "fwd"
    about = (problem.case, f"{problem.seq_len:,}", problem.dtype, str(problem.head_dim), heads, str(problem.threads))
    told: tuple[str, ...] = (*about, direction)
    for record in records:
        ratios = [f"{x:.2f}" if (x := record[name]) else "" for name in ("ratio", "of_matmul", "of_dense")]
        speed = (f"{record['median_s'] * 1e3:.2f}", f"{record['flop_per_s'] / unit:.1f}")
        table.add_row(*told, record["contender"], *speed, *ratios)
        told = ("",) * len(told)
    table.add_section()


if __name__ == "__main__":
    main()
