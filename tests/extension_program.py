"""A mask, a layout, an exchange and a kernel from outside of the package, each run through attention and compile.

    torchrun --nproc-per-node=2 -m tests.extension_program

It shows that the change table of docs/architecture.md is true: nothing in the package is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import ringattn
from ringattn.cost.cost_model import CostModel
from ringattn.cost.lower_bound import LowerBound, transfer_s
from ringattn.geometry.masks import MaskTerm, register_mask
from ringattn.kernels import BACKENDS
from ringattn.kernels.reference import ReferenceKernel
from ringattn.plan.comm_pattern import CommPattern
from ringattn.plan.exchanges import Exchange, register_exchange, register_exchange_class
from ringattn.plan.exchanges.program_builder import ProgramBuilder
from ringattn.plan.plan import BlockSlice, Program
from ringattn.plan.workload import Workload
from ringattn.types import Ints
from tests.harness import oracle
from tests.harness.compare import assert_close

LENGTH = 37


# ---- a mask


def _list_slices(q_len: int, k_len: int, nearest: int, furthest: int) -> Ints:
    return np.array([[0, q_len, 0, k_len, -furthest, -nearest]], dtype=np.int64)


@register_mask(_list_slices)
def past_band(nearest: int, furthest: int) -> ringattn.Mask:
    """A query sees the keys from `furthest` to `nearest` positions back."""
    return ringattn.Mask((MaskTerm("past_band", (nearest, furthest)),))


# ---- a layout


def backwards(seq_len: int, world_size: int) -> ringattn.Layout:
    """The last rank holds the first run."""
    ranges = ringattn.contiguous(seq_len, world_size).rank_ranges
    return ringattn.Layout(seq_len, tuple(reversed(ranges)), f"backwards({seq_len}, {world_size})")


# ---- an exchange


@register_exchange_class
@dataclass(frozen=True, repr=False)
class Direct(Exchange):
    """Each block goes straight to each rank that needs it, as a whole, the nearest ranks first."""

    @property
    def name(self) -> str:
        return "direct"

    def program(self, pattern: CommPattern, rank: int, *, returns: bool) -> Program:
        world, needed, tiles = pattern.world_size, pattern.needed, pattern.tiles(rank)
        builder = ProgramBuilder(pattern, rank, world + 2)
        builder.compute_own((0, 0), tiles.get(rank))
        for hop in range(1, world):
            source, target = (rank - hop) % world, (rank + hop) % world
            if needed[source, rank]:
                builder.receive(hop - 1, BlockSlice(source), source=source)
                builder.compute(hop, BlockSlice(source), tiles[source])
                if returns:
                    builder.send_return(hop + 1, BlockSlice(source), to=source)
            if needed[rank, target]:
                builder.send(hop - 1, BlockSlice(rank), to=target)
                if returns:
                    builder.receive_return(hop + 1, BlockSlice(rank), source=target, until=hop + 1)
        return builder.program()

    def rows_moved(self, pattern: CommPattern) -> tuple[int, int]:
        rows = np.array(pattern.block_rows)
        moved = int((rows * (pattern.needed.sum(axis=1) - pattern.needed.diagonal())).sum())
        return moved, moved

    def lower_bound(self, workload: Workload, model: CostModel) -> LowerBound:
        needed, rows = workload.pattern.needed, workload.block_rows
        peers = needed.sum(axis=1) - needed.diagonal()
        num_bytes = rows * peers * (workload.row_bytes + workload.returning_row_bytes)
        busy_s = workload.compute_s(model, needed.sum(axis=0))
        link_s = float(transfer_s(num_bytes, model.link).max(initial=0.0))
        seconds = max(float(busy_s.max(initial=0.0)), link_s)
        held = float((rows * (workload.row_bytes + workload.returning_row_bytes)).max(initial=0)) * 2
        return LowerBound(
            seconds, workload.flops_of_ranks, busy_s, link_s, 0.0, num_bytes.astype(float), peers.astype(float), held
        )


register_exchange("direct", Direct)


# ---- a kernel


class Counting(ReferenceKernel):
    """The reference kernel, which counts its calls."""

    name = "counting"
    calls = 0

    def forward(self, *arguments: Any) -> None:
        Counting.calls += 1
        super().forward(*arguments)


BACKENDS["counting"] = Counting()


# ---- each of them, eagerly and compiled


def solve(call: Any, mask: ringattn.Mask, layout: ringattn.Layout) -> None:
    """Compares a call, forward and backward, with the oracle."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(5)
    q, k, v, dout = torch.randn(4, 1, LENGTH, 2, 8, generator=generator, dtype=torch.float64)
    positions = np.arange(LENGTH)
    allowed = np.zeros((LENGTH, LENGTH), dtype=bool)
    for q_start, q_stop, k_start, k_stop, lo, hi in mask.slices(LENGTH, LENGTH).tolist():
        band = positions[None, :] - positions[:, None]
        allowed[q_start:q_stop, k_start:k_stop] |= ((lo <= band) & (band <= hi))[q_start:q_stop, k_start:k_stop]
    dlse = torch.zeros(1, 2, LENGTH, dtype=torch.float64)
    expected = oracle.dense_gradients(q, k, v, torch.from_numpy(allowed)[None], dout, dlse)
    rows = torch.from_numpy(layout.positions(rank))
    local = [x[:, rows].clone().requires_grad_() for x in (q, k, v)]
    out: Tensor = call(*local, mask=mask, layout=layout)
    found = (out.detach(), *torch.autograd.grad(out, local, dout[:, rows]))
    for name, x in zip(("out", "dq", "dk", "dv"), found, strict=True):
        assert_close(x, getattr(expected, name)[:, rows], atol=1e-10, name=name)


def both(call: Any, mask: ringattn.Mask, layout: ringattn.Layout) -> None:
    """Runs a call eagerly and compiled."""
    solve(call, mask, layout)
    torch.compiler.reset()
    solve(torch.compile(call, backend="aot_eager", fullgraph=True), mask, layout)


def main() -> None:
    """Runs one of each."""
    dist.init_process_group("gloo")
    world, attention = dist.get_world_size(), ringattn.context_parallel_attention
    plain, contiguous = ringattn.causal(), ringattn.contiguous(LENGTH, world)
    both(attention, past_band(2, 9) & ringattn.causal(), contiguous)
    both(attention, plain, backwards(LENGTH, world))
    both(partial(attention, exchange=Direct()), plain, contiguous)
    both(partial(attention, exchange="direct"), plain, contiguous)
    both(partial(attention, backend="counting"), plain, contiguous)
    assert Counting.calls > 0
    q = torch.empty(1, contiguous.num_tokens(dist.get_rank()), 2, 8)
    choice = ringattn.explain(q, q, q, world, mask=past_band(2, 9), layout=contiguous)
    assert "direct" in {candidate.exchange for candidate in choice.candidates if candidate.prediction}
    print("a mask, a layout, an exchange and a kernel from outside")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
