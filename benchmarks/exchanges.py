"""Every exchange beside the others: time, bytes on the wire, communication that no computing hides, memory.

    torchrun --nproc-per-node=2 -m benchmarks.exchanges --out results/exchanges
    python -m benchmarks.network --hosts 4 --rate-mbit 100 -- -m benchmarks.exchanges --exchanges ring gather-4

Each call is run in parts that take turns: whole; with messages that are done at once, which leaves the computing; with
kernels that do nothing, which leaves the transfer; and with neither, which leaves copies and bookkeeping. What the
whole takes longer than the computing is exposed. docs/performance.md tells what the columns mean.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import ringattn
from benchmarks import plots
from benchmarks.masks import packed_documents
from benchmarks.measure import Contender, Lines, copying_seconds, peak_bytes, progress, race, ratio
from benchmarks.session import Session, session
from benchmarks.wire import device_bytes, over_devices, watched
from ringattn.attention.autograd import AttentionFunction
from ringattn.attention.executor import ExecutionPlan
from ringattn.attention.validate import AttentionCall, plan_call, shape_of
from ringattn.comm.topology import RankMesh, rank_mesh
from ringattn.geometry.tiles import Tiles
from ringattn.kernels import BackwardQueries, Gradients, Keys, Queries, State
from ringattn.kernels.reference import ReferenceKernel
from ringattn.score import Score

WHOLE, COMPUTE, TRANSFER, OUTER, NEITHER = "whole", "compute", "transfer", "outer transfer", "neither"
PASSES = ("fwd", "bwd")
COPYING_RUNS = 5


@dataclass(frozen=True)
class Way:
    """An exchange: the operation, its stages, and the axes of its mesh, if it runs on one of two."""

    operation: str
    stages: int = 1
    axes: tuple[str, ...] = ()


WAYS = {
    "ring": Way("ring_attention"),
    "double-ring": Way("ring_attention", axes=("outer", "inner")),
    "gather": Way("gather_attention"),
    "ulysses": Way("ulysses_attention"),
    "hybrid": Way("hybrid_attention", axes=("ring", "ulysses")),
}
STAGED = ("gather", "ulysses", "hybrid")
DEFAULT = ("ring", "double-ring", "gather", "gather-4", "ulysses", "ulysses-4", "hybrid")
MASKS: dict[str, Callable[[int], ringattn.Mask]] = {
    "full": lambda n: ringattn.full(),
    "causal": lambda n: ringattn.causal(),
    "window": lambda n: ringattn.sliding_window(n // 16 - 1),
    "documents": lambda n: packed_documents(n) & ringattn.causal(),
}
LAYOUTS: dict[str, Callable[[ringattn.Mask, int, int], ringattn.Layout]] = {
    "contiguous": lambda m, n, w: ringattn.contiguous(n, w),
    "zigzag": lambda m, n, w: ringattn.zigzag(n, w),
    "striped": lambda m, n, w: ringattn.striped(n, w),
    "balanced": ringattn.balanced,
}


@dataclass(frozen=True)
class Case:
    """One call; seq_len counts all ranks' tokens."""

    layout: str
    mask: str
    direction: str
    exchange: str
    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str


class Pretender(ReferenceKernel):
    """A kernel that computes nothing but takes its time, and leaves the cores to others meanwhile, as a GPU would.

    Args:
        gflops: the speed that it pretends to have; None is infinite.
    """

    def __init__(self, gflops: float | None = None) -> None:
        self._flop_per_s = None if gflops is None else gflops * 1e9

    def forward(self, queries: Queries, keys: Keys, tiles: Tiles, score: Score, state: State) -> None:
        """Leaves the state as it is."""
        self._rest(2, queries.q, keys.v, tiles)

    def backward(self, queries: BackwardQueries, keys: Keys, tiles: Tiles, score: Score, gradients: Gradients) -> None:
        """Adds nothing."""
        self._rest(5, queries.q, keys.v, tiles)

    def _rest(self, products: int, q: Tensor, v: Tensor, tiles: Tiles) -> None:
        """As long as so many matrix products take, each 2 FLOP per pair, head and element of a head."""
        if self._flop_per_s is not None:
            flop = products * (q.shape[3] + v.shape[3]) * q.shape[2] * tiles.area(q.shape[0])
            time.sleep(flop / self._flop_per_s)


class Bench:
    """One case on this rank, ready to be run in parts."""

    def __init__(self, case: Case, team: RankMesh, device: torch.device, gflops: float | None = None) -> None:
        mask = MASKS[case.mask](case.seq_len)
        layout = LAYOUTS[case.layout](mask, case.seq_len, team.size)
        dtype, rows = getattr(torch, case.dtype), layout.num_tokens(team.rank)
        shapes = [(1, rows, heads, case.head_dim) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
        generator = torch.Generator().manual_seed(team.rank)
        q, k, v, self._dout = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        self._inputs = [x.requires_grad_() for x in (q, k, v)]
        way = way_of(case.exchange)
        asked = AttentionCall(way.operation, q, k, v, mask, layout, None, None, None, None, None, way.stages)
        _, job = plan_call(asked, team)
        job = job if gflops is None else replace(job, kernel=Pretender(gflops))
        self.case, self._team = case, team
        self.planned = job.bytes_sent(shape_of(q, k, v))[PASSES.index(case.direction)]
        everything = [axis.group for axis in team.axes]
        idle = replace(job, kernel=Pretender())
        self.parts = {
            WHOLE: self._part(job, ()),
            COMPUTE: self._part(job, everything),
            TRANSFER: self._part(idle, ()),
            **({OUTER: self._part(idle, everything[1:])} if len(everything) > 1 else {}),
            NEITHER: self._part(idle, everything),
        }

    def contenders(self) -> Iterator[Contender]:
        """Yields the parts."""
        for part, once in self.parts.items():
            yield Contender(self.name(part), once, 1)

    def name(self, part: str) -> str:
        """Returns the name of a part among the contenders."""
        return f"{self.case.exchange}: {part}"

    def sent(self) -> dict[str, int]:
        """Returns the bytes of one run, over all ranks: of the plan, as handed to process groups, and of devices."""
        dist.barrier()
        before = device_bytes()
        dist.barrier()
        with watched() as messages:
            self.parts[WHOLE]()
        dist.barrier()
        devices = over_devices(before, device_bytes())
        both = torch.tensor([self.planned, sum(messages)], device=self._dout.device)
        dist.all_reduce(both)
        planned, posted = both.tolist()
        return {"planned_bytes": planned, "posted_bytes": posted, "device_bytes": devices}

    def peak(self) -> int:
        """Returns the most memory that one run holds beyond its inputs, on the rank where that is most."""
        peak = torch.tensor([peak_bytes(self.parts[WHOLE])], device=self._dout.device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        return int(peak)

    def copies(self) -> float:
        """Returns the seconds of one run that this rank spends on copies: the median of several runs."""
        return statistics.median(copying_seconds(self.parts[WHOLE]) for _ in range(COPYING_RUNS))

    def _part(self, job: ExecutionPlan, silent: Collection[dist.ProcessGroup]) -> Callable[[], object]:
        def forward() -> Tensor:
            out: Tensor = AttentionFunction.apply(*self._inputs, None, job, self._team)[0]  # type: ignore[no-untyped-call]
            return out

        kept = forward() if self.case.direction == "bwd" else None

        def once() -> None:
            with watched(silent):
                if kept is None:
                    forward()
                else:
                    torch.autograd.grad(kept, self._inputs, self._dout, retain_graph=True)

        return once


def way_of(name: str) -> Way:
    """Returns an exchange by its name: one of WAYS, or with stages, such as gather-4.

    Raises:
        ValueError: when there is none of this name.
    """
    base, _, stages = name.rpartition("-")
    if base in STAGED and stages.isdigit() and int(stages) > 0:
        return replace(WAYS[base], stages=int(stages))
    if name not in WAYS:
        raise ValueError(f"{name}: must be one of {', '.join(WAYS)}, with -N for N stages of {', '.join(STAGED)}")
    return WAYS[name]


def _known(name: str) -> str:
    try:
        way_of(name)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None
    return name


def teams(names: Sequence[str], here: Session, inner: int) -> dict[str, RankMesh]:
    """Returns the team of each exchange that can run on so many ranks."""
    found = {}
    for name in names:
        axes = way_of(name).axes
        if not axes:
            found[name] = rank_mesh(None)
        elif here.world_size % inner == 0 and 1 < inner < here.world_size:
            shape = (here.world_size // inner, inner)
            found[name] = rank_mesh(init_device_mesh(here.device.type, shape, mesh_dim_names=axes), axes)
        elif here.rank == 0:
            print(f"{name} is left out: {here.world_size} ranks make no mesh with an axis of --inner {inner}")
    return found


def summary(bench: Bench, seconds: dict[str, list[float]], baseline: str) -> dict[str, float]:
    """Returns what the rounds showed: medians, of differences and ratios within a round."""
    rounds = {part: seconds[bench.name(part)] for part in bench.parts}

    def over_rounds(of: Callable[..., float], *parts: str) -> float:
        return statistics.median(of(*times) for times in zip(*(rounds[part] for part in parts), strict=True))

    slow = OUTER if OUTER in rounds else TRANSFER
    return {
        **{f"{part.replace(' ', '_')}_s": statistics.median(times) for part, times in rounds.items()},
        "times_first": ratio(seconds, baseline, bench.name(WHOLE)),
        "exposed_s": over_rounds(lambda whole, compute: whole - compute, WHOLE, COMPUTE),
        "exposed_of_transfer": over_rounds(lambda w, c, t: (w - c) / t, WHOLE, COMPUTE, TRANSFER),
        "over_ideal": over_rounds(lambda w, c, t: w / max(c, t), WHOLE, COMPUTE, slow),
        "neither_of_whole": over_rounds(lambda whole, neither: neither / whole, WHOLE, NEITHER),
    }


def row(case: Case, found: dict[str, Any]) -> list[str]:
    """Returns a record as a row of the table."""
    planned = found["planned_bytes"]

    def of_plan(name: str) -> str:
        return f"{found[name] / planned:.3f}" if planned else "-"

    return [
        case.layout, case.mask, case.direction, case.exchange,
        f"{found['whole_s'] * 1e3:.1f}", f"{found['times_first']:.2f}",
        f"{found['compute_s'] * 1e3:.1f}", f"{found['transfer_s'] * 1e3:.1f}",
        f"{found['exposed_s'] * 1e3:.1f}", f"{found['exposed_of_transfer']:.0%}", f"{found['over_ideal']:.2f}",
        f"{found['neither_of_whole']:.1%}", f"{found['copies_s'] / (found['compute_s'] - found['neither_s']):.1%}",
        f"{planned / 2**20:.2f}", of_plan("posted_bytes"), of_plan("device_bytes"),
        f"{found['peak_bytes'] / 2**20:.1f}",
    ]  # fmt: skip


COLUMNS = (
    "layout", "mask", "pass", "exchange", "whole ms", "× first", "compute ms", "transfer ms", "exposed ms",
    "of transfer", "/ ideal", "neither", "copies", "MiB sent", "/ plan", "devices / plan", "peak MiB",
)  # fmt: skip


def parse() -> argparse.Namespace:
    """Returns the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exchanges", nargs="+", type=_known, default=DEFAULT, help="-N: in N stages")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=["causal", "window", "documents"])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--inner", type=int, default=2, help="ranks along the inner axis of a mesh")
    parser.add_argument("--pretend-gflops", type=float, help="kernels that only wait, as if they were so fast")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/exchanges"))
    return parser.parse_args()


def main() -> None:
    """Measures by flags."""
    args = parse()
    with session() as here:
        members = teams(args.exchanges, here, args.inner)
        lines = Lines(args.out / "exchanges.jsonl") if here.rank == 0 else None
        table = Table(*COLUMNS, title=f"exchanges, {here.world_size} ranks")
        sizes = (args.seq_len, args.heads, args.kv_heads, args.head_dim, args.dtype)
        groups = list(product(args.layouts, args.masks, args.passes))
        parts = sum(len(team.axes) + 3 for team in members.values())
        with progress("exchanges", len(groups) * parts * (args.rounds + args.warmup), here.rank == 0) as tick:
            for group in groups:
                benches = [
                    Bench(Case(*group, name, *sizes), team, here.device, args.pretend_gflops)
                    for name, team in members.items()
                ]
                racers = [racer for bench in benches for racer in bench.contenders()]
                seconds = race(racers, args.rounds, args.warmup, tick)
                for bench in benches:
                    found = summary(bench, seconds, benches[0].name(WHOLE))
                    measured = {**found, "copies_s": bench.copies(), **bench.sent(), "peak_bytes": bench.peak()}
                    table.add_row(*row(bench.case, measured))
                    if lines is not None:
                        lines.add(
                            {
                                **asdict(bench.case),
                                "ranks": here.world_size,
                                "pretend_gflops": args.pretend_gflops,
                                **measured,
                            }
                        )
        if lines is not None:
            Console(width=200).print(table)
            plots.exchanges(lines.path, args.out / "exchanges.png")
            print(f"picture: {args.out / 'exchanges.png'}")
        dist.barrier()


if __name__ == "__main__":
    main()
