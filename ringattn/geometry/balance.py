"""The balanced layout: chunks of positions assigned to ranks so that the work of a mask is even, with few rows sent."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ringattn.errors import LayoutError, check_integer
from ringattn.geometry.layout import Layout, check_sizes, join_ranges
from ringattn.geometry.masks import Mask
from ringattn.geometry.tiles import needed_blocks, work_of_ranges
from ringattn.types import Floats, Ints

# Accepted imbalance of the work, as a share of the mean. Less imbalance would cost traffic.
TOLERANCE = 0.02
# More chunks than this are assigned by their work alone: the table of which chunk needs which would be too large.
_MOST_CHUNKS = 1024
# The number of ranks, those with the least work, that a chunk may be swapped with.
_PARTNERS = 4


@lru_cache(maxsize=64, typed=True)
def balanced(mask: Mask, seq_len: int, world_size: int, chunk: int | None = None) -> Layout:
    """Assigns chunks of positions so that the work of this mask, and the number of tokens, are even over the ranks.

    Ranks start with consecutive chunks, which need the fewest rows of other ranks. While a rank has over 2 % more work
    than the mean, it swaps a chunk for a lighter one of another rank, and picks the swap with the most relief per
    additional row sent. A second search starts with two runs per rank, as in `zigzag`; the result with less traffic
    wins. If swaps do not reach 2 %, chunks are assigned from the heaviest to the lightest, each to the rank with the
    least work so far. Every rank has the same number of chunks, or one less.

    Args:
        mask: the mask of the attention calls; it decides the work of each chunk.
        seq_len: positions.
        world_size: ranks.
        chunk: positions in a chunk; None gives each rank about 32 chunks, or 16 beyond 32 ranks. More than 1024 chunks
            in all are assigned by their work alone: the search would take too long.
    Raises:
        LayoutError: when a number is not allowed.
        MaskError: when the mask does not fit the length.
    Source: the fallback is longest-processing-time-first scheduling, Graham 1969.
    """
    seq_len, world_size = check_sizes(seq_len, world_size)
    if chunk is None:
        chunk = max(1, -(-seq_len // ((32 if world_size <= 32 else 16) * world_size)))
    chunk = check_integer("chunk", chunk, 1, LayoutError)
    chunks = [range(a, min(a + chunk, seq_len)) for a in range(0, seq_len, chunk)]
    work = work_of_ranges(mask, chunks, seq_len)
    dealt = _heaviest_first(work, world_size)
    if len(chunks) <= _MOST_CHUNKS and work.any():
        sees = _who_sees_whom(mask, chunks, seq_len)
        limit = max(TOLERANCE, _imbalance(work, dealt, world_size))
        swaps = [_Swaps(sees, chunks, work, start).run() for start in _starts(len(chunks), world_size)]
        even = [s for s in swaps if _imbalance(work, s.owner, world_size) <= limit]
        dealt = min(even, key=lambda s: s.traffic).owner if even else dealt
    own: list[list[range]] = [[] for _ in range(world_size)]
    for owner, run in zip(dealt.tolist(), chunks, strict=True):
        own[owner].append(run)
    name = f"balanced({mask}, {seq_len}, {world_size}, chunk={chunk})"
    return Layout(seq_len, tuple(map(join_ranges, own)), name)


def _imbalance(work: Ints, owner: Ints, world_size: int) -> float:
    load = np.bincount(owner, weights=work, minlength=world_size)
    return float(load.max() * world_size / max(load.sum(), 1.0) - 1.0)


def _heaviest_first(work: Ints, world_size: int) -> Ints:
    """Assigns chunks by work alone: returns the rank of each chunk."""
    quota, longer = divmod(len(work), world_size)
    load = np.zeros(world_size, dtype=np.int64)
    taken = np.zeros(world_size, dtype=np.int64)
    owner = np.zeros(len(work), dtype=np.int64)
    for index in np.argsort(-work, kind="stable"):
        may_take_extra = np.count_nonzero(taken > quota) < longer
        open_ranks = np.flatnonzero(taken < quota + may_take_extra)
        rank = int(open_ranks[np.argmin(load[open_ranks])])
        owner[index] = rank
        load[rank] += work[index]
        taken[rank] += 1
    return owner


def _starts(num_chunks: int, world_size: int) -> tuple[Ints, Ints]:
    """Returns the assignments that swaps start from: one run of chunks per rank, and two per rank as in zigzag."""
    quota, longer = divmod(num_chunks, world_size)
    counts = np.full(world_size, quota) + (np.arange(world_size) < longer)
    first, ranks = counts // 2, np.arange(world_size)
    back = np.repeat(ranks[::-1], (counts - first)[::-1])
    return np.repeat(ranks, counts), np.concatenate([np.repeat(ranks, first), back])


def _who_sees_whom(mask: Mask, chunks: list[range], seq_len: int) -> Floats:
    """Returns [query chunk, key chunk]: 1 where a query of the one sees a key of the other, else 0."""
    each = Layout(seq_len, tuple((run,) for run in chunks), "a chunk each")
    return needed_blocks((mask,), each, each).T.astype(np.float64)


class _Swaps:
    """An assignment of chunks to ranks, improved by swapping pairs of chunks.

    Traffic is the number of positions that the queries of a rank see and that it does not hold, as a gather sends them.
    """

    def __init__(self, sees: Floats, chunks: list[range], work: Ints, start: Ints) -> None:
        self._sees = sees
        self._length = np.array([len(run) for run in chunks], dtype=np.float64)
        self._work = work.astype(np.float64)
        self.owner = start
        world_size = int(start.max()) + 1
        self._load: Floats = np.bincount(self.owner, weights=self._work, minlength=world_size).astype(np.float64)
        held = np.eye(world_size)[self.owner].T  # [rank, chunk]
        self._held: Floats = held
        self._seen: Floats = held @ self._sees  # [rank, chunk of keys]: how many of its chunks see them
        self._joins = np.stack([self._cost_of_joining(rank) for rank in range(world_size)])

    @property
    def traffic(self) -> float:
        """The number of positions that all ranks receive."""
        return float((((self._seen > 0) & (self._held == 0)) @ self._length).sum())

    def run(self) -> _Swaps:
        """Swaps until the work is even, or no swap makes it more even."""
        mean = self._load.mean()
        limit = (1 + TOLERANCE) * mean
        for _ in range(4 * len(self.owner)):
            heavy = int(np.argmax(self._load))
            if self._load[heavy] <= limit:
                break
            swap = self._best_swap(heavy, mean)
            if swap is None:
                break
            self._apply(heavy, *swap)
        return self

    def _best_swap(self, heavy: int, mean: float) -> tuple[int, int] | None:
        """Returns the best swap: a chunk of the rank with the most work, and a lighter chunk of another rank."""
        mine = np.flatnonzero(self.owner == heavy)
        lightest = np.argsort(self._load, kind="stable")[:_PARTNERS]
        others = np.flatnonzero(np.isin(self.owner, lightest[self._load[lightest] < mean]))
        if not len(others):
            return None
        to = self.owner[others]
        moved = self._work[mine][:, None] - self._work[others][None, :]
        # The excess that the heavy rank loses, minus the excess that the other rank gains.
        relief = np.minimum(moved, self._load[heavy] - mean) - np.maximum(self._load[to][None, :] + moved - mean, 0)
        relief[moved <= 0] = 0
        leaves_heavy, leaves_others = self._saved_by_leaving(mine), self._saved_by_leaving(others)
        cost = self._joins[to][:, mine].T - leaves_heavy[:, None]
        cost += (self._joins[heavy][others] - leaves_others)[None, :]
        cost = np.maximum(cost, 0) + self._length.mean()
        value = relief / cost
        best = int(np.argmax(value))
        a, b = divmod(best, len(others))
        return (int(mine[a]), int(others[b])) if relief[a, b] > 0 else None

    def _cost_of_joining(self, rank: int) -> Floats:
        """For every chunk: how many more positions the rank would receive if it held that chunk, too."""
        missing = (self._seen[rank] == 0) & (self._held[rank] == 0)
        cost: Floats = self._sees @ (missing * self._length)
        # The rank would hold the chunk itself, and not receive it.
        return cost - self._length * np.where(missing, self._sees.diagonal(), self._held[rank] == 0)

    def _saved_by_leaving(self, chunks: Ints) -> Floats:
        """For each of these chunks: how many fewer positions its rank would receive without it."""
        rank = self.owner[chunks]
        alone = (self._seen[rank] == self._sees[chunks]) & (self._held[rank] == 0)
        saved: Floats = (self._sees[chunks] * alone) @ self._length
        still_seen = self._seen[rank, chunks] > self._sees[chunks, chunks]
        return saved - self._length[chunks] * still_seen

    def _apply(self, heavy: int, mine: int, other: int) -> None:
        light = int(self.owner[other])
        for rank, leaves, joins in ((heavy, mine, other), (light, other, mine)):
            self.owner[joins] = rank
            self._load[rank] += self._work[joins] - self._work[leaves]
            self._held[rank, leaves], self._held[rank, joins] = 0, 1
            self._seen[rank] += self._sees[joins] - self._sees[leaves]
        for rank in (heavy, light):
            self._joins[rank] = self._cost_of_joining(rank)
