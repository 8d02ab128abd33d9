"""Layouts: the global positions that each rank holds, and their order.

A layout is a tuple of Python ranges for every rank. The *local rows* of a rank are its ranges, concatenated:

    contiguous(12, 2)   rank 0: 0 1 2 3 4 5         rank 1: 6 7 8 9 10 11
    zigzag(12, 2)       rank 0: 0 1 2 | 9 10 11     rank 1: 3 4 5 | 6 7 8
    striped(12, 2)      rank 0: 0 2 4 6 8 10        rank 1: 1 3 5 7 9 11
    striped(12, 2, 3)   rank 0: 0 1 2 | 6 7 8       rank 1: 3 4 5 | 9 10 11

Any length works with any world size: shards may be uneven or empty, and nothing is padded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ringattn.errors import ArgumentError, LayoutError, check_integer
from ringattn.types import Ints


class RangeTable(NamedTuple):
    """The ranges of a layout as parallel arrays, sorted by first position."""

    owner: Ints  # the rank
    start: Ints  # the first position
    step: Ints
    length: Ints  # the number of positions
    offset: Ints  # the local row of the first position


class OwnerSegments(NamedTuple):
    """Segments of consecutive positions with one owner each, in order of position."""

    owner: Ints
    start: Ints
    stop: Ints


@dataclass(frozen=True, eq=False)
class Layout:
    """Who holds which positions of a sequence: an immutable, hashable value, equal by content.

    Equal layouts have equal hashes in every process. A pickle holds the text.

    Args:
        seq_len: the number of positions, each held by exactly one rank.
        rank_ranges: for each rank its ranges, in the order of its local rows; ascending steps only.
        name: the call that made it, for messages.
        whole: whether every position is held; otherwise some may be held by no rank.
    Raises:
        LayoutError: when a position is held twice, by no rank, or lies outside the sequence.
    """

    seq_len: int
    rank_ranges: tuple[tuple[range, ...], ...]
    name: str = "Layout(...)"
    whole: bool = True
    # The content and the name, the same in every process; `parse_layout` reads it. A plain attribute, as in Mask.
    text: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.seq_len < 0:
            raise LayoutError(f"seq_len={self.seq_len}: a layout needs a length of 0 or more")
        if not self.rank_ranges:
            raise LayoutError("rank_ranges is empty: a layout needs at least one rank")
        ranges = tuple(tuple(r for r in own if len(r)) for own in self.rank_ranges)
        if any(r.step < 1 for own in ranges for r in own):
            raise LayoutError(f"{self.name}: ranges must ascend (step of 1 or more)")
        ranges = tuple(tuple(map(_canonical, own)) for own in ranges)
        object.__setattr__(self, "rank_ranges", ranges)
        triples = [[(r.start, r.stop, r.step) for r in own] for own in ranges]
        content = [self.seq_len, triples, self.name, self.whole]
        object.__setattr__(self, "text", json.dumps(content, separators=(",", ":")))
        held = [r for own in ranges for r in own]
        if any(r[0] < 0 or r[-1] >= self.seq_len for r in held):
            raise LayoutError(f"{self.name}: a range leaves the sequence of {self.seq_len} positions")
        holders = np.zeros(self.seq_len, dtype=np.int32)
        for r in held:
            holders[r.start : r.stop : r.step] += 1
        wrong = (holders != 1) if self.whole else (holders > 1)
        if wrong.any():
            position = int(np.flatnonzero(wrong)[0])
            raise LayoutError(
                f"{self.name}: position {position} is held {int(holders[position])} times; each must be held once"
            )

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return len(self.rank_ranges)

    def ranges(self, rank: int) -> tuple[range, ...]:
        """Returns the ranges of global positions that `rank` holds, in the order of its local rows."""
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"rank={rank}: {self.name} has ranks 0 to {self.world_size - 1}")
        return self.rank_ranges[rank]

    def num_tokens(self, rank: int) -> int:
        """Returns the number of positions that `rank` holds."""
        return sum(len(r) for r in self.ranges(rank))

    def positions(self, rank: int) -> Ints:
        """Returns the global position of each local row of `rank`, (num_tokens,) int64."""
        own = [np.arange(r.start, r.stop, r.step, dtype=np.int64) for r in self.ranges(rank)]
        return np.concatenate(own) if own else np.empty(0, dtype=np.int64)

    @cached_property
    def runs(self) -> RangeTable:
        """All ranges of all ranks, as arrays."""
        rows = []
        for rank, own in enumerate(self.rank_ranges):
            offset = 0
            for r in own:
                rows.append((rank, r.start, r.step, len(r), offset))
                offset += len(r)
        table = np.array(rows, dtype=np.int64).reshape(-1, 5)
        table = table[np.argsort(table[:, 1], kind="stable")]
        return RangeTable(*(np.ascontiguousarray(column) for column in table.T))

    @cached_property
    def segments(self) -> OwnerSegments:
        """The sequence as segments; neighbours have different owners, or unowned positions between them."""
        runs = self.runs
        single = (runs.step == 1) | (runs.length == 1)
        if single.all():
            owner, start, stop = runs.owner, runs.start, runs.start + runs.length
        else:
            # Interleaved ranges: look up the owner of every position.
            owner = np.full(self.seq_len, -1, dtype=np.int64)
            for rank, own in enumerate(self.rank_ranges):
                for r in own:
                    owner[r.start : r.stop : r.step] = rank
            start = np.flatnonzero(owner >= 0)
            owner, stop = owner[start], start + 1
        first, last = np.ones(len(owner), dtype=bool), np.ones(len(owner), dtype=bool)
        first[1:] = (owner[1:] != owner[:-1]) | (start[1:] != stop[:-1])
        last[:-1] = first[1:]
        return OwnerSegments(owner[first], start[first], stop[last])

    @cached_property
    def digest(self) -> str:
        """A digest of the content, 16 hexadecimal digits: equal layouts have equal digests in every process."""
        return hashlib.sha256(repr((self.seq_len, self.rank_ranges)).encode()).hexdigest()[:16]

    @cached_property
    def _hash(self) -> int:
        return hash(int(self.digest, 16))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Layout):
            return NotImplemented
        return self.seq_len == other.seq_len and self._hash == other._hash and self.rank_ranges == other.rank_ranges

    def __reduce__(self) -> tuple[Callable[[str], Layout], tuple[str]]:
        return parse_layout, (self.text,)

    def __repr__(self) -> str:
        return self.name


def _canonical(r: range) -> range:
    """Returns the equal range that ends after its last element, and has step 1 if it has one element."""
    return range(r.start, r[-1] + 1, r.step if len(r) > 1 else 1)


def check_sizes(seq_len: int, world_size: int) -> tuple[int, int]:
    """Returns both numbers as integers; raises LayoutError if one is not allowed."""
    return check_integer("seq_len", seq_len, 0, LayoutError), check_integer("world_size", world_size, 1, LayoutError)


def _even_ranges(seq_len: int, parts: int) -> list[range]:
    """Cuts the sequence into `parts` runs whose lengths differ by at most one, the longer ones first."""
    length, longer = divmod(seq_len, parts)
    cuts = [part * length + min(part, longer) for part in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(cuts)]


@lru_cache(maxsize=256, typed=True)
def contiguous(seq_len: int, world_size: int) -> Layout:
    """Rank r holds the r-th of `world_size` runs; their lengths differ by at most one position.

    Args:
        seq_len: positions, 0 or more.
        world_size: ranks, 1 or more.
    Raises:
        LayoutError: when a number is not allowed.
    """
    seq_len, world_size = check_sizes(seq_len, world_size)
    ranges = tuple((run,) for run in _even_ranges(seq_len, world_size))
    return Layout(seq_len, ranges, f"contiguous({seq_len}, {world_size})")


@lru_cache(maxsize=256, typed=True)
def zigzag(seq_len: int, world_size: int) -> Layout:
    """Rank r holds runs r and 2W-1-r of 2W runs, so that causal work is even.

        position  0 ........................................ seq_len
        rank      0    1    2    3    3    2    1    0

    Args:
        seq_len: positions, 0 or more.
        world_size: ranks, 1 or more.
    Raises:
        LayoutError: when a number is not allowed.
    Source: Llama 3's and Megatron-LM's context parallelism; Zhu's zigzag ring.
    """
    seq_len, world_size = check_sizes(seq_len, world_size)
    runs = _even_ranges(seq_len, 2 * world_size)
    ranges = tuple((runs[r], runs[2 * world_size - 1 - r]) for r in range(world_size))
    return Layout(seq_len, ranges, f"zigzag({seq_len}, {world_size})")


@lru_cache(maxsize=256, typed=True)
def striped(seq_len: int, world_size: int, block: int = 1) -> Layout:
    """Blocks of `block` positions are assigned to the ranks round-robin.

    With block=1 a rank holds every W-th position, as one range of step W.

    Args:
        seq_len: positions, 0 or more.
        world_size: ranks, 1 or more.
        block: positions in a block, 1 or more; the last block may be shorter.
    Raises:
        LayoutError: when a number is not allowed.
    Source: Brandon et al. 2023, arXiv:2311.09431.
    """
    seq_len, world_size = check_sizes(seq_len, world_size)
    block = check_integer("block", block, 1, LayoutError)
    name = f"striped({seq_len}, {world_size}, block={block})"
    if block == 1:
        return Layout(seq_len, tuple((range(r, seq_len, world_size),) for r in range(world_size)), name)
    period = block * world_size
    ranges = tuple(
        tuple(range(a, min(a + block, seq_len)) for a in range(r * block, seq_len, period)) for r in range(world_size)
    )
    return Layout(seq_len, ranges, name)


def join_ranges(runs: Iterable[range]) -> tuple[range, ...]:
    """Joins adjacent ranges of step 1 into one."""
    found: list[range] = []
    for run in runs:
        if found and found[-1].stop == run.start:
            found[-1] = range(found[-1].start, run.stop)
        else:
            found.append(run)
    return tuple(found)


@lru_cache(maxsize=64)
def parse_layout(text: str) -> Layout:
    """Returns the layout whose text this is."""
    seq_len, triples, name, whole = json.loads(text)
    return Layout(seq_len, tuple(tuple(range(*triple) for triple in own) for own in triples), name, whole)


def check_layout(layout: object, name: str, world_size: int) -> Layout:
    """Returns `layout` if it is a Layout for `world_size` ranks; raises ArgumentError or LayoutError otherwise."""
    if not isinstance(layout, Layout):
        raise ArgumentError(f"{name}={layout!r}: must be a Layout, such as zigzag(seq_len, world_size), or None")
    if layout.world_size != world_size:
        raise LayoutError(
            f"{name}={layout}: made for {layout.world_size} ranks, but the group has {world_size}; "
            f"make it with world_size={world_size}"
        )
    return layout
