"""Speed of causal ring attention beside one process, and beside ring-flash-attention where it is installed.

    torchrun --nproc-per-node=2 -m benchmarks.attention --lengths 4096 8192 16384 --out results/attention

Contenders, in one run and in turns: torch's own attention in one process with as many threads as there are ranks;
ringattn in one process with as many threads (what its kernel alone gains or costs); ringattn over all ranks with
one thread each; ring-flash-attention likewise, over torch's kernel and over ours. Ratios above 1 are faster than
torch in one process.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import ringattn
from benchmarks import peers, plots
from benchmarks.measure import Contender, Lines, progress, race, ratio
from benchmarks.session import session

TORCH, OWN, RING, PEER = "torch, one process", "ringattn, one process", "ringattn, ring", "ring-flash-attn"
PEER_OWN = f"{PEER}, our kernel"


@dataclass(frozen=True)
class Case:
    """One causal problem; seq_len counts all ranks' tokens."""

    seq_len: int
    dtype: str
    backward: bool
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64

    def whole(self, device: torch.device) -> list[Tensor]:
        """Returns q, k, v and dout of the whole sequence, the same on every rank."""
        generator = torch.Generator().manual_seed(0)
        shapes = [(self.batch, self.seq_len, h, self.head_dim) for h in (self.heads, self.kv_heads, self.kv_heads)]
        return [
            torch.randn(shape, generator=generator).to(device, getattr(torch, self.dtype))
            for shape in [*shapes, shapes[0]]
        ]


def contenders(case: Case, alone: dist.ProcessGroup | None, device: torch.device) -> tuple[list[Contender], str]:
    """Returns the contenders of a case on this rank, and why a peer is missing, if one is."""
    world = dist.get_world_size()
    layout = ringattn.zigzag(case.seq_len, world)
    everything = case.whole(device)
    local = [ringattn.shard(x, layout) for x in everything]
    mask = ringattn.causal()

    def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gqa = case.heads != case.kv_heads
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)

    def one_process(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ringattn.ring_attention(q, k, v, alone, mask=mask)

    def ring(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ringattn.ring_attention(q, k, v, mask=mask, layout=layout)

    found = [
        Contender(TORCH, work(torch_attention, everything, case) if alone is not None else None, world),
        Contender(OWN, work(one_process, everything, case) if alone is not None else None, world),
        Contender(RING, work(ring, local, case), 1),
    ]
    if case.heads != case.kv_heads:
        return found, "run here without GQA only"
    for name, backend in ((PEER, "sdpa"), (PEER_OWN, "native")):
        if isinstance(peer := peers.zigzag_ring_flash_attention(None, backend), str):
            return found, peer
        found.append(Contender(name, work(peer, local, case), 1))
    return found, ""


def work(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: list[Tensor], case: Case
) -> Callable[[], object]:
    """Returns a function that runs one forward, or one forward and backward."""
    q, k, v = (x.clone().requires_grad_(case.backward) for x in tensors[:3])

    def once() -> object:
        out = attention(q, k, v)
        return torch.autograd.grad(out, [q, k, v], tensors[3]) if case.backward else out

    return once


def main() -> None:
    """Runs the cases given by flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/attention"))
    args = parser.parse_args()
    with session() as here:
        cases = [
            Case(seq_len, dtype, backward, heads=args.heads, kv_heads=args.kv_heads, head_dim=args.head_dim)
            for seq_len, dtype, backward in product(args.lengths, args.dtypes, (False, True))
        ]
        alone = dist.new_group([0])
        alone = alone if here.rank == 0 else None
        lines = Lines(args.out / "speed.jsonl") if here.rank == 0 else None
        table = Table("tokens", "dtype", "pass", "contender", "seconds", "× torch", title="causal attention")
        missing = ""
        for case in cases:
            found, missing = contenders(case, alone, here.device)
            total = len(found) * (args.rounds + args.warmup)
            name = f"{case.seq_len:>6} {case.dtype:<8} {'fwd+bwd' if case.backward else 'fwd'}"
            with progress(name, total, here.rank == 0) as tick:
                seconds = race(found, args.rounds, args.warmup, tick)
            if lines is None:
                continue
            for contender in found:
                times = seconds[contender.name]
                faster = ratio(seconds, TORCH, contender.name)
                record = {**asdict(case), "contender": contender.name, "ranks": here.world_size, "ratio": faster}
                lines.add({**record, "median_s": statistics.median(times), "rounds_s": times})
                row = (str(case.seq_len), case.dtype, "fwd+bwd" if case.backward else "fwd", contender.name)
                table.add_row(*row, f"{statistics.median(times):.3f}", f"{faster:.2f}")
        if lines is not None:
            Console(width=120).print(table)
            plots.speed(lines.path, args.out / "speed.png")
            print(f"picture: {args.out / 'speed.png'}")
            if missing:
                print(f"{PEER} did not run: {missing}")


if __name__ == "__main__":
    main()
