"""Cost models: constants to begin with, and measuring instead. What is measured is returned, and kept nowhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from ringattn.comm.link_benchmark import measure_neighbour_link
from ringattn.comm.topology import resolve_group
from ringattn.cost.cost_model import Compute, CostModel, Link
from ringattn.errors import ArgumentError
from ringattn.geometry.tiles import Tile, Tiles
from ringattn.kernels import BackwardQueries, Gradients, Keys, ProblemSpec, Queries, select
from ringattn.plan.payload import AttentionShape
from ringattn.plan.workload import flops_per_pair
from ringattn.score import Score
from ringattn.softmax import accumulation_dtype, empty_state
from ringattn.types import Group

# What `model=None` means, by the type of device: a core of a server and gloo within a machine; a data-centre GPU with
# NVLink within a machine, and a network card for each GPU between machines. Orders of magnitude, no more.
DEFAULT_MODELS = {
    "cpu": CostModel(Link(100e-6, 1e9), Compute(30e9, 25e9, 4e9, 50e-6), Link(200e-6, 1e9)),
    "cuda": CostModel(Link(15e-6, 150e9), Compute(300e12, 200e12, 1500e9, 15e-6), Link(30e-6, 40e9)),
}


def default_model(device_type: str) -> CostModel:
    """Returns what `model=None` means on a type of device: constants that are orders of magnitude, no more.

    On "cpu": a core with 30 GFLOP/s, and gloo within a machine with 1 GB/s and 100 µs. On "cuda": a data-centre GPU
    with 300 TFLOP/s, 150 GB/s and 15 µs within a machine, 40 GB/s and 30 µs between machines.

    Args:
        device_type: as of a torch.device.
    Raises:
        ArgumentError: when there are no constants for it.
    """
    if device_type not in DEFAULT_MODELS:
        raise ArgumentError(
            f"model=None: there are no constants for tensors on {device_type!r}, but for those on "
            f"{', '.join(map(repr, DEFAULT_MODELS))}; pass a CostModel"
        )
    return DEFAULT_MODELS[device_type]


def measure_link(group: Group = None, *, device: torch.device | str | None = None) -> Link:
    """The latency and the bandwidth between neighbours of a group, measured now.

    All ranks of the group call it together, and get the same. It takes less than a second. The axes of a mesh are
    measured one by one, such as `measure_link(mesh["inner"])`.

    Args:
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the default group.
        device: where messages are; None is this process' GPU where there is one and the group takes it, or the CPU.
    Returns:
        a Link for a CostModel; of a group of one rank, one that costs nothing.
    Raises:
        ArgumentError: when there is no such group.
    Communication: some tens of MiB to a neighbour at most.
    """
    found = resolve_group(group)
    if found.size() == 1:
        return Link(0.0, float("inf"))
    on = torch.device(device) if device is not None else _device_of(found)
    return Link(*measure_neighbour_link(found, on))


def measure_compute(
    group: Group = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 64,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Compute:
    """What a rank computes in a second, measured now by small runs of the kernel that would be taken.

    All ranks of the group call it together, and compute at once: those that share cores, caches or memory slow each
    other down, as in a call. They get what the slowest of them has.

    Args:
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the default group.
        dtype: of queries, keys and values.
        head_dim: of all of them.
        device: where to compute; None is as in `measure_link`.
        backend: a name out of `ringattn info`; None takes the first that can.
    Returns:
        a Compute for a CostModel.
    Raises:
        ArgumentError: when there is no such group; BackendError when the backend cannot run this.
    Communication: a barrier before each run, sixteen in all; one all-gather of a few numbers.
    """
    found = resolve_group(group)
    on = torch.device(device) if device is not None else _device_of(found)
    return _measured(found, on, dtype, head_dim, backend)


def _measured(
    group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype, head_dim: int, backend: str | None
) -> Compute:
    heads, rows = (4, 512) if device.type == "cpu" else (16, 4096)
    score = Score(head_dim**-0.5)
    kernel = select(backend, ProblemSpec(device.type, dtype, heads, heads, head_dim, head_dim, True, score))
    q, k, v, dout = (torch.randn(1, rows, heads, head_dim, device=device).to(dtype) for _ in range(4))
    sums = accumulation_dtype(dtype)
    gradients = Gradients(*(torch.zeros(q.shape, dtype=sums, device=device) for _ in range(3)))
    keys, state = Keys(k, v), empty_state(q, head_dim)
    delta = torch.zeros_like(state.lse)

    def forward(num_rows: int) -> None:
        kernel.forward(Queries(q), keys, _square(num_rows), score, state)

    def backward(num_rows: int) -> None:
        queries = BackwardQueries(q, dout, state.lse, delta)
        kernel.backward(queries, keys, _square(num_rows), score, gradients)

    copied = torch.empty_like(gradients.dq)
    works = (partial(forward, 1), partial(forward, rows), partial(backward, rows), partial(copied.copy_, gradients.dq))
    launch_s, forward_s, backward_s, copy_s = _fastest(group, [_seconds(group, device, work) for work in works])
    shape = AttentionShape(1, heads, heads, head_dim, head_dim, dtype.itemsize, sums.itemsize)
    flops = [rows * rows * flops_per_pair(shape, backward=is_backward) for is_backward in (False, True)]
    return Compute(flops[0] / forward_s, flops[1] / backward_s, copied.nbytes / copy_s, launch_s)


def _square(num_rows: int) -> Tiles:
    return Tiles.of(Tile(0, num_rows, 0, num_rows, -num_rows, num_rows))


def _seconds(group: dist.ProcessGroup, device: torch.device, work: Callable[[], object]) -> list[float]:
    """Returns the seconds of a few runs, the first not counting. All ranks begin a run together."""
    seconds = []
    for _ in range(4):
        if group.size() > 1:
            dist.barrier(group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _fastest(group: dist.ProcessGroup, own: list[list[float]]) -> list[float]:
    """Returns the seconds of the fastest run of each work, a run being as fast as its slowest rank.

    Where ranks share a core, each may have it to itself in one of its runs: the others are slower then.
    """
    heard = [own] * group.size()
    if group.size() > 1:
        dist.all_gather_object(heard, own, group=group)
    return [max(min(map(max, zip(*runs, strict=True))), 1e-9) for runs in zip(*heard, strict=True)]


def _device_of(group: dist.ProcessGroup) -> torch.device:
    # Only the group of one process without torch.distributed has no backend.
    on_gpu = not dist.is_initialized() or "nccl" in str(dist.get_backend(group))
    has_gpu = torch.cuda.is_available() and on_gpu
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
