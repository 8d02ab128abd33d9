"""Peak memory of ring attention per rank, beside what it should be, for a fixed shard on any number of ranks.

torchrun --nproc-per-node=4 -m benchmarks.memory --rows 4096 --out results/memory
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import ringattn
from benchmarks.measure import Lines, peak_bytes
from benchmarks.session import session


@dataclass(frozen=True)
class Case:
    """One causal problem; `rows` are those of each rank."""

    rows: int
    dtype: str
    backward: bool
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64

    def due(self, world_size: int) -> int:
        """Returns the bytes that a call should take beyond its inputs.

        out and its fp32 state, lse, two kv blocks; in backward also the fp32 gradients of q, k and v, and one block
        of fp32 dk and dv in flight. One rank alone has no blocks in flight.
        """
        size = torch.empty(0, dtype=getattr(torch, self.dtype)).element_size()
        q, kv = (self.rows * heads * self.head_dim for heads in (self.heads, 2 * self.kv_heads))
        blocks = 2 if world_size > 1 else 0
        forward = q * (size + 4) + self.rows * self.heads * 4 + blocks * kv * size
        return forward + (4 * (q + kv) + blocks // 2 * kv * 4 if self.backward else 0)


def measure(case: Case, group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> int:
    """Returns the peak bytes of one call on this rank, beyond its inputs."""
    world = dist.get_world_size(group)
    layout = ringattn.zigzag(case.rows * world, world)
    dtype = getattr(torch, case.dtype)
    shapes = [(1, case.rows, heads, case.head_dim) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
    q, k, v, dout = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    for x in (q, k, v):
        x.requires_grad_(case.backward)

    def once() -> object:
        out = ringattn.ring_attention(q, k, v, group, mask=ringattn.causal(), layout=layout)
        return torch.autograd.grad(out, [q, k, v], dout) if case.backward else out

    once()
    return peak_bytes(once)


def main() -> None:
    """Measures by flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="tokens on each rank")
    parser.add_argument("--out", type=Path, default=Path("results/memory"))
    args = parser.parse_args()
    with session() as here:
        lines = Lines(args.out / f"memory_{here.world_size}.jsonl") if here.rank == 0 else None
        table = Table("ranks", "dtype", "kv heads", "pass", "peak MiB", "due MiB", "peak / due")
        for dtype in ("float32", "bfloat16"):
            for kv_heads in (8, 2):
                for backward in (False, True):
                    case = Case(args.rows, dtype, backward, kv_heads=kv_heads)
                    peak = torch.tensor([measure(case, device=here.device)], device=here.device)
                    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
                    due = case.due(here.world_size)
                    row = (f"{int(peak) / 2**20:.1f}", f"{due / 2**20:.1f}", f"{int(peak) / due:.3f}")
                    name = "fwd+bwd" if backward else "fwd"
                    table.add_row(str(here.world_size), dtype, str(kv_heads), name, *row)
                    if lines is not None:
                        lines.add({**asdict(case), "ranks": here.world_size, "peak_bytes": int(peak), "due_bytes": due})
        if lines is not None:
            Console(width=100).print(table)


if __name__ == "__main__":
    main()
