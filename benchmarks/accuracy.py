"""How exact: the error of half and single precision against float64, for any number of ranks.

    torchrun --nproc-per-node=8 -m benchmarks.accuracy --out results/accuracy

The ranks are split into groups of 1, 2, 4, ... of them, and the same problem is solved by each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

import ringattn
from benchmarks.measure import Lines
from benchmarks.session import session

NAMES = ("out", "dq", "dk", "dv")


def solve(whole: list[Tensor], dtype: torch.dtype, group: dist.ProcessGroup) -> list[Tensor]:
    """Returns out, dq, dk, dv of the whole sequence, computed by the ranks of a group in `dtype`."""
    layout = ringattn.zigzag(whole[0].shape[1], group.size())
    q, k, v, dout = (ringattn.shard(x, layout, group).to(dtype) for x in whole)
    for x in (q, k, v):
        x.requires_grad_()
    out = ringattn.ring_attention(q, k, v, group, mask=ringattn.causal(), layout=layout)
    found = [out.detach(), *torch.autograd.grad(out, [q, k, v], dout)]
    return [ringattn.unshard(x, layout, group).double() for x in found]


def main() -> None:
    """Measures by flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path("results/accuracy"))
    args = parser.parse_args()
    with session() as here:
        generator = torch.Generator().manual_seed(0)
        shape = (1, args.seq_len, 4, 64)
        whole64 = [torch.randn(shape, generator=generator, dtype=torch.float64).to(here.device) for _ in range(4)]
        worlds = [w for w in (1, 2, 4, 8, 16) if w <= here.world_size]
        groups = {w: dist.new_group(list(range(w))) for w in worlds}
        lines = Lines(args.out / "accuracy.jsonl") if here.rank == 0 else None
        table = Table("dtype", "ranks", *NAMES, title="root mean square error over root mean square value")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            # The inputs are rounded first: what is measured is the computation, not its input.
            whole = [x.to(dtype).double() for x in whole64]
            for world in worlds:
                if here.rank < world:
                    exact = solve(whole, torch.float64, groups[world])
                    found = solve(whole, dtype, groups[world])
                    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
                    table.add_row(str(dtype), str(world), *(f"{error:.2e}" for error in errors))
                    if lines is not None:
                        lines.add({"dtype": str(dtype), "ranks": world, **dict(zip(NAMES, errors, strict=True))})
                dist.barrier()
        if lines is not None:
            Console(width=100).print(table)


if __name__ == "__main__":
    main()
