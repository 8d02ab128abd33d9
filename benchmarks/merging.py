"""Ways to merge the partial results of ranks: the package's own collectives, and Tree Attention's all-reduces."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measure import progress
from benchmarks.session import Session
from ringattn.comm.collectives import all_gather_packets, all_to_all_packets, packets_in_a_row
from ringattn.comm.packet import Field, Packet
from ringattn.softmax import merged

GATHER, BY_HEADS, TREE = "packed all-gather", "packed all-to-all", "three all-reduces"
IN_A_ROW = 10


def fields_of(heads: int, head_dim: int) -> list[Field]:
    """An output and a log-sum-exp for each head of one token, and a mark, as decode_attention sends them."""
    out = Field((1, 1, heads, head_dim), torch.float32)
    return [out, Field((1, heads, 1), torch.float32), Field((2,), torch.int32)]


def tree(out: Tensor, lse: Tensor) -> Tensor:
    """The largest lse of all ranks, then the sums of the numerators and of the denominators."""
    top = lse.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    weight = torch.exp(lse - top)
    numerator = out * weight.transpose(1, 2).unsqueeze(-1)
    dist.all_reduce(numerator)
    dist.all_reduce(weight)
    return numerator / weight.transpose(1, 2).unsqueeze(-1)


def ways(heads: int, head_dim: int, here: Session) -> dict[str, Callable[[], Tensor]]:
    """Returns the ways, each of which merges the same partial results, of which every rank has its own.

    All give the result to all ranks, but the packed all-to-all: each rank gets its heads.
    """
    generator = torch.Generator().manual_seed(here.rank)
    out = torch.randn(1, 1, heads, head_dim, generator=generator).to(here.device)
    lse = torch.randn(1, heads, 1, generator=generator).to(here.device)
    group, whole, own = dist.group.WORLD, fields_of(heads, head_dim), fields_of(heads // here.world_size, head_dim)
    assert group is not None

    def gather() -> Tensor:
        packet = Packet.empty(whole, here.device)
        for place, x in zip(packet.tensors, (out, lse), strict=False):
            place.copy_(x)
        packet.tensors[2].zero_()
        outs, lses, marks = all_gather_packets(packet, whole, group)
        assert marks.tolist().count([0, 0]) == here.world_size
        return merged(outs, lses)

    def by_heads() -> Tensor:
        packets = packets_in_a_row([own] * here.world_size, here.device)
        parts = zip(out.chunk(here.world_size, 2), lse.chunk(here.world_size, 1), strict=True)
        for packet, part in zip(packets, parts, strict=True):
            for place, x in zip(packet.tensors, part, strict=False):
                place.copy_(x)
            packet.tensors[2].zero_()
        outs, lses, marks = all_to_all_packets(packets, own, group, here.device)
        assert marks.tolist().count([0, 0]) == here.world_size
        return merged(outs, lses)

    found = {GATHER: gather, TREE: lambda: tree(out, lse)}
    return found if heads % here.world_size else {**found, BY_HEADS: by_heads}


def merges(heads: int, head_dim: int, rounds: int, here: Session) -> list[dict[str, object]]:
    """Measures them in turns, several calls in a row as in the layers of a model; times are those of this rank."""
    works = ways(heads, head_dim, here)
    expected = works[TREE]()
    for name, work in works.items():
        parts = expected.chunk(here.world_size, 2)
        torch.testing.assert_close(work(), parts[here.rank] if name == BY_HEADS else expected, atol=1e-5, rtol=1e-5)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    with progress("    merging", len(works) * rounds, here.rank == 0) as tick:
        for _, (name, work) in product(range(rounds), works.items()):
            dist.barrier()
            for _ in range(IN_A_ROW):
                start = time.perf_counter()
                work()
                if here.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
            tick()
    return [
        {"kind": "merge", "contender": name, "min_s": min(s), "median_s": statistics.median(s), "rounds_s": s}
        for name, s in seconds.items()
    ]
