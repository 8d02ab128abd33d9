"""A long random program on a cache: no wrong value, no lost page, no growing memory.

    torchrun --nproc-per-node=2 -m tests.cache.soak --operations 100000

Runs the operations of tests/cache/programs.py, the same on all ranks. Every so often it compares all keys and values
with dense tensors, counts the pages, fills unused slots with NaN, and compares attention with the oracle. Each part of
the program has another page size, and ends with every page free.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tests.cache.programs import Op, Runner, Setting
from tests.cache.test_programs import NAMES

PAGE_SIZES = (16, 1, 64, 3, 16)
MOST_SEQUENCES, MOST_TOKENS = 8, 300
# What the memory of a rank may grow by, from the second quarter to the last, which are 50,000 operations apart: the
# allocator's moods, and what is left of tables of signatures and plans that fill up. 84 bytes an operation are a leak.
# Shorter programs are over before the tables are full.
MOST_GROWTH_MIB, LEAST_OPERATIONS = 4.0, 30_000


class Soak(Runner):
    """Runs operations, and looks at their results every `every` operations."""

    def __init__(self, group: dist.ProcessGroup, setting: Setting, every: int) -> None:
        super().__init__(group, setting)
        self.every, self.number = every, 0

    def step(self, op: Op) -> None:
        """Does one operation; first makes room, where sequences have become too many or too long."""
        for sequence in [s for s, d in self.dense.items() if len(d.tokens) > MOST_TOKENS]:
            self.do_free(Op("free", sorted(self.dense).index(sequence)))
        if len(self.dense) > MOST_SEQUENCES:
            op = op._replace(name="free")
        self.do(op)
        self.number += 1
        if self.number % self.every == 0:
            self.poison(self.number // self.every)
            self.check()

    def compare(
        self, name: str, found: Tensor, q: Tensor, layer: int, sequence: int, start: int, op: Op, o: dict[str, object]
    ) -> None:
        if self.number % self.every == 0:
            super().compare(name, found, q, layer, sequence, start, op, o)


@dataclass
class Memory:
    """The resident memory of this rank over time, in MiB."""

    samples: list[float]

    def take(self) -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.samples.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        return self.samples[-1]

    def growth(self) -> float:
        """From the median of the second quarter to that of the last: caches of signatures are full by then."""
        quarter = max(1, len(self.samples) // 4)
        second, last = self.samples[quarter : 2 * quarter], self.samples[-quarter:]
        return statistics.median(last) - statistics.median(second or last)


def soak(group: dist.ProcessGroup, operations: int, every: int, seed: int, folder: str) -> tuple[int, float]:
    """Runs it on one rank, shows how far it is on the first; returns (numbers compared, growth in MiB)."""
    draw, memory, compared, done = random.Random(seed), Memory([]), 0, 0
    begin = time.perf_counter()
    names = (*NAMES, *NAMES, "decode", "prefill", "truncate", "evict")
    for part, page_size in enumerate(PAGE_SIZES):
        runner = Soak(group, Setting(page_size, 4 + 400 // page_size, folder=folder), every)
        for _ in range(operations * (part + 1) // len(PAGE_SIZES) - done):
            runner.step(Op(draw.choice(names), *(draw.randrange(100) for _ in range(3))))
            done += 1
            if done % max(1, operations // 50) == 0:
                used, rate = memory.take(), done / (time.perf_counter() - begin)
                if group.rank() == 0:
                    progress = (
                        f"{done:>7} of {operations} operations, {rate:.0f}/s, {(operations - done) / rate:.0f} s left"
                    )
                    pages = f"{sum(runner.cache.num_free_pages)} pages of {page_size} tokens free"
                    print(f"{progress}; {len(runner.dense)} sequences, {pages}, {used:.1f} MiB", flush=True)
        runner.cache.check_agreement()
        runner.finish()
        compared += runner.compared
    return compared, memory.growth()


def main() -> None:
    """Runs the soak under torchrun; fails if memory has grown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--every", type=int, default=10, help="operations between looks at all values")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    folders = [tempfile.mkdtemp(prefix="soak-") if group.rank() == 0 else ""]
    dist.broadcast_object_list(folders, group=group)
    compared, growth = soak(group, options.operations, options.every, options.seed, folders[0])
    print(f"rank {group.rank()}: {compared} numbers compared, memory grew by {growth:.2f} MiB", flush=True)
    assert compared > 0
    assert growth < MOST_GROWTH_MIB or options.operations < LEAST_OPERATIONS, f"memory grew by {growth:.2f} MiB"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
