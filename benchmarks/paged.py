"""The paged decode kernel on one GPU, replayed from a CUDA graph: its share of the rate of a plain copy.

One layer of Llama-3-8B's shape by default: 32 query heads, 8 kv heads of 128, bfloat16, one new token. Each case is a
length and a page size; pages are shuffled over the pool. The rate of the copy counts bytes read and written. Exits with
1 if a case misses the goal, with 2 without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product

import torch

from benchmarks.inputs import Shape
from benchmarks.internals import paged_forward, paged_kernel
from benchmarks.registry import benchmark
from benchmarks.runner import Contender, Session, time_in_turns
from ringattn.kernels import State
from ringattn.kernels.paged import PageTables, VisibleKeys

GOAL = 0.9  # of the rate of a copy
COPY_BYTES = 2 << 30


@dataclass(frozen=True)
class Case(Shape):
    """The sequences to decode."""

    length: int
    page_size: int
    batch: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values of all sequences."""
        return self.batch * self.length * self.bytes_per_token


class Problem:
    """The tensors of a case: random numbers, pages in random order."""

    def __init__(self, case: Case, device: torch.device) -> None:
        c, per_sequence, dtype = case, -(-case.length // case.page_size), case.torch_dtype
        self.case, entries = case, c.batch * per_sequence
        self.k, self.v = (
            torch.randn(entries, c.kv_heads, c.page_size, c.head_dim, dtype=dtype, device=device).transpose(1, 2)
            for _ in range(2)
        )
        self.q = torch.randn(c.batch, 1, c.heads, c.head_dim, dtype=dtype, device=device)
        slots = torch.arange(per_sequence * c.page_size, dtype=torch.int32, device=device)
        slots = torch.where(slots < c.length, slots, -1).reshape(per_sequence, c.page_size).repeat(c.batch, 1)
        starts = torch.arange(c.batch + 1, dtype=torch.int32, device=device) * per_sequence
        self.tables = PageTables(torch.randperm(entries, device=device).int(), slots, starts)
        stop = torch.full((c.batch, 1), c.length, dtype=torch.int32, device=device)
        self.visible = VisibleKeys(torch.zeros_like(stop), stop)
        self.out = torch.zeros(c.batch, 1, c.heads, c.head_dim, device=device)
        self.lse = torch.full((c.batch, c.heads, 1), -torch.inf, device=device)

    def attend(self, backend: str | None) -> None:
        """Runs one step of decoding in one layer."""
        kernel = paged_kernel(self.case, self.q.device, backend)
        self.out.zero_()
        self.lse.fill_(-torch.inf)
        paged_forward(kernel, self.q, (self.k, self.v), self.tables, self.visible, State(self.out, self.lse))

    def error(self) -> float:
        """Returns the largest difference to dense attention in fp32, in the first kv head of the first sequence."""
        group = self.case.heads // self.case.kv_heads
        entries = slice(0, int(self.tables.starts[1]))
        pages, seen = self.tables.pages[entries].long(), self.tables.slots[entries].flatten() >= 0
        k, v = (pool[pages, :, 0].flatten(0, 1)[seen].float() for pool in (self.k, self.v))
        scores = self.q[0, 0, :group].float() @ k.T * self.case.head_dim**-0.5
        return float((scores.softmax(-1) @ v - self.out[0, 0, :group]).abs().max())


def _captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Returns a CUDA graph of some work, which runs before on a stream of its own."""
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


LLAMA_8B = Shape(32, 8, 128, "bfloat16")


@benchmark("paged", help="the paged decode kernel on one GPU: its share of the rate of a plain copy")
def paged(
    here: Session,
    lengths: Sequence[int] = (32768, 131072, 1048576),
    page_sizes: Sequence[int] = (16, 64, 256),
    batch: int = 1,
    shape: Shape = LLAMA_8B,
    backend: str | None = None,
    rounds: int = 5,
) -> None:
    """Measures every length and page size."""
    if here.device.type != "cuda":
        print("torch sees no GPU: there is nothing to measure")
        raise SystemExit(2)
    source = torch.empty(COPY_BYTES, dtype=torch.int8, device=here.device)
    copy = partial(torch.empty_like(source).copy_, source)
    records, device = here.records("paged"), torch.cuda.get_device_name()
    for length, page_size in product(lengths, page_sizes):
        case = Case(**asdict(shape), length=length, page_size=page_size, batch=batch)
        problem = Problem(case, here.device)
        graph = _captured(partial(problem.attend, backend))
        contenders = [Contender("kernel", graph.replay), Contender("copy", copy)]
        seconds = time_in_turns(contenders, rounds, 1, here.clock)
        rate, copy_rate = case.num_bytes / seconds.median("kernel"), 2 * COPY_BYTES / seconds.median("copy")
        rates = {"bytes_per_s": rate, "copy_bytes_per_s": copy_rate, "of_copy": rate / copy_rate}
        records.add(asdict(case), seconds.summary("kernel"), rates, {"error": problem.error(), "device": device})
    records.show(device, "length page_size median_s bytes_per_s copy_bytes_per_s of_copy error")
    worst = min(r["of_copy"] if r["error"] < 1e-2 else 0.0 for r in records)
    print(f"goal {GOAL:.0%} of a copy: {'met' if worst >= GOAL else f'MISSED, worst {worst:.0%}'}")
    if worst < GOAL:
        raise SystemExit(1)
