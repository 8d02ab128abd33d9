"""A zigzag ring on one device: the loss by cutting attention into the steps of a ring, without communication.

The ranks of a ring are computed one after the other, every step of each rank's plan by one call of a kernel. Beside
them, the same kernel computes the whole sequence in one dense causal call. Both make their state, and convert out or
the gradients to the dtype of q. The loss is the extra time of the ring.

For each step, `expected_s` is its share, by area, of the dense call. The fixed cost is the time of a call in which the
same rows see a single key: launching, and reading, merging and writing the state, whether a kernel does that inside or
apart. Its bandwidth is shown beside a plain copy's. Step None is the whole ring.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Annotated, Any

import torch
from torch import Tensor

import ringattn
from benchmarks import internals
from benchmarks.inputs import Shape
from benchmarks.kernel_cases import flops
from benchmarks.kernels import CUDA, FAST
from benchmarks.registry import benchmark
from benchmarks.runner import PASSES, Clock, Contender, Session, Timings, time_in_turns
from ringattn.errors import BackendError
from ringattn.geometry.tiles import Tile, Tiles
from ringattn.kernels import BACKENDS, Gradients, State

RING, DENSE, COPY = "ring", "dense", "copy"
COPY_BYTES = 256 << 20
Steps = list[tuple[int, Tiles]]  # of one rank: the block, and its tiles


@dataclass(frozen=True)
class Case(Shape):
    """One causal sequence of ranks * rows tokens; batch size 1."""

    ranks: int
    rows: int
    backward: bool
    backend: str
    threads: int

    @property
    def layout(self) -> ringattn.Layout:
        return ringattn.zigzag(self.ranks * self.rows, self.ranks)

    def steps(self) -> list[Steps]:
        """Returns what each rank computes, step by step."""
        return [internals.ring_steps(ringattn.causal(), self.layout, rank) for rank in range(self.ranks)]


class Attention:
    """Attention of several ranks' queries to several blocks, with one kernel call for each step of each rank.

    Args:
        case: the shapes.
        tensors: q, k, v, dout, (ranks, rows, heads, head_dim), in the order of the layout.
        steps: of each rank.
    """

    def __init__(self, case: Case, tensors: Sequence[Tensor], steps: list[Steps]) -> None:
        self.case, self.steps = case, steps
        self.kernel = internals.kernel_by_name(case.backend, case, tensors[0].device, case.backward)
        self.q, self.k, self.v, self.dout = ([x[i : i + 1] for i in range(len(x))] for x in tensors)
        self.states = [self._attend(rank) for rank in range(len(steps))]
        self._scratch = self._new_gradients()

    def run(self) -> list[Tensor]:
        """Returns, in q's dtype, each rank's out; or dq of every rank, then dk and dv of every block."""
        found = [self._attend(rank).out for rank in range(len(self.steps))] if not self.case.backward else []
        if self.case.backward:
            gradients = self._new_gradients()
            for rank, steps in enumerate(self.steps):
                delta = self._delta(rank)
                for block, tiles in steps:
                    self._backward_step(rank, block, tiles, delta, gradients)
            found = [x for some in zip(*gradients, strict=True) for x in some]
        return [x.to(self.q[0].dtype) for x in found]

    def step_work(self, rank: int, block: int, tiles: Tiles) -> Callable[[], object]:
        """Returns the work of one step, into an existing state or existing gradients."""
        if not self.case.backward:
            return lambda: self._forward_step(rank, block, tiles, self.states[rank])
        delta = self._delta(rank)
        return lambda: self._backward_step(rank, block, tiles, delta, self._scratch)

    def _attend(self, rank: int) -> State:
        state = internals.new_state(self.q[rank])
        for block, tiles in self.steps[rank]:
            self._forward_step(rank, block, tiles, state)
        return state

    def _forward_step(self, rank: int, block: int, tiles: Tiles, state: State) -> None:
        internals.forward(self.kernel, (self.q[rank], self.k[block], self.v[block]), tiles, state)

    def _backward_step(
        self, rank: int, block: int, tiles: Tiles, delta: Tensor, gradients: Sequence[Gradients]
    ) -> None:
        qkv, sums = (self.q[rank], self.k[block], self.v[block]), gradients[block]._replace(dq=gradients[rank].dq)
        internals.backward(self.kernel, qkv, self.dout[rank], self.states[rank].lse, delta, tiles, sums)

    def _delta(self, rank: int) -> Tensor:
        return internals.delta_of(self.dout[rank], self.states[rank].out)

    def _new_gradients(self) -> list[Gradients]:
        """One for each rank, which owns a block."""
        return [internals.new_gradients(qkv) for qkv in zip(self.q, self.k, self.v, strict=True)]


def whole(case: Case, tensors: Sequence[Tensor]) -> Attention:
    """Returns the same attention as one dense causal call, with the shards in global order."""
    order = torch.cat([torch.from_numpy(case.layout.positions(rank)) for rank in range(case.ranks)])
    order = torch.argsort(order).to(tensors[0].device)
    tiles = internals.mask_tiles(ringattn.causal(), case.layout.seq_len)
    return Attention(case, [x.flatten(0, 1)[order][None] for x in tensors], [[(0, tiles)]])


def single_key(tiles: Tiles) -> Tiles:
    """Returns the rows of the tiles, each with the first key that any of them sees."""
    frame, unbounded = tiles.bounding_box, 1 << 40
    return Tiles.of(Tile(frame.q.start, frame.q.stop, frame.k.start, frame.k.start + 1, -unbounded, unbounded))


def state_bytes(case: Case, tiles: Tiles) -> int:
    """Returns the bytes that a call with a single key must move: the state of its rows in and out, and q (and dout)."""
    inputs = (2 if case.backward else 1) * case.head_dim * case.torch_dtype.itemsize
    # Forward: out and lse, in and out. Backward: dq in and out, lse and delta in.
    return (
        int(tiles.bounding_box.q.stop - tiles.bounding_box.q.start)
        * case.heads
        * (4 * (2 * case.head_dim + 2) + inputs)
    )


def measure(case: Case, rounds: int, warmup: int, clock: Clock, device: torch.device) -> list[dict[str, Any]]:
    """Returns a record of the whole ring, and one of every step, the same steps of all ranks taken together."""
    tensors, steps = case.random(case.rows, device, batch=case.ranks), case.steps()
    ring, dense = Attention(case, tensors, steps), whole(case, tensors)
    source = torch.empty(COPY_BYTES // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    work: dict[str, Callable[[], object]] = {RING: ring.run, DENSE: dense.run, COPY: lambda: target.copy_(source)}
    for rank, of_rank in enumerate(steps):
        for index, (block, tiles) in enumerate(of_rank):
            work[f"step {index} of {rank}"] = ring.step_work(rank, block, tiles)
            work[f"fixed {index} of {rank}"] = ring.step_work(rank, block, single_key(tiles))
    contenders = [Contender(name, once, case.threads) for name, once in work.items()]
    return _records(case, steps, time_in_turns(contenders, rounds, warmup, clock))


def _records(case: Case, steps: list[Steps], seconds: Timings) -> list[dict[str, Any]]:
    common = {**asdict(case), "copy_bytes_per_s": COPY_BYTES / seconds.median(COPY)}
    total = sum(tiles.area() for of_rank in steps for _, tiles in of_rank)
    dense, records = seconds.median(DENSE), []
    for index in (None, *range(max(map(len, steps)))):
        some = range(len(steps[0])) if index is None else (index,)
        chosen = {(i, rank): of_rank[i][1] for rank, of_rank in enumerate(steps) for i in some if i < len(of_rank)}
        rounds = [sum(x) for x in zip(*(seconds[f"step {i} of {rank}"] for i, rank in chosen), strict=True)]
        fixed_s = sum(seconds.median(f"fixed {i} of {rank}") for i, rank in chosen)
        area = sum(tiles.area() for tiles in chosen.values())
        taken = seconds[RING] if index is None else rounds
        record = {
            "step": index,
            "calls": len(chosen),
            "area": area,
            "total_s": statistics.median(taken),
            "kernel_s": statistics.median(rounds),
            "expected_s": dense * area / total,
            "fixed_s": fixed_s,
            "fixed_bytes_per_s": sum(state_bytes(case, tiles) for tiles in chosen.values()) / fixed_s,
            "loss": statistics.median(a / (b * area / total) for a, b in zip(taken, seconds[DENSE], strict=True)) - 1.0,
            "flop_per_s": flops(area, case.heads, case.head_dim, case.backward) / statistics.median(taken),
        }
        records.append({**common, **record})
    return records


DEFAULT = Shape(16, 16, 128, "bfloat16") if CUDA else Shape(8, 8, 64, "float32")


@benchmark("simulated-ring", help="the steps of a zigzag ring on one device, beside one dense call")
def simulated_ring(
    here: Session,
    backends: Annotated[Sequence[str], BACKENDS] = FAST,
    passes: Annotated[Sequence[str], PASSES] = PASSES,
    ring_ranks: int = 4,
    rows: Annotated[int, "tokens of each rank"] = 16384 if CUDA else 1024,
    shape: Shape = DEFAULT,
    rounds: int = 5 if CUDA else 3,
    warmup: int = 1,
    threads: int = torch.get_num_threads(),
) -> None:
    """Measures every kernel and pass."""
    records, clock = here.records("simulated_ring"), here.clock
    left_out: dict[str, str] = {}
    torch.set_num_threads(threads)
    with here.progress("simulated ring", len(backends) * len(passes)) as tick:
        for backend, name in product(backends, passes):
            case = Case(
                **asdict(shape), ranks=ring_ranks, rows=rows, backward=name == "bwd", backend=backend, threads=threads
            )
            try:
                for record in measure(case, rounds, warmup, clock, here.device):
                    records.add(record)
            except Exception as error:  # such as too little memory; the other kernels are still measured
                reason = str(error) if isinstance(error, BackendError) else f"{type(error).__name__}: {error}"
                left_out.setdefault(backend, reason.splitlines()[0])
                records.add(asdict(case), {"left_out": left_out[backend]})
            tick()
    numbers = "total_s expected_s loss kernel_s fixed_s fixed_bytes_per_s copy_bytes_per_s"
    records.show(f"{ring_ranks} zigzag ranks of {rows:,} tokens", f"backend dtype backward step calls {numbers}")
    for backend, reason in left_out.items():
        print(f"{backend} was left out: {reason}")
