"""Peak memory of what stands around attention, forward and backward, whole and in parts: the loss, the MLP.

python -m benchmarks.memory_around --rows 4096 --out results/memory_around
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import Contender, Lines, OneDevice, peak_bytes, race, ratio
from ringattn.memory import chunked_cross_entropy, tiled


@dataclass(frozen=True)
class Case:
    """One module of a model; `parts` is the rows of a chunk, or the number of tiles, None for all at once."""

    module: str
    rows: int
    dim: int
    inner: int  # words of the loss, inner width of the MLP
    dtype: str
    parts: int | None


class Gated(nn.Module):
    """A gated MLP, as in Llama."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*size, bias=False) for size in [(dim, inner)] * 2 + [(inner, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """Returns a row for each row."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


def loss_work(case: Case, device: torch.device) -> Callable[[], object]:
    """Returns one forward and backward of the loss."""
    dtype = getattr(torch, case.dtype)
    hidden, weight = (
        torch.randn(size, case.dim, device=device).to(dtype).requires_grad_() for size in (case.rows, case.inner)
    )
    labels = torch.randint(case.inner, (case.rows,), device=device)

    def once() -> object:
        if case.parts is None:
            loss = F.cross_entropy(F.linear(hidden, weight).float(), labels)
        else:
            loss = chunked_cross_entropy(hidden, weight, labels, chunk=case.parts)
        return torch.autograd.grad(loss, [hidden, weight])

    return once


def mlp_work(case: Case, device: torch.device) -> Callable[[], object]:
    """Returns one forward and backward of the MLP."""
    dtype = getattr(torch, case.dtype)
    module = Gated(case.dim, case.inner).to(device, dtype)
    x = torch.randn(case.rows, case.dim, device=device).to(dtype).requires_grad_()
    dout = torch.randn_like(x)

    def once() -> object:
        out = module(x) if case.parts is None else tiled(module, x, num_tiles=case.parts)
        return torch.autograd.grad(out, [x, *module.parameters()], dout)

    return once


WORK = {"loss": loss_work, "mlp": mlp_work}


def measure(cases: Sequence[Case], rounds: int, device: torch.device) -> list[tuple[int, float]]:
    """Returns the peak bytes of each case, and its time over that of the first: the median of the rounds' ratios."""
    works = [WORK[case.module](case, device) for case in cases]
    for work in works:
        work()
    peaks = [peak_bytes(work) for work in works]
    contenders = [Contender(str(i), work, torch.get_num_threads()) for i, work in enumerate(works)]
    seconds = race(contenders, rounds, 1, lambda: None, OneDevice(device))
    return [(peak, 1 / ratio(seconds, "0", str(i))) for i, peak in enumerate(peaks)]


def main() -> None:
    """Measures by flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--words", type=int, default=8192)
    parser.add_argument("--inner", type=int, default=512, help="inner width of the MLP")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, 128], help="rows of the loss at a time")
    parser.add_argument("--tiles", type=int, nargs="+", default=[4, 16], help="tiles of the MLP")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/memory_around"))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = Lines(args.out / "memory_around.jsonl")
    table = Table("module", "dtype", "parts", "peak MiB", "of whole", "time of whole")
    for module, inner, parts in (("loss", args.words, args.chunks), ("mlp", args.inner, args.tiles)):
        for dtype in args.dtypes:
            cases = [Case(module, args.rows, args.dim, inner, dtype, part) for part in (None, *parts)]
            found = measure(cases, args.rounds, device)
            for case, (peak, slower) in zip(cases, found, strict=True):
                told = "whole" if case.parts is None else str(case.parts)
                shares = (f"{peak / 2**20:.1f}", f"{peak / found[0][0]:.3f}", f"{slower:.2f}")
                table.add_row(module, dtype, told, *shares)
                lines.add({**asdict(case), "device": device.type, "peak_bytes": peak, "time_of_whole": slower})
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
