"""Speed of every kernel, beside torch's own kernels and flash-attn where it is installed.

One process, one device, one call. For a backend, the time is one call of the kernel contract, which merges into an
existing fp32 state or adds to existing fp32 gradients. For a baseline it is its own forward, or its backward alone.
Rates count the area of the tiles only: 4 D operations for a (query, key) pair of a head forward, 2.5 times as many
backward. All contenders of a problem take turns, with a plain matrix product in the same dtype among them.

`times_torch` is the median of the rounds' ratios to torch's fastest way; `of_matmul` is the share of the matrix
product's rate; `of_dense` compares that share with the same contender's in the dense causal case.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from time import perf_counter
from typing import Annotated, Any

import torch
from torch import Tensor

from benchmarks import internals, plots
from benchmarks.kernel_baselines import Baseline, baselines
from benchmarks.kernel_cases import CASES, Problem
from benchmarks.registry import benchmark
from benchmarks.runner import PASSES, Contender, Session, Timings, time_in_turns
from ringattn.errors import BackendError
from ringattn.kernels import BACKENDS, BlockKernel

MATMUL = "matmul"
MIN_COSINE = 0.999  # between a contender's results and the first contender's
MAX_CALL_S = 30.0
CUDA = torch.cuda.is_available()
# The last kernel of the table is the reference, which is not made to be fast.
FAST = tuple(BACKENDS)[:-1]
CASES_HELP = "; ".join(f"{name}: {about}" for name, (about, _) in CASES.items())

Work = Callable[[], tuple[Tensor, ...]]
# The work, and the function that brings its results into the form (1, S, H, D).
Prepared = tuple[Work, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Entry:
    """A contender that computes the right result."""

    contender: Contender
    kind: str
    flops: float


def backend_work(kernel: BlockKernel, problem: Problem, tensors: Sequence[Tensor]) -> Work:
    """Returns one call of the contract: (out,) of the rows that the tiles cover, or (dq, dk, dv)."""
    q, k, v, dout = tensors
    tiles, state = problem.pattern.tiles, internals.new_state(q)
    if not problem.backward:

        def forward() -> tuple[Tensor, ...]:
            internals.forward(kernel, (q, k, v), tiles, state)
            return (state[0][:, tiles.bounding_box.q],)

        return forward
    internals.forward(kernel, (q, k, v), tiles, state)
    delta, gradients = internals.delta_of(dout, state[0]), internals.new_gradients((q, k, v))

    def backward() -> tuple[Tensor, ...]:
        internals.backward(kernel, (q, k, v), dout, state.lse, delta, tiles, gradients)
        return gradients

    return backward


def baseline_work(baseline: Baseline, problem: Problem, tensors: Sequence[Tensor]) -> Work:
    """Returns one forward, or one backward of a finished forward: (out,) or (dq, dk, dv) in the baseline's own form."""
    # Detached, because packing may return the same tensor, which other contenders use as well.
    q, k, v = (baseline.pack(x).detach().requires_grad_(problem.backward) for x in tensors[:3])
    if not problem.backward:
        return lambda: (baseline.attention(q, k, v),)
    dout = baseline.pack(tensors[3][:, problem.pattern.tiles.bounding_box.q])
    out = baseline.attention(q, k, v)
    return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def _candidates(
    problem: Problem, device: torch.device, backends: Sequence[str]
) -> Iterator[tuple[str, str, Callable[[], Prepared]]]:
    """Yields the name, the kind and the preparation of every possible contender, torch first."""
    tensors = problem.random(problem.seq_len, device)

    def prepare_baseline(baseline: Baseline) -> Prepared:
        return baseline_work(baseline, problem, tensors), baseline.unpack

    def prepare_backend(name: str) -> Prepared:
        kernel = internals.kernel_by_name(name, problem, device, problem.backward)
        return backend_work(kernel, problem, tensors), lambda x: x

    for baseline in baselines(problem, device):
        yield baseline.name, baseline.kind, partial(prepare_baseline, baseline)
    for name in backends:
        yield name, "backend", partial(prepare_backend, name)


def entries(problem: Problem, device: torch.device, backends: Sequence[str]) -> tuple[list[Entry], dict[str, str]]:
    """Tries every candidate once; returns the contenders, and why others are left out."""
    found, left_out = [_matmul(problem, device)], {}
    expected: list[Tensor] = []
    for name, kind, prepare in _candidates(problem, device, backends):
        try:
            work, unpack = prepare()
            taken, results = _timed_once(work, device)
            if taken > MAX_CALL_S:  # perhaps it compiled
                taken, results = _timed_once(work, device)
            results = [unpack(x.detach()) for x in results]
        except BackendError as error:
            left_out[name] = str(error)
            continue
        except Exception as error:  # another library may raise anything; the other contenders are still measured
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        expected = expected or [x.clone() for x in results]
        if taken > MAX_CALL_S:
            left_out[name] = f"a call took {taken:.0f} s; the limit is {MAX_CALL_S:.0f} s"
        elif (worst := min(map(cosine, results, expected))) < MIN_COSINE:
            left_out[name] = f"computed something else: the cosine to the first contender's results is {worst:.4f}"
        else:
            found.append(Entry(Contender(name, work, problem.threads), kind, problem.flops))
    return found, left_out


def _timed_once(work: Work, device: torch.device) -> tuple[float, Sequence[Tensor]]:
    """Returns the seconds of one call, which may include compilation, and its results."""
    start = perf_counter()
    results = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start, results


def cosine(a: Tensor, b: Tensor) -> float:
    """Returns the cosine between two tensors of one shape, -1 if either holds NaN."""
    x, y = a.flatten().float(), b.flatten().float()
    value = float((x @ y) / (x.norm() * y.norm()))
    return value if value == value else -1.0


def _matmul(problem: Problem, device: torch.device) -> Entry:
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, problem.dtype)) for _ in range(2))
    return Entry(Contender(MATMUL, lambda: a @ b, problem.threads), MATMUL, 2.0 * size**3)


def as_records(problem: Problem, found: Sequence[Entry], seconds: Timings) -> list[dict[str, Any]]:
    """Returns a record for each entry."""
    of_torch = [entry.contender.name for entry in found if entry.kind == "torch"]
    baseline = min(of_torch, key=seconds.median) if of_torch else None
    records = []
    for entry in found:
        name = entry.contender.name
        rates = {
            "flop_per_s": entry.flops / seconds.median(name),
            "times_torch": seconds.ratio(baseline, name) if baseline and entry.kind != MATMUL else None,
            "of_matmul": seconds.ratio(MATMUL, name) * entry.flops / found[0].flops,
        }
        case = {"contender": name, "kind": entry.kind, "area": problem.area, "flops": entry.flops, "baseline": baseline}
        records.append({**asdict(problem), **case, **rates, **seconds.summary(name)})
    return records


def _of_dense(record: dict[str, Any], dense: dict[tuple[Any, ...], float]) -> float | None:
    """Returns a record's share of the matmul rate over the same contender's dense share, which `dense` collects."""
    names = ("contender", "seq_len", "dtype", "heads", "kv_heads", "head_dim", "backward", "threads")
    key = tuple(record[name] for name in names)
    if record["case"] == "causal" and record["kind"] != MATMUL:
        dense[key] = record["of_matmul"]
    return record["of_matmul"] / dense[key] if key in dense else None


@benchmark("kernels", help="every kernel beside torch's own kernels and flash-attn, on one device")
def kernels(
    here: Session,
    cases: Annotated[Sequence[str], CASES, CASES_HELP] = tuple(CASES),
    backends: Annotated[Sequence[str], BACKENDS] = FAST,
    passes: Annotated[Sequence[str], PASSES] = PASSES,
    dtypes: Sequence[str] = ("bfloat16",) if CUDA else ("float32", "bfloat16"),
    lengths: Sequence[int] = (16384,) if CUDA else (2048,),
    heads: int = 16 if CUDA else 4,
    kv_heads: Sequence[int] = (16, 4) if CUDA else (4, 1),
    head_dims: Sequence[int] = (64, 128),
    rounds: int = 7 if CUDA else 3,
    warmup: int = 2 if CUDA else 0,
    threads: Sequence[int] = (torch.get_num_threads(),),
) -> None:
    """Measures every combination of the flags, the dense causal case first."""
    device = torch.cuda.get_device_name() if here.device.type == "cuda" else platform.machine()
    records, clock = here.records("kernels"), here.clock
    ordered = sorted(cases, key=list(CASES).index)
    settings = list(product(threads, dtypes, head_dims, kv_heads, lengths, passes, ordered))
    dense: dict[tuple[Any, ...], float] = {}
    first_left_out: dict[str, str] = {}
    common = {"device": device, "cpu": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
    with here.progress("kernels", len(settings)) as tick:
        for count, dtype, head_dim, kv, length, name, case in settings:
            problem = Problem(heads, kv, head_dim, dtype, case, length, name == "bwd", count)
            torch.set_num_threads(count)
            found, left_out = entries(problem, here.device, backends)
            seconds = time_in_turns([entry.contender for entry in found], rounds, warmup, clock)
            for record in as_records(problem, found, seconds):
                records.add(record, {"of_dense": _of_dense(record, dense)}, common)
            for contender, reason in left_out.items():
                records.add(asdict(problem), {"contender": contender, "left_out": reason}, common)
                first_left_out.setdefault(contender, f"{case}, {dtype}: {reason}")
            tick()
    numbers = "median_s flop_per_s times_torch of_matmul of_dense"
    records.show(device, f"case seq_len dtype head_dim heads kv_heads threads backward contender {numbers}")
    for contender, reason in first_left_out.items():
        print(f"{contender} was left out; first in {reason}")
    plots.kernels([record for record in records if "left_out" not in record], here.out / "kernels.png")
