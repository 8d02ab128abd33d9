"""What a mask costs: the time of structured masks beside full causal attention, and beside the share of its area.

torchrun --nproc-per-node=2 -m benchmarks.masks --seq-len 32768 --out results/masks
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import ringattn
from benchmarks.measure import Contender, Lines, progress, race, ratio
from benchmarks.session import Session, session
from ringattn.plan.exchanges import Ring, build_plan


@dataclass(frozen=True)
class Case:
    """A mask, and the layout that suits it."""

    name: str
    mask: Callable[[int], ringattn.Mask]
    layout: Callable[[ringattn.Mask, int, int], ringattn.Layout]


def packed_documents(seq_len: int) -> ringattn.Mask:
    """Documents of 128 tokens and up, with a long tail: the same ones on every rank."""
    generator = torch.Generator().manual_seed(0)
    lengths = (128 * torch.empty(seq_len // 128).exponential_(0.35, generator=generator).exp()).clamp(max=8192).long()
    ends = lengths.cumsum(0)
    return ringattn.documents([0, *ends[ends < seq_len].tolist(), seq_len])


CASES = (
    Case("causal", lambda n: ringattn.causal(), lambda m, n, w: ringattn.zigzag(n, w)),
    Case("window of 1,024", lambda n: ringattn.sliding_window(1023), lambda m, n, w: ringattn.contiguous(n, w)),
    Case("window of 4,096", lambda n: ringattn.sliding_window(4095), lambda m, n, w: ringattn.contiguous(n, w)),
    Case(
        "packed documents",
        lambda n: packed_documents(n) & ringattn.causal(),
        lambda m, n, w: ringattn.balanced(m, n, w),
    ),
    Case(
        "chunks of 2,048", lambda n: ringattn.chunked(2048) & ringattn.causal(), lambda m, n, w: ringattn.zigzag(n, w)
    ),
)


def contender(case: Case, seq_len: int, backward: bool, dtype: torch.dtype, here: Session) -> tuple[Contender, int]:
    """Returns one case as a contender, and its work: (query, key) pairs over all ranks."""
    mask = case.mask(seq_len)
    layout = case.layout(mask, seq_len, here.world_size)
    shape = (1, layout.num_tokens(here.rank), 8, 64)
    q, k, v = (torch.randn(shape, device=here.device).to(dtype).requires_grad_(backward) for _ in range(3))

    def once() -> object:
        out = ringattn.ring_attention(q, k, v, mask=mask, layout=layout)
        return torch.autograd.grad(out.sum(), [q, k, v]) if backward else out

    plan = build_plan(Ring(), (mask,), layout, layout, here.rank)
    return Contender(case.name, once, 1), sum(plan.work)


def main() -> None:
    """Measures by flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=32768)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/masks"))
    args = parser.parse_args()
    with session() as here:
        lines = Lines(args.out / "masks.jsonl") if here.rank == 0 else None
        table = Table("mask", "pass", "seconds", "× causal", "ideal by area", "of the ideal", title="what a mask costs")
        for backward in (False, True):
            name = "fwd+bwd" if backward else "fwd"
            pairs = [contender(case, args.seq_len, backward, getattr(torch, args.dtype), here) for case in CASES]
            with progress(name, len(pairs) * (args.rounds + args.warmup), here.rank == 0) as tick:
                seconds = race([racer for racer, _ in pairs], args.rounds, args.warmup, tick)
            for racer, work in pairs:
                faster, ideal = ratio(seconds, CASES[0].name, racer.name), pairs[0][1] / work
                median = statistics.median(seconds[racer.name])
                numbers = (f"{median:.3f}", f"{faster:.1f}", f"{ideal:.1f}", f"{faster / ideal:.0%}")
                table.add_row(racer.name, name, *numbers)
                if lines is not None:
                    record = {"mask": racer.name, "pass": name, "seq_len": args.seq_len, "ranks": here.world_size}
                    lines.add({**record, "median_s": median, "times_causal": faster, "ideal": ideal})
        if lines is not None:
            Console(width=110).print(table)
        dist.barrier()


if __name__ == "__main__":
    main()
