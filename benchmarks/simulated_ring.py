"""A zigzag ring on one device: what cutting attention into the steps of a ring costs, without any communication.

    python -m benchmarks.simulated_ring --ranks 4 --rows 4096 --out results/simulated_ring

The ranks of a ring are computed one after the other, every step of each rank's plan by one call of a backend, and
beside them the same backend computes the whole sequence in one dense causal call. Both make their state, and bring
out or the gradients into the dtype of q. What the ring takes longer is the loss.

Where it goes, step by step: a step is due its share, by area, of the dense call. The fixed cost is that of a call
in which the same rows see a single key: launching, and reading, merging and writing the state, whether a backend does
that in the kernel or apart. Its bandwidth stands beside that of a plain copy.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import ringattn
from benchmarks.kernel_cases import flops
from benchmarks.measure import Clock, Contender, Lines, OneDevice, progress, race
from ringattn.errors import BackendError
from ringattn.geometry.tiles import Tile, Tiles, tiles_of_rank
from ringattn.kernels import (
    BACKENDS,
    BackwardQueries,
    BlockKernel,
    Gradients,
    Keys,
    ProblemSpec,
    Queries,
    State,
    refusals,
)
from ringattn.plan.exchanges import Ring, build_plan
from ringattn.score import Score
from ringattn.softmax import accumulation_dtype, empty_state

RING, DENSE, COPY = "ring", "dense", "copy"
COPY_BYTES = 256 << 20


@dataclass(frozen=True)
class Case:
    """One causal sequence of ranks * rows tokens; batch size 1."""

    ranks: int
    rows: int
    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    backward: bool
    backend: str
    threads: int

    @property
    def score(self) -> Score:
        """The score, its scale resolved."""
        return Score(self.head_dim**-0.5)

    def kernel(self, device: torch.device) -> BlockKernel:
        """Returns the backend, or raises BackendError with every reason."""
        dim, dtype = self.head_dim, getattr(torch, self.dtype)
        call = ProblemSpec(device.type, dtype, self.heads, self.kv_heads, dim, dim, self.backward, self.score)
        if why := refusals(self.backend, call):
            raise BackendError("; ".join(why))
        return BACKENDS[self.backend]

    def tensors(self, device: torch.device) -> list[Tensor]:
        """Returns q, k, v, dout, (ranks, rows, heads, head_dim): a rank's shard each, in the order of the layout."""
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(self.ranks, self.rows, h, self.head_dim) for h in (self.heads, self.kv_heads)]
        made = [torch.randn(shapes[i], generator=generator, device=device) for i in (0, 1, 1, 0)]
        return [x.to(getattr(torch, self.dtype)) for x in made]

    def steps(self, rank: int) -> list[tuple[int, Tiles]]:
        """Returns what a rank attends to, step by step: (block, tiles)."""
        layout = ringattn.zigzag(self.ranks * self.rows, self.ranks)
        plan = build_plan(Ring(), (ringattn.causal(),), layout, layout, rank)
        return [(visit.piece.block, visit.tiles) for visit in plan.forward.visits]


class Attention:
    """Attention of several ranks' queries to several blocks, a call of the kernel for each step of each rank."""

    def __init__(self, case: Case, tensors: Sequence[Tensor], steps: list[list[tuple[int, Tiles]]]) -> None:
        self.case = case
        self.kernel = case.kernel(tensors[0].device)
        self.steps = steps
        self.q, self.k, self.v, self.dout = ([x[i : i + 1] for i in range(len(x))] for x in tensors)
        self.states = [self._attend(rank) for rank in range(len(steps))]

    def _attend(self, rank: int) -> State:
        state = empty_state(self.q[rank], self.case.head_dim)
        for block, tiles in self.steps[rank]:
            self.forward_step(rank, block, tiles, state)
        return state

    def forward(self) -> list[Tensor]:
        """Returns each rank's out, in q's dtype."""
        return [self._attend(rank)[0].to(self.q[rank].dtype) for rank in range(len(self.steps))]

    def backward(self) -> list[Tensor]:
        """Returns the gradients, in q's dtype: dq of every rank, dk and dv of every block."""
        gradients = self.zeros()
        for rank, steps in enumerate(self.steps):
            delta = self.delta(rank)
            for block, tiles in steps:
                self.backward_step(rank, block, tiles, delta, gradients)
        return [x.to(self.q[0].dtype) for some in gradients for x in some]

    def forward_step(self, rank: int, block: int, tiles: Tiles, state: State) -> None:
        """Merges one step into a state."""
        keys = Keys(self.k[block], self.v[block])
        self.kernel.forward(Queries(self.q[rank]), keys, tiles, self.case.score, state)

    def backward_step(
        self, rank: int, block: int, tiles: Tiles, delta: Tensor, gradients: Sequence[Sequence[Tensor]]
    ) -> None:
        """Adds one step's gradients."""
        dq, dk, dv = gradients
        queries = BackwardQueries(self.q[rank], self.dout[rank], self.states[rank].lse, delta)
        keys, sums = Keys(self.k[block], self.v[block]), Gradients(dq[rank], dk[block], dv[block])
        self.kernel.backward(queries, keys, tiles, self.case.score, sums)

    def delta(self, rank: int) -> Tensor:
        """Returns rowsum(dout * out), (1, H, S)."""
        out, _ = self.states[rank]
        return (self.dout[rank].to(out.dtype) * out).sum(-1).transpose(1, 2).contiguous()

    def zeros(self) -> list[list[Tensor]]:
        """Returns dq, dk, dv, to be added to."""
        dtype = accumulation_dtype(self.q[0].dtype)
        return [[torch.zeros_like(x, dtype=dtype) for x in some] for some in (self.q, self.k, self.v)]

    @cached_property
    def scratch(self) -> list[list[Tensor]]:
        """Gradients that nobody reads: the single steps add to them in turns."""
        return self.zeros()

    def step_work(self, rank: int, block: int, tiles: Tiles) -> Callable[[], object]:
        """Returns one step as a piece of work: into a state, or gradients, that are there."""
        if not self.case.backward:
            return lambda: self.forward_step(rank, block, tiles, self.states[rank])
        delta, gradients = self.delta(rank), self.scratch
        return lambda: self.backward_step(rank, block, tiles, delta, gradients)


def whole(case: Case, tensors: Sequence[Tensor]) -> Attention:
    """Returns the same attention as one dense causal call: the shards in global order."""
    layout = ringattn.zigzag(case.ranks * case.rows, case.ranks)
    order = torch.cat([torch.from_numpy(layout.positions(rank)) for rank in range(case.ranks)])
    order = torch.argsort(order).to(tensors[0].device)
    alone = ringattn.contiguous(layout.seq_len, 1)
    tiles = tiles_of_rank((ringattn.causal(),), alone, alone, 0)[0]
    return Attention(case, [x.flatten(0, 1)[order][None] for x in tensors], [[(0, tiles)]])


def single_key(tiles: Tiles) -> Tiles:
    """Returns the rows of the tiles, each with the first key that any of them sees."""
    box = tiles.bounding_box
    unbounded = 1 << 40
    return Tiles.of(Tile(box.q.start, box.q.stop, box.k.start, box.k.start + 1, -unbounded, unbounded))


def state_bytes(case: Case, tiles: Tiles) -> int:
    """Returns the bytes that a call with a single key must move: the state of its rows in and out, and q (and dout)."""
    rows = int(tiles.bounding_box.q.stop - tiles.bounding_box.q.start)
    size = torch.empty(0, dtype=getattr(torch, case.dtype)).element_size()
    inputs = (2 if case.backward else 1) * case.head_dim * size
    # Forward: out and lse, in and out. Backward: dq in and out, lse and delta in.
    state = 4 * (2 * case.head_dim + 2)
    return rows * case.heads * (state + inputs)


def measure(case: Case, rounds: int, warmup: int, clock: Clock, device: torch.device) -> list[dict[str, Any]]:
    """Returns a record of the whole ring, and one of every step, the same steps of all ranks taken together."""
    tensors = case.tensors(device)
    steps = [case.steps(rank) for rank in range(case.ranks)]
    ring, dense = Attention(case, tensors, steps), whole(case, tensors)
    run = {RING: ring.backward, DENSE: dense.backward} if case.backward else {RING: ring.forward, DENSE: dense.forward}
    source = torch.empty(COPY_BYTES // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    contenders = [Contender(name, work, case.threads) for name, work in run.items()]
    contenders.append(Contender(COPY, lambda: target.copy_(source), case.threads))
    for rank, some in enumerate(steps):
        for index, (block, tiles) in enumerate(some):
            fixed = ring.step_work(rank, block, single_key(tiles))
            contenders.append(Contender(f"step {index} of {rank}", ring.step_work(rank, block, tiles), case.threads))
            contenders.append(Contender(f"fixed {index} of {rank}", fixed, case.threads))
    seconds = race(contenders, rounds, warmup, lambda: None, clock)
    return _records(case, steps, seconds)


def _records(case: Case, steps: list[list[tuple[int, Tiles]]], seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    common = {**asdict(case), "copy_bytes_per_s": COPY_BYTES / statistics.median(seconds[COPY])}
    total = sum(tiles.area() for some in steps for _, tiles in some)
    work = flops(total, case.heads, case.head_dim, case.backward)
    ring, dense = statistics.median(seconds[RING]), statistics.median(seconds[DENSE])
    loss = statistics.median(a / b for a, b in zip(seconds[RING], seconds[DENSE], strict=True)) - 1.0
    calls = sum(len(some) for some in steps)
    in_kernels = sum(statistics.median(times) for name, times in seconds.items() if name.startswith("step"))
    fixed = sum(statistics.median(times) for name, times in seconds.items() if name.startswith("fixed"))
    told: list[dict[str, Any]] = [
        {
            **common,
            "step": None,
            "calls": calls,
            "area": total,
            "ring_s": ring,
            "dense_s": dense,
            "kernel_s": in_kernels,
            "fixed_s": fixed,
            "loss": loss,
            "flop_per_s": work / ring,
        }
    ]
    for index in range(max(len(some) for some in steps)):
        here = [(rank, some[index][1]) for rank, some in enumerate(steps) if index < len(some)]
        area = sum(tiles.area() for _, tiles in here)
        by_round = [sum(x) for x in zip(*(seconds[f"step {index} of {rank}"] for rank, _ in here), strict=True)]
        fixed_s = sum(statistics.median(seconds[f"fixed {index} of {rank}"]) for rank, _ in here)
        losses = [taken / (whole_s * area / total) for taken, whole_s in zip(by_round, seconds[DENSE], strict=True)]
        told.append(
            {
                **common,
                "step": index,
                "calls": len(here),
                "area": area,
                "kernel_s": statistics.median(by_round),
                "due_s": dense * area / total,
                "fixed_s": fixed_s,
                "fixed_bytes_per_s": sum(state_bytes(case, tiles) for _, tiles in here) / fixed_s,
                "loss": statistics.median(losses) - 1.0,
            }
        )
    return told


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the flags, with defaults that suit the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS)[:-1], choices=list(BACKENDS))
    parser.add_argument("--passes", nargs="+", default=["fwd", "bwd"], choices=("fwd", "bwd"))
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16384 if cuda else 1024, help="tokens of each rank")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"] if cuda else ["float32"])
    parser.add_argument("--heads", type=int, default=16 if cuda else 8)
    parser.add_argument("--kv-heads", type=int, default=16 if cuda else 8)
    parser.add_argument("--head-dim", type=int, default=128 if cuda else 64)
    parser.add_argument("--rounds", type=int, default=5 if cuda else 3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("results/simulated_ring"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures by flags."""
    args = parse(argv)
    device = torch.device(args.device)
    lines, clock = Lines(args.out / "simulated_ring.jsonl"), OneDevice(device)
    names = ("backend", "dtype", "pass", "step", "calls", "kernel ms", "due ms", "loss", "fixed ms", "fixed GB/s")
    table = Table(*names, title=f"{args.ranks} zigzag ranks of {args.rows:,} tokens, one after the other")
    torch.set_num_threads(args.threads)
    sizes = (args.heads, args.kv_heads, args.head_dim)
    cases = [
        Case(args.ranks, args.rows, dtype, *sizes, backward=name == "bwd", backend=backend, threads=args.threads)
        for dtype in args.dtypes
        for backend in args.backends
        for name in args.passes
    ]
    left_out: dict[str, str] = {}
    with progress("simulated ring", len(cases), True) as tick:
        for case in cases:
            try:
                records = measure(case, args.rounds, args.warmup, clock, device)
            except Exception as error:
                # One backend that cannot, or has not the memory, must not take the others' figures with it.
                reason = str(error) if isinstance(error, BackendError) else f"{type(error).__name__}: {error}"
                reason = reason.splitlines()[0]
                left_out.setdefault(case.backend, reason)
                lines.add({**asdict(case), "left_out": reason})
                tick()
                continue
            for record in records:
                lines.add(record)
                table.add_row(*row(case, record))
            table.add_section()
            tick()
    Console(width=130).print(table)
    for name, reason in left_out.items():
        print(f"{name} did not take part: {reason}")


def row(case: Case, record: dict[str, Any]) -> tuple[str, ...]:
    """Returns a record as a line of the table; of the whole ring, the time is that of everything it does."""
    everything = record["step"] is None
    taken, due = (record[name] for name in (("ring_s", "dense_s") if everything else ("kernel_s", "due_s")))
    rate = record["copy_bytes_per_s"] if everything else record["fixed_bytes_per_s"]
    return (
        case.backend,
        case.dtype,
        "bwd" if case.backward else "fwd",
        "whole ring" if everything else str(record["step"]),
        str(record["calls"]),
        f"{taken * 1e3:.2f}",
        f"{due * 1e3:.2f}",
        f"{record['loss']:+.1%}",
        f"{record['fixed_s'] * 1e3:.2f}",
        f"{rate / 1e9:.1f} (copy)" if everything else f"{rate / 1e9:.1f}",
    )


if __name__ == "__main__":
    main()
