"""Every exchange: time, bytes sent, communication that no computing hides, memory.

    python -m benchmarks exchanges --ranks 4 --exchanges ring gather-4
    python -m benchmarks network --hosts 4 --rate-mbit 100 -- -m benchmarks exchanges --exchanges ring gather-4

Each call runs in parts that take turns: whole; with messages that complete at once, which leaves the computing; with
kernels that do nothing, which leaves the transfer; and with both, which leaves copies and bookkeeping. The exposed time
is the difference between the whole and the computing. docs/performance.md explains the columns.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import ringattn
from benchmarks import plots
from benchmarks.inputs import LAYOUTS, Shape, packed_documents
from benchmarks.internals import IdleKernel, PlannedAttention, Start, replaced_start
from benchmarks.profiling import copying_seconds, peak_bytes
from benchmarks.registry import benchmark
from benchmarks.runner import PASSES, Contender, Session, Timings
from ringattn.comm.messages import Operation, PendingMessage
from ringattn.comm.topology import RankMesh, rank_mesh

WHOLE, COMPUTE, TRANSFER, OUTER, NEITHER = "whole", "compute", "transfer", "outer transfer", "neither"
COPY_RUNS = 5


@dataclass(frozen=True)
class ExchangeSpec:
    """The name of an exchange, its stages, and the axes of its mesh, if it needs one of two axes."""

    exchange: str
    stages: int = 1
    axes: tuple[str, ...] = ()


EXCHANGES = {
    "ring": ExchangeSpec("ring"),
    "double-ring": ExchangeSpec("ring", axes=("outer", "inner")),
    "gather": ExchangeSpec("gather"),
    "ulysses": ExchangeSpec("ulysses"),
    "hybrid": ExchangeSpec("hybrid", axes=("ring", "ulysses")),
}
STAGED = ("gather", "ulysses", "hybrid")
DEFAULT = ("ring", "double-ring", "gather", "gather-4", "ulysses", "ulysses-4", "hybrid")
MASKS: dict[str, Callable[[int], ringattn.Mask]] = {
    "full": lambda n: ringattn.full(),
    "causal": lambda n: ringattn.causal(),
    "window": lambda n: ringattn.sliding_window(n // 16 - 1),
    "documents": packed_documents,
}


def exchange_spec(name: str) -> ExchangeSpec:
    """Returns an exchange by its name: a key of EXCHANGES, with stages if wanted, such as gather-4."""
    base, _, stages = name.rpartition("-")
    if base in STAGED and stages.isdigit() and int(stages) > 0:
        return replace(EXCHANGES[base], stages=int(stages))
    if name not in EXCHANGES:
        raise ValueError(f"{name}: must be one of {', '.join(EXCHANGES)}, or {', '.join(STAGED)} with -N for N stages")
    return EXCHANGES[name]


def _checked(name: str) -> str:
    exchange_spec(name)
    return name


@dataclass(frozen=True)
class Case(Shape):
    """One call; seq_len counts the tokens of all ranks."""

    layout: str
    mask: str
    direction: str
    exchange: str
    seq_len: int


DEFAULT_SHAPE = Shape(8, 2, 64, "float32")


@contextmanager
def counted_messages(silent: Collection[dist.ProcessGroup] = ()) -> Iterator[list[int]]:
    """Yields a list that collects the bytes of every point-to-point message of this process.

    Args:
        silent: groups whose messages are not sent: they complete at once, and zeros have been received.
    """
    sent: list[int] = []

    def counting(original: Start) -> Start:
        def start(group: dist.ProcessGroup, operations: Sequence[Operation]) -> list[PendingMessage]:
            if group not in silent:
                sent.extend(message.tensor.nbytes for is_send, message in operations if is_send)
                return original(group, operations)
            for is_send, message in operations:
                if not is_send:
                    message.tensor.zero_()
            return [PendingMessage(message, None) for _, message in operations]

        return start

    with replaced_start(counting):
        yield sent


def device_bytes() -> tuple[int, int]:
    """Returns the network namespace of this process, and the bytes that its network devices have sent.

    The loopback, traffic of other programs, acknowledgements and headers are included.
    """
    files = Path("/sys/class/net").glob("*/statistics/tx_bytes")
    return os.stat("/proc/self/ns/net").st_ino, sum(int(file.read_text()) for file in files)


class Bench:
    """One case on this rank, in parts."""

    def __init__(self, case: Case, mesh: RankMesh, device: torch.device, gflops: float | None = None) -> None:
        mask, spec = MASKS[case.mask](case.seq_len), exchange_spec(case.exchange)
        layout = LAYOUTS[case.layout](mask, case.seq_len, mesh.size)
        q, k, v, self._dout = case.random(layout.num_tokens(mesh.rank), device, seed=mesh.rank)
        self._inputs = [x.requires_grad_() for x in (q, k, v)]
        planned = PlannedAttention(spec.exchange, (q, k, v), mesh, mask=mask, layout=layout, stages=spec.stages)
        self.case, self.planned = case, planned.bytes_sent()[PASSES.index(case.direction)]
        groups = [axis.group for axis in mesh.axes]
        computing = planned.forward(None if gflops is None else IdleKernel(gflops))
        idle = planned.forward(IdleKernel())
        self.parts = {
            WHOLE: self._part(computing, ()),
            COMPUTE: self._part(computing, groups),
            TRANSFER: self._part(idle, ()),
            **({OUTER: self._part(idle, groups[1:])} if len(groups) > 1 else {}),
            NEITHER: self._part(idle, groups),
        }

    def name(self, part: str) -> str:
        """Returns the name of a part among the contenders."""
        return f"{self.case.exchange}: {part}"

    def sent_bytes(self) -> dict[str, int]:
        """Returns the bytes of one run over all ranks: by the plan, as handed to process groups, and by devices."""
        dist.barrier()
        before = device_bytes()
        dist.barrier()
        with counted_messages() as messages:
            self.parts[WHOLE]()
        dist.barrier()
        changes = [(before[0], device_bytes()[1] - before[1])] * dist.get_world_size()
        dist.all_gather_object(changes, changes[0])
        both = torch.tensor([self.planned, sum(messages)], device=self._dout.device)
        dist.all_reduce(both)
        planned, posted = both.tolist()
        # Ranks in one namespace see the same counters.
        return {"planned_bytes": planned, "posted_bytes": posted, "device_bytes": sum(dict(changes).values())}

    def _part(self, forward: Callable[[], Tensor], silent: Collection[dist.ProcessGroup]) -> Callable[[], object]:
        out = forward() if self.case.direction == "bwd" else None

        def once() -> None:
            with counted_messages(silent):
                if out is None:
                    forward()
                else:
                    torch.autograd.grad(out, self._inputs, self._dout, retain_graph=True)

        return once


def _meshes(names: Sequence[str], here: Session, inner: int) -> dict[str, RankMesh]:
    """Returns the mesh of each exchange that can run on this number of ranks."""
    found = {}
    for name in names:
        axes = exchange_spec(name).axes
        if not axes:
            found[name] = rank_mesh(None)
        elif here.world_size % inner == 0 and 1 < inner < here.world_size:
            shape = (here.world_size // inner, inner)
            found[name] = rank_mesh(init_device_mesh(here.device.type, shape, mesh_dim_names=axes), axes)
        else:
            here.print(f"{name} is left out: {here.world_size} ranks make no mesh with an axis of --inner {inner}")
    return found


def _summary(bench: Bench, seconds: Timings, baseline: str) -> dict[str, float]:
    """Returns medians over the rounds, of each round's own differences and ratios."""
    rounds = {part: seconds[bench.name(part)] for part in bench.parts}

    def median(of: Callable[..., float], *parts: str) -> float:
        return statistics.median(of(*times) for times in zip(*(rounds[part] for part in parts), strict=True))

    slow = OUTER if OUTER in rounds else TRANSFER
    return {
        **{f"{part.replace(' ', '_')}_s": statistics.median(times) for part, times in rounds.items()},
        "times_first": seconds.ratio(baseline, bench.name(WHOLE)),
        "exposed_s": median(lambda whole, compute: whole - compute, WHOLE, COMPUTE),
        "exposed_of_transfer": median(lambda w, c, t: (w - c) / t, WHOLE, COMPUTE, TRANSFER),
        "over_ideal": median(lambda w, c, t: w / max(c, t), WHOLE, COMPUTE, slow),
        "neither_of_whole": median(lambda whole, neither: neither / whole, WHOLE, NEITHER),
    }


@benchmark("exchanges", help="every exchange x layout x mask: time, bytes, exposed communication, memory", ranks=2)
def exchanges(
    here: Session,
    exchanges: Annotated[Sequence[str], _checked, "-N: in N stages"] = DEFAULT,
    layouts: Annotated[Sequence[str], LAYOUTS] = tuple(LAYOUTS),
    masks: Annotated[Sequence[str], MASKS] = ("causal", "window", "documents"),
    passes: Annotated[Sequence[str], PASSES] = PASSES,
    seq_len: int = 2048,
    shape: Shape = DEFAULT_SHAPE,
    inner: Annotated[int, "ranks along the inner axis of a mesh"] = 2,
    idle_gflops: Annotated[float | None, "replace kernels by sleeping, as long as they would take at this rate"] = None,
    rounds: int = 5,
    warmup: int = 1,
) -> None:
    """Measures every exchange in every layout, mask and pass."""
    meshes, records = _meshes(exchanges, here, inner), here.records("exchanges")
    for group in product(layouts, masks, passes):
        cases = [
            Case(**vars(shape), layout=group[0], mask=group[1], direction=group[2], exchange=name, seq_len=seq_len)
            for name in meshes
        ]
        benches = [Bench(case, meshes[case.exchange], here.device, idle_gflops) for case in cases]
        contenders = [Contender(bench.name(part), once) for bench in benches for part, once in bench.parts.items()]
        seconds = here.time(" ".join(group), contenders, rounds, warmup)
        for bench in benches:
            whole, common = bench.parts[WHOLE], {"ranks": here.world_size, "idle_gflops": idle_gflops}
            found: dict[str, Any] = dict(_summary(bench, seconds, benches[0].name(WHOLE)))
            found["copies_s"] = statistics.median(copying_seconds(whole) for _ in range(COPY_RUNS))
            found["copies_of_kernels"] = found["copies_s"] / (found["compute_s"] - found["neither_s"])
            found |= {**bench.sent_bytes(), "peak_bytes": here.maximum(peak_bytes(whole))}
            records.add(asdict(bench.case), common, found)
    case, times = "layout mask direction exchange", "whole_s times_first compute_s transfer_s exposed_s"
    shares = "exposed_of_transfer over_ideal neither_of_whole copies_of_kernels"
    num_bytes = "planned_bytes posted_bytes device_bytes peak_bytes"
    records.show(f"exchanges, {here.world_size} ranks", f"{case} {times} {shares} {num_bytes}")
    if here.is_main:
        plots.exchanges(records, here.out / "exchanges.png")
