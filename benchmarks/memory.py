"""Peak memory: of ring attention per rank, and of chunked losses and tiled MLPs around attention.

`memory` keeps a rank's shard fixed, so that its result should not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import ringattn
from benchmarks.inputs import Shape, with_gradients
from benchmarks.profiling import peak_bytes
from benchmarks.registry import benchmark
from benchmarks.runner import Contender, DeviceClock, Session, time_in_turns
from ringattn.memory import chunked_cross_entropy, tiled


@dataclass(frozen=True)
class Case(Shape):
    """One causal problem; `rows` counts the tokens of each rank."""

    rows: int
    backward: bool

    def expected_bytes(self, world_size: int) -> int:
        """Returns the bytes that a call should take beyond its inputs.

        These are out and its fp32 state, lse, and two kv blocks; in the backward also the fp32 gradients of q, k and v,
        and one block of fp32 dk and dv in flight. One rank has no blocks in flight.
        """
        size = self.torch_dtype.itemsize
        q, kv = (self.rows * heads * self.head_dim for heads in (self.heads, 2 * self.kv_heads))
        blocks = 2 if world_size > 1 else 0
        forward = q * (size + 4) + self.rows * self.heads * 4 + blocks * kv * size
        return forward + (4 * (q + kv) + blocks // 2 * kv * 4 if self.backward else 0)


def measure(case: Case, group: dist.ProcessGroup | None = None, device: str = "cpu") -> int:
    """Returns the peak bytes of one call on this rank, beyond its inputs."""
    world_size = dist.get_world_size(group)
    layout = ringattn.zigzag(case.rows * world_size, world_size)
    ring = partial(ringattn.ring_attention, group=group, mask=ringattn.causal(), layout=layout)
    once = with_gradients(ring, case.random(case.rows, torch.device(device)), case.backward)
    once()
    return peak_bytes(once)


@benchmark("memory", help="peak memory of ring attention per rank beside the expected bytes", ranks=2)
def memory(here: Session, rows: int = 4096) -> None:
    """Measures each dtype, number of kv heads, and pass; reports the largest of all ranks."""
    records = here.records("memory")
    for dtype, kv_heads, backward in product(("float32", "bfloat16"), (8, 2), (False, True)):
        case = Case(8, kv_heads, 64, dtype, rows, backward)
        peak, expected = here.maximum(measure(case, None, str(here.device))), case.expected_bytes(here.world_size)
        found = {"peak_bytes": peak, "expected_bytes": expected, "peak_of_expected": peak / expected}
        records.add(vars(case), {"ranks": here.world_size}, found)
    records.show("peak memory", "ranks dtype kv_heads backward peak_bytes expected_bytes peak_of_expected")


@dataclass(frozen=True)
class ModuleCase:
    """One module of a model; `parts` counts the rows of a chunk or the tiles, None for the whole module at once."""

    module: str
    rows: int
    dim: int
    inner: int  # vocabulary of the loss, inner width of the MLP
    dtype: str
    parts: int | None


class GatedMLP(nn.Module):
    """A gated MLP, as in Llama."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*size, bias=False) for size in [(dim, inner)] * 2 + [(inner, dim)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


def _module_work(case: ModuleCase, device: torch.device) -> Callable[[], object]:
    """Returns a forward and backward of a module."""
    dtype, parts = getattr(torch, case.dtype), case.parts
    x = torch.randn(case.rows, case.dim, device=device).to(dtype).requires_grad_()
    weight = torch.randn(case.inner, case.dim, device=device).to(dtype).requires_grad_()
    labels, dout = torch.randint(case.inner, (case.rows,), device=device), torch.randn_like(x)
    module = GatedMLP(case.dim, case.inner).to(device, dtype)

    def mlp() -> object:
        out = module(x) if parts is None else tiled(module, x, num_tiles=parts)
        return torch.autograd.grad(out, [x, *module.parameters()], dout)

    def loss() -> object:
        if parts is None:
            value = F.cross_entropy(F.linear(x, weight).float(), labels)
        else:
            value = chunked_cross_entropy(x, weight, labels, chunk=parts)
        return torch.autograd.grad(value, [x, weight])

    return mlp if case.module == "mlp" else loss


def measure_modules(cases: Sequence[ModuleCase], rounds: int, device: torch.device) -> list[tuple[int, float]]:
    """Returns the peak bytes of each case, and its time relative to the first case."""
    works = [_module_work(case, device) for case in cases]
    for work in works:
        work()
    peaks = [peak_bytes(work) for work in works]
    contenders = [Contender(str(i), work, torch.get_num_threads()) for i, work in enumerate(works)]
    seconds = time_in_turns(contenders, rounds, 1, DeviceClock(device))
    return [(peak, 1 / seconds.ratio("0", str(i))) for i, peak in enumerate(peaks)]


@benchmark("memory-around", help="peak memory of the chunked loss and the tiled MLP, beside the whole modules")
def memory_around(
    here: Session,
    rows: int = 4096,
    dim: int = 128,
    vocabulary: int = 8192,
    inner: int = 512,
    chunks: Sequence[int] = (1024, 128),
    tiles: Sequence[int] = (4, 16),
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    rounds: int = 3,
) -> None:
    """Measures both modules, forward and backward; parts are rows of a chunk, or tiles."""
    records = here.records("memory_around")
    for (module, width, parts), dtype in product((("loss", vocabulary, chunks), ("mlp", inner, tiles)), dtypes):
        cases = [ModuleCase(module, rows, dim, width, dtype, part) for part in (None, *parts)]
        found = measure_modules(cases, rounds, here.device)
        for case, (peak, slower) in zip(cases, found, strict=True):
            measured = {"peak_bytes": peak, "peak_of_whole": peak / found[0][0], "time_of_whole": slower}
            records.add(vars(case), {"device": here.device.type}, measured)
    records.show("peak of a forward and backward", "module dtype parts peak_bytes peak_of_whole time_of_whole")
