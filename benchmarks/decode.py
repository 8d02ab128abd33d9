"""Decoding over a distributed cache: time by length, beside the speed of memory and beside torch.

One layer of one sequence, of Llama 8B's shape by default. For each length, in turns: `decode_attention` of one new
token over all ranks; the kernel alone over a rank's pages; reading the same bytes, on one rank alone and on all at
once; and torch in one process with a thread for each rank, over its own copy of keys and values. Then the merge of
partial results beside the three all-reduces of Tree Attention, and the shortest length in a cache with eight times the
pages. Every result is compared with the expected one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import plots
from benchmarks.inputs import Shape
from benchmarks.internals import new_state, paged_forward, paged_kernel
from benchmarks.merging import time_merges
from benchmarks.registry import benchmark
from benchmarks.runner import Contender, Session, Timings
from ringattn import DistributedKVCache, decode_attention
from ringattn.cache.pages import SlotAllocation
from ringattn.kernels.paged import VisibleKeys

RINGATTN, KERNEL = "ringattn, all ranks", "the kernel alone"
READ_ALONE, READ_ALL = "raw read, one rank", "raw read, all ranks"
TORCH, TORCH_PACKED = "torch, one process", "torch, heads packed as rows"
ALLOCATION = "slots and page tables"  # once per step, for all layers
LARGE, EXACT = "8 x the pages", "just enough pages"
STYLES = {
    RINGATTN: (plots.BLUE, "o", "-"),
    KERNEL: (plots.BLUE, "", ":"),
    READ_ALONE: (plots.GREY, "", "-"),
    READ_ALL: (plots.GREY, "", "--"),
    TORCH: (plots.RED, "s", "-"),
    TORCH_PACKED: (plots.ORANGE, "s", "-"),
}


@dataclass(frozen=True)
class Case(Shape):
    """One layer."""

    page_size: int


LLAMA_8B = Case(32, 8, 128, "bfloat16", 16)


class FilledCache:
    """A cache with one growing sequence that repeats the same tokens, so that results are known.

    Args:
        case: the layer.
        num_tokens: the capacity.
        device: of the cache.
        factor: how many times the needed pages it has.
    """

    PERIOD = 8192  # tokens

    def __init__(self, case: Case, num_tokens: int, device: torch.device, factor: int = 1) -> None:
        pages = -(-(num_tokens + 1) // case.page_size)
        self.case = case
        self.cache = DistributedKVCache(
            num_layers=1, num_kv_heads=case.kv_heads, head_dim=case.head_dim, page_size=case.page_size,
            num_pages=factor * (-(-pages // dist.get_world_size()) + 1), dtype=case.torch_dtype, device=device,
        )  # fmt: skip
        self.sequence = self.cache.new()
        generator = torch.Generator().manual_seed(0)
        shapes = [(self.PERIOD, case.kv_heads)] * 2 + [(1, case.kv_heads)] * 2 + [(1, case.heads)]
        self.k, self.v, self.new_k, self.new_v, self.q = (
            torch.randn(1, *shape, case.head_dim, generator=generator).to(device, case.torch_dtype) for shape in shapes
        )

    def grow(self, num_tokens: int) -> None:
        """Appends tokens up to a length."""
        while (length := self.cache.length(self.sequence)) < num_tokens:
            start = length % self.PERIOD
            stop = min(self.PERIOD, start + num_tokens - length)
            extension = self.cache.extend([self.sequence], stop - start)
            self.cache.write(0, extension, self.k[:, start:stop], self.v[:, start:stop])

    def num_pages(self, extension: SlotAllocation) -> int:
        """Returns how many pages this rank uses."""
        return len(self.cache.page_tables(extension).pages)

    def decode(self, extension: SlotAllocation) -> Tensor:
        """Attends with the new token."""
        return decode_attention(self.q, self.new_k, self.new_v, self.cache, 0, extension)

    def kernel(self, extension: SlotAllocation) -> Callable[[], Tensor]:
        """Returns a function that runs the kernel over this rank's pages."""
        case, device = self.case, self.q.device
        kernel = paged_kernel(case, device)
        first, stop = (torch.tensor([[x]], dtype=torch.int32, device=device) for x in (0, extension.starts[0] + 1))
        tables, pools, visible = self.cache.page_tables(extension), self.cache.pools(0), VisibleKeys(first, stop)

        def once() -> Tensor:
            state = new_state(self.q)
            paged_forward(kernel, self.q, pools, tables, visible, state)
            return state[0]

        return once

    def read(self, extension: SlotAllocation) -> Callable[[], object]:
        """Returns a function that reads as many bytes as this rank's used pages hold."""
        used = self.num_pages(extension)
        words = [pool[:used].flatten().view(torch.float32) for pool in self.cache.storage(0)]
        return lambda: [x.sum() for x in words]

    def whole(self, length: int) -> tuple[Tensor, Tensor]:
        """Returns copies of all keys and values with the new token, (1, H_kv, tokens, D)."""
        times = -(-length // self.PERIOD)
        pairs = ((self.k, self.new_k), (self.v, self.new_v))
        k, v = (torch.cat([x.repeat(1, times, 1, 1)[:, :length], new], 1).transpose(1, 2) for x, new in pairs)
        return k.contiguous(), v.contiguous()

    def expected(self, length: int) -> Tensor:
        """Returns the new token's result, (1, 1, H, D) fp32, from how often each token is in the cache."""
        times = (length - torch.arange(self.PERIOD) + self.PERIOD - 1) // self.PERIOD
        k, v = (torch.cat(pair, 1)[0].cpu().float() for pair in ((self.k, self.new_k), (self.v, self.new_v)))
        q = self.q[0, 0].cpu().float().view(self.case.kv_heads, -1, self.case.head_dim)
        scores = torch.einsum("hgd,shd->hgs", q, k) * self.case.head_dim**-0.5
        scores += torch.cat([times, torch.ones(1)]).log()
        return torch.einsum("hgs,shd->hgd", scores.softmax(-1), v).flatten(0, 1)[None, None]

    def error(self, out: Tensor, length: int) -> float:
        """Returns the relative error of a result; raises AssertionError if it exceeds rounding."""
        expected = self.expected(length)
        error = float((out.cpu().float() - expected).norm() / expected.norm())
        if not error < max(2 * torch.finfo(self.case.torch_dtype).eps, 1e-5):
            raise AssertionError(f"{length} tokens: the relative error of the result is {error:.2g}")
        return error


def _torch_contenders(filled: FilledCache, length: int, threads: int) -> list[Contender]:
    """Returns torch's own attention, which the first rank runs over a copy of everything."""
    k, v = filled.whole(length)
    q, group = filled.q.transpose(1, 2), filled.case.heads // filled.case.kv_heads
    rows = q.reshape(1, filled.case.kv_heads, group, -1)

    def plain() -> Tensor:
        return scaled_dot_product_attention(q, k, v, enable_gqa=group > 1).transpose(1, 2)

    def packed() -> Tensor:
        return scaled_dot_product_attention(rows, k, v).flatten(1, 2)[:, None]

    for work in (plain, packed):
        filled.error(work(), length)
    return [Contender(TORCH, plain, threads), Contender(TORCH_PACKED, packed, threads)]


def _measure_length(
    filled: FilledCache, length: int, with_torch: bool, rounds: int, here: Session
) -> list[dict[str, Any]]:
    filled.grow(length)
    allocation: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        filled.cache.page_tables(filled.cache.extend([filled.sequence]))
        allocation.append(time.perf_counter() - start)
        filled.cache.truncate(filled.sequence, length)
    extension = filled.cache.extend([filled.sequence])
    error, read = filled.error(filled.decode(extension), length), filled.read(extension)
    contenders = [
        Contender(RINGATTN, partial(filled.decode, extension)),
        Contender(KERNEL, filled.kernel(extension)),
        Contender(READ_ALONE, read if here.is_main else None),
        Contender(READ_ALL, read),
    ]
    if with_torch and here.is_main:
        contenders += _torch_contenders(filled, length, here.world_size)
    elif with_torch:
        contenders += [Contender(name, None) for name in (TORCH, TORCH_PACKED)]
    seconds = here.time(f"{length:>9,} tokens", contenders, rounds)
    torch.set_num_threads(1)
    seconds[ALLOCATION] = allocation
    held, whole = filled.num_pages(extension) * filled.case.page_size, {TORCH: length, TORCH_PACKED: length}
    tokens_read = {**dict.fromkeys(seconds, held), **whole, ALLOCATION: 0}
    filled.cache.truncate(filled.sequence, length)
    records = _records("length", seconds, tokens=length, error=error)
    for record in records:
        num_bytes = tokens_read[record["contender"]] * filled.case.bytes_per_token
        record |= {"read_bytes": num_bytes, "bytes_per_s": num_bytes / record["min_s"] if num_bytes else None}
    return records


def _records(kind: str, seconds: Timings, **common: object) -> list[dict[str, Any]]:
    return [{"kind": kind, "contender": name, **common, **seconds.summary(name)} for name in seconds]


def _measure_capacities(case: Case, length: int, rounds: int, here: Session) -> list[dict[str, Any]]:
    """Measures the same length in two caches."""
    contenders = []
    for name, factor in ((EXACT, 1), (LARGE, 8)):
        filled = FilledCache(case, length, here.device, factor)
        filled.grow(length)
        contenders.append(Contender(name, partial(filled.decode, filled.cache.extend([filled.sequence]))))
    seconds = here.time("   capacity", contenders, rounds)
    return _records("capacity", seconds, tokens=length)


@benchmark("decode", help="decoding over a distributed cache beside raw reads and torch; the merge of ranks", ranks=4)
@torch.no_grad()
def decode(
    here: Session,
    tokens: Sequence[int] = (8192, 32768, 131072),
    case: Case = LLAMA_8B,
    torch_up_to: int = 131072,
    rounds: int = 9,
    merge_rounds: int = 100,
) -> None:
    """Measures the merge, the capacities and every length; the slowest rank's time counts."""
    lengths = sorted(tokens)
    found = _records("merge", time_merges(case, merge_rounds, here))
    found += _measure_capacities(case, lengths[0], rounds, here)
    filled = FilledCache(case, lengths[-1], here.device)
    for length in lengths:
        found += _measure_length(filled, length, length <= torch_up_to, rounds, here)
    records = here.records("decode")
    for record in found:
        records.add(asdict(case), {"ranks": here.world_size}, record)
    records.show(f"decoding, {here.world_size} ranks", "kind tokens contender min_s median_s bytes_per_s")
    if here.is_main:
        plots.decode([r for r in records if r["kind"] == "length"], STYLES, here.out / "decode.png")
