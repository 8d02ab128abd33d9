"""Decoding over a cache that is spread over ranks: time by length, beside what memory can do and beside torch.

    torchrun --nproc-per-node=4 -m benchmarks.decode --tokens 8192 131072 1048576 --out results/decode

A layer of one sequence, as large as Llama 8B's by default. For each length, in turns: `decode_attention` of one new
token over all ranks; the kernel alone over what a rank holds; reading the same bytes, one rank alone and all at once;
and torch in one process with as many threads as there are ranks, over its own copy of keys and values. Then the merge
of partial results by itself, beside the three all-reduces of Tree Attention (Shyam et al. 2024, arXiv:2408.04093), and
the shortest length in a cache of eight times the pages. Every result is compared with what it should be.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import plots
from benchmarks.measure import Clock, Contender, Lines, progress, race
from benchmarks.merging import merges
from benchmarks.session import Session, session
from ringattn import DistributedKVCache, decode_attention
from ringattn.cache.pages import SlotAllocation
from ringattn.kernels import ProblemSpec, Queries
from ringattn.kernels.paged import Pools, VisibleKeys, select_paged
from ringattn.score import Score
from ringattn.softmax import empty_state

RINGATTN, KERNEL = "ringattn, all ranks", "the kernel alone"
READ_ALONE, READ_ALL = "raw read, one rank", "raw read, all ranks"
TORCH, PACKED = "torch, one process", "torch, heads packed as rows"
PLACES = "places and tables"  # once a step, for all layers
ROOMY, EXACT = "8 x the pages", "just enough pages"


@dataclass(frozen=True)
class Case:
    """One layer."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    page_size: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token."""
        return 2 * self.kv_heads * self.head_dim * self.torch_dtype.itemsize


class Filled:
    """A cache with one sequence, which grows: the same tokens again and again, so that results are known.

    Args:
        case: the layer.
        num_tokens: that it has room for.
        device: where it is.
        spare: how many times the pages that it needs.
    """

    PATTERN = 8192  # tokens, until they come again

    def __init__(self, case: Case, num_tokens: int, device: torch.device, spare: int = 1) -> None:
        pages = -(-(num_tokens + 1) // case.page_size)
        self.case, self.world_size = case, dist.get_world_size()
        self.cache = DistributedKVCache(
            num_layers=1, num_kv_heads=case.kv_heads, head_dim=case.head_dim, page_size=case.page_size,
            num_pages=spare * (-(-pages // self.world_size) + 1), dtype=case.torch_dtype, device=device,
        )  # fmt: skip
        self.sequence = self.cache.new()
        generator = torch.Generator().manual_seed(0)
        heads = (case.kv_heads, case.kv_heads, case.kv_heads, case.kv_heads, case.heads)
        rows = (self.PATTERN, self.PATTERN, 1, 1, 1)
        self.k, self.v, self.new_k, self.new_v, self.q = (
            torch.randn(1, n, h, case.head_dim, generator=generator).to(device, case.torch_dtype)
            for n, h in zip(rows, heads, strict=True)
        )

    def grow(self, num_tokens: int) -> None:
        """Adds tokens until there are so many."""
        while (length := self.cache.length(self.sequence)) < num_tokens:
            start = length % self.PATTERN
            stop = min(self.PATTERN, start + num_tokens - length)
            extension = self.cache.extend([self.sequence], stop - start)
            self.cache.write(0, extension, self.k[:, start:stop], self.v[:, start:stop])

    def decode(self, extension: SlotAllocation) -> Tensor:
        """Attends with the new token."""
        return decode_attention(self.q, self.new_k, self.new_v, self.cache, 0, extension)

    def kernel(self, extension: SlotAllocation) -> Callable[[], Tensor]:
        """Returns what runs the kernel over what this rank holds."""
        case, device, length = self.case, self.q.device, extension.starts[0] + 1
        score = Score(case.head_dim**-0.5)
        dims = (case.heads, case.kv_heads, case.head_dim, case.head_dim)
        chosen = select_paged(None, ProblemSpec(device.type, case.torch_dtype, *dims, False, score))
        first, stop = (torch.tensor([[x]], dtype=torch.int32, device=device) for x in (0, length))
        tables, pools = self.cache.page_tables(extension), Pools(*self.cache.pools(0))
        visible = VisibleKeys(first, stop)

        def once() -> Tensor:
            state = empty_state(self.q, case.head_dim)
            chosen.forward(Queries(self.q), pools, tables, visible, score, state)
            return state.out

        return once

    def read(self, extension: SlotAllocation) -> Callable[[], object]:
        """Returns what reads the bytes of as many pages as this rank has in use, from the first to the last."""
        used = len(self.cache.page_tables(extension).pages)
        words = [pool[:used].flatten().view(torch.float32) for pool in self.cache.storage(0)]
        return lambda: [x.sum() for x in words]

    def held(self, length: int) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of the whole sequence, the new token included, (1, H_kv, tokens, D): copies."""
        times = -(-length // self.PATTERN)
        pairs = ((self.k, self.new_k), (self.v, self.new_v))
        k, v = (torch.cat([x.repeat(1, times, 1, 1)[:, :length], new], 1).transpose(1, 2) for x, new in pairs)
        return k.contiguous(), v.contiguous()

    def expected(self, length: int) -> Tensor:
        """Returns the new token's result, (1, 1, H, D) fp32, from how often each token has come."""
        times = (length - torch.arange(self.PATTERN) + self.PATTERN - 1) // self.PATTERN
        k, v = (torch.cat(pair, 1)[0].cpu().float() for pair in ((self.k, self.new_k), (self.v, self.new_v)))
        q = self.q[0, 0].cpu().float().view(self.case.kv_heads, -1, self.case.head_dim)
        scores = torch.einsum("hgd,shd->hgs", q, k) * self.case.head_dim**-0.5
        scores += torch.cat([times, torch.ones(1)]).log()
        return torch.einsum("hgs,shd->hgd", scores.softmax(-1), v).flatten(0, 1)[None, None]

    def error(self, out: Tensor, length: int) -> float:
        """Returns the relative error of a result.

        Raises:
            AssertionError: when it is more than rounding explains.
        """
        expected = self.expected(length)
        error = float((out.cpu().float() - expected).norm() / expected.norm())
        if not error < max(2 * torch.finfo(self.case.torch_dtype).eps, 1e-5):
            raise AssertionError(f"{length} tokens: the result is off by {error:.2g} of itself")
        return error


def slowest(device: torch.device) -> Clock:
    """Returns a clock of the rank that took longest, from when all were ready."""

    def clock(work: Callable[[], object] | None) -> float:
        dist.barrier()
        start = time.perf_counter()
        if work is not None:
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
        taken = torch.tensor([time.perf_counter() - start], dtype=torch.float64, device=device)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return taken.item()

    return clock


def of_torch(filled: Filled, length: int, threads: int) -> list[Contender]:
    """Returns torch's own ways, which the first rank runs over a copy of everything."""
    k, v = filled.held(length)
    q, group = filled.q.transpose(1, 2), filled.case.heads // filled.case.kv_heads
    rows = q.reshape(1, filled.case.kv_heads, group, -1)

    def plain() -> Tensor:
        return scaled_dot_product_attention(q, k, v, enable_gqa=group > 1).transpose(1, 2)

    def packed() -> Tensor:
        return scaled_dot_product_attention(rows, k, v).flatten(1, 2)[:, None]

    for work in (plain, packed):
        filled.error(work(), length)
    return [Contender(TORCH, plain, threads), Contender(PACKED, packed, threads)]


def lengths(
    filled: Filled, tokens: list[int], torch_up_to: int, args: argparse.Namespace, here: Session
) -> list[dict[str, object]]:
    """Measures every length; the records are for the first rank."""
    records: list[dict[str, object]] = []
    for length in tokens:
        filled.grow(length)
        starts = []
        for _ in range(args.rounds):
            begun = time.perf_counter()
            extension = filled.cache.extend([filled.sequence])
            filled.cache.page_tables(extension)
            starts.append(time.perf_counter() - begun)
            filled.cache.truncate(filled.sequence, length)
        extension = filled.cache.extend([filled.sequence])
        error = filled.error(filled.decode(extension), length)
        read, first = filled.read(extension), here.rank == 0
        found = [
            Contender(RINGATTN, partial(filled.decode, extension), 1),
            Contender(KERNEL, filled.kernel(extension), 1),
            Contender(READ_ALONE, read if first else None, 1),
            Contender(READ_ALL, read, 1),
        ]
        names = [contender.name for contender in found]
        if length <= torch_up_to:
            names += [TORCH, PACKED]
            found += of_torch(filled, length, here.world_size) if first else [Contender(x, None, 1) for x in names[4:]]
        with progress(f"{length:>9,} tokens", len(found) * (args.rounds + 1), first) as tick:
            seconds = race(found, args.rounds, 1, tick, slowest(here.device))
        torch.set_num_threads(1)
        held = len(filled.cache.page_tables(extension).pages) * filled.case.page_size * filled.case.bytes_per_token
        whole = length * filled.case.bytes_per_token
        moved = dict.fromkeys(names, held) | {TORCH: whole, PACKED: whole, PLACES: 0}
        for name in (*names, PLACES):
            record = {"kind": "length", "tokens": length, "contender": name, "bytes": moved[name], "error": error}
            records.append(record | told(starts if name == PLACES else seconds[name]))
        filled.cache.truncate(filled.sequence, length)
    return records


def told(seconds: list[float]) -> dict[str, object]:
    """What is written down of the rounds."""
    return {"min_s": min(seconds), "median_s": statistics.median(seconds), "rounds_s": seconds}


def capacities(case: Case, length: int, rounds: int, here: Session) -> list[dict[str, object]]:
    """Measures the same length in two caches."""
    found = []
    for name, spare in ((EXACT, 1), (ROOMY, 8)):
        filled = Filled(case, length, here.device, spare)
        filled.grow(length)
        extension = filled.cache.extend([filled.sequence])
        found.append(Contender(name, partial(filled.decode, extension), 1))
    with progress("   capacity", 2 * (rounds + 1), here.rank == 0) as tick:
        seconds = race(found, rounds, 1, tick, slowest(here.device))
    return [{"kind": "capacity", "tokens": length, "contender": name, **told(s)} for name, s in seconds.items()]


def show(records: list[dict[str, object]], ranks: int) -> None:
    """Prints tables of the minima and medians."""
    rates = Table("tokens", "contender", "min ms", "median ms", "GB/s a rank", title=f"decoding, {ranks} ranks")
    others = Table("contender", "min µs", "median µs", title="merging, and capacity")
    for r in records:
        low, middle = float(str(r["min_s"])), float(str(r["median_s"]))
        if r["kind"] == "length":
            rate = f"{int(str(r['bytes'])) / low / 1e9:.2f}" if r["bytes"] else ""
            rates.add_row(f"{r['tokens']:,}", str(r["contender"]), f"{low * 1e3:.3f}", f"{middle * 1e3:.3f}", rate)
        else:
            others.add_row(str(r["contender"]), f"{low * 1e6:.0f}", f"{middle * 1e6:.0f}")
    for table in (rates, others):
        Console(width=110).print(table)


def main() -> None:
    """Measures by flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--torch-up-to", type=int, default=131072, help="tokens that torch gets a copy of, at most")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--merge-rounds", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("results/decode"))
    args = parser.parse_args()
    case = Case(args.heads, args.kv_heads, args.head_dim, args.dtype, args.page_size)
    tokens = sorted(args.tokens)
    with session() as here, torch.no_grad():
        records = merges(case.heads, case.head_dim, args.merge_rounds, here)
        records += capacities(case, tokens[0], args.rounds, here)
        records += lengths(Filled(case, tokens[-1], here.device), tokens, args.torch_up_to, args, here)
        if here.rank == 0:
            lines = Lines(args.out / "decode.jsonl")
            for record in records:
                lines.add({**asdict(case), "ranks": here.world_size, **record})
            show(records, here.world_size)
            plots.decode(lines.path, args.out / "decode.png")
            print(f"picture: {args.out / 'decode.png'}")


if __name__ == "__main__":
    main()
