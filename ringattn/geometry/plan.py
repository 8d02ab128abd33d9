"""Plans: what one rank does, step by step, as pure data. One builder per exchange, one shape for all.

A *block* is the keys/values of one source rank, or their gradients; it is named by that rank. In a step a rank
attends to some tiles of one block, while the step's transfers are under way; what a step receives can be used from
the next step on, a gradient at the end of the same step. Every rank has the same number of steps, and a
transfer stands in the same step of its sender and of its receiver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

import numpy as np

from ringattn.errors import ArgumentError
from ringattn.geometry.layout import Layout
from ringattn.geometry.masks import Mask
from ringattn.geometry.tiles import NO_TILES, Tiles, needs, tiles_of_rank, work_of_ranks


class Payload(Enum):
    """What a transfer carries of a block."""

    KV = "kv"  # keys and values, in their own dtype
    DKV = "dkv"  # the sum so far of their gradients, in the accumulation dtype


@dataclass(frozen=True)
class Transfer:
    """One message: `payload` of the block of rank `block`, to or from rank `peer`."""

    payload: Payload
    block: int
    peer: int


@dataclass(frozen=True)
class Step:
    """Attend to `tiles` of `block`; meanwhile send and receive; afterwards keys/values in `frees` are done with."""

    block: int
    tiles: Tiles
    sends: tuple[Transfer, ...] = ()
    receives: tuple[Transfer, ...] = ()
    frees: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """One rank's steps, forward and backward.

    `forward` makes the output. `backward` makes the gradients: it moves the keys/values again, and their gradients
    along with them until they are home.
    """

    exchange: str
    rank: int
    world_size: int
    block_rows: tuple[int, ...]  # rows of each block
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    work: tuple[int, ...]  # (query, key) pairs of every rank, over the batch rows' masks

    @property
    def imbalance(self) -> float:
        """How much more work the busiest rank has than the average one: 0 is even, 1 is twice the average."""
        total = sum(self.work)
        return max(self.work) * self.world_size / total - 1.0 if total else 0.0

    def rows_sent(self, payload: Payload, steps: tuple[Step, ...]) -> int:
        """Returns how many block rows of `payload` this rank sends in `steps`."""
        return sum(self.block_rows[t.block] for step in steps for t in step.sends if t.payload is payload)

    def bytes_sent(self, kv_row_bytes: int, dkv_row_bytes: int = 0) -> tuple[int, int]:
        """Returns the bytes that this rank sends in (forward, backward).

        Args:
            kv_row_bytes: bytes of one row of keys and values together, over the whole batch.
            dkv_row_bytes: the same for the gradients, in the accumulation dtype; 0 if k and v need none.
        """
        forward = self.rows_sent(Payload.KV, self.forward) * kv_row_bytes
        backward = self.rows_sent(Payload.KV, self.backward) * kv_row_bytes
        return forward, backward + self.rows_sent(Payload.DKV, self.backward) * dkv_row_bytes

    @property
    def communicates(self) -> bool:
        """Whether this rank sends or receives anything at all."""
        return any(step.sends or step.receives for step in self.backward)

    def describe(self) -> str:
        """Returns a table of the steps for people to read."""
        lines = [
            f"{self.exchange} plan of rank {self.rank} of {self.world_size}: "
            f"work {self.work[self.rank]:,} pairs, imbalance {self.imbalance:.1%}"
        ]
        for name, steps in (("forward", self.forward), ("backward", self.backward)):
            for index, step in enumerate(steps):
                moves = [f"{t.payload.value}[{t.block}] → {t.peer}" for t in step.sends]
                moves += [f"{t.payload.value}[{t.block}] ← {t.peer}" for t in step.receives]
                lines.append(
                    f"  {name} {index}: block {step.block}, {len(step.tiles)} tiles, "
                    f"area {step.tiles.area():,}; {', '.join(moves) or 'nothing moves'}"
                )
        return "\n".join(lines)


def ring_plan(masks: tuple[Mask, ...], layout: Layout, kv_layout: Layout, rank: int) -> Plan:
    """Keys/values go round: in step t a rank attends to the block of rank - t and passes it on to rank + 1.

    A block stops at the last rank that needs it. In the backward its gradient follows one step behind, each rank
    adding its share, and goes home from where it stopped.

    Source: Liu et al. 2023, arXiv:2310.01889; Li et al. 2021, arXiv:2105.13120.
    """
    world = layout.world_size
    tiles = tiles_of_rank(masks, layout, kv_layout, rank)
    # reach[s]: how many hops block s travels, to the furthest rank that needs it.
    needed = needs(masks, layout, kv_layout)
    hops = (np.arange(world)[None, :] - np.arange(world)[:, None]) % world
    reach = np.where(needed, hops, 0).max(axis=1).tolist()
    after, before = (rank + 1) % world, (rank - 1) % world

    def block_at(step: int) -> int:
        return (rank - step) % world

    def kv_moves(step: int) -> tuple[list[Transfer], list[Transfer]]:
        held, coming = block_at(step), block_at(step + 1)
        sends = [Transfer(Payload.KV, held, after)] if reach[held] > step else []
        receives = [Transfer(Payload.KV, coming, before)] if reach[coming] > step else []
        return sends, receives

    def dkv_moves(step: int) -> tuple[list[Transfer], list[Transfer]]:
        sends, receives = [], []
        done, current = block_at(step - 1), block_at(step)
        if 1 <= step <= reach[done]:
            sends.append(Transfer(Payload.DKV, done, after))
        elif step == reach[done] + 1 and step > 1:
            sends.append(Transfer(Payload.DKV, done, done))
        if 1 <= step <= reach[current]:
            receives.append(Transfer(Payload.DKV, current, before))
        if step == reach[rank] + 1 and step > 1:
            receives.append(Transfer(Payload.DKV, rank, (rank + reach[rank]) % world))
        return sends, receives

    def attended(step: int) -> Tiles:
        return tiles.get(block_at(step), NO_TILES) if step < world else NO_TILES

    num_steps = max(reach) + 1
    forward = []
    for t in range(num_steps):
        sends, receives = kv_moves(t)
        forward.append(Step(block_at(t), attended(t), tuple(sends), tuple(receives)))
    backward = []
    for t in range(num_steps + 1 if num_steps > 1 else 1):
        kv_sends, kv_receives = kv_moves(t) if t < num_steps else ([], [])
        dkv_sends, dkv_receives = dkv_moves(t)
        here = attended(t) if t < num_steps else NO_TILES
        backward.append(Step(block_at(t), here, (*kv_sends, *dkv_sends), (*kv_receives, *dkv_receives)))
    return Plan(
        exchange="ring",
        rank=rank,
        world_size=world,
        block_rows=tuple(kv_layout.num_tokens(source) for source in range(world)),
        forward=_with_frees(forward, rank),
        backward=_with_frees(backward, rank),
        work=work_of_ranks(masks, layout, kv_layout.seq_len),
    )


def _with_frees(steps: Iterable[Step], rank: int) -> tuple[Step, ...]:
    """Says in each step which keys/values no later step attends to or sends."""
    steps = list(steps)
    last_use = {rank: 0}
    for index, step in enumerate(steps):
        arrived = [t.block for t in step.receives if t.payload is Payload.KV]
        sent = [t.block for t in step.sends if t.payload is Payload.KV]
        last_use.update(dict.fromkeys([*arrived, *sent], index))
        if step.tiles:
            last_use[step.block] = index
    frees: list[list[int]] = [[] for _ in steps]
    for block, index in last_use.items():
        frees[index].append(block)
    return tuple(
        Step(step.block, step.tiles, step.sends, step.receives, tuple(sorted(done)))
        for step, done in zip(steps, frees, strict=True)
    )


Builder = Callable[[tuple[Mask, ...], Layout, Layout, int], Plan]

# Every way of moving keys and values; a new one is a builder here.
EXCHANGES: dict[str, Builder] = {"ring": ring_plan}


@lru_cache(maxsize=128)
def build_plan(exchange: str, masks: tuple[Mask, ...], layout: Layout, kv_layout: Layout, rank: int) -> Plan:
    """Returns rank's plan, built once per combination of arguments.

    Args:
        exchange: a key of EXCHANGES.
        masks: one for all batch rows, or one for each.
        layout: who holds which queries.
        kv_layout: who holds which keys and values; of as many ranks as `layout`.
        rank: whose plan.
    Raises:
        ArgumentError: when the exchange has no builder.
        MaskError: when a mask does not fit the lengths of the layouts.
    """
    if exchange not in EXCHANGES:
        raise ArgumentError(f"exchange={exchange!r}: must be one of {', '.join(map(repr, EXCHANGES))}")
    return EXCHANGES[exchange](masks, layout, kv_layout, rank)
