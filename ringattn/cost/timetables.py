"""Timetables written straight from who needs what of whom: those of the programs, of all ranks at once.

Steps, messages and waits are those that `exchanges/` and the executor have, which tests compare. What is not known
without tiles is estimated: a part of the rows is taken to hold as great a part of the work.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ringattn.cost.ring_timetable import write_ring
from ringattn.cost.timetable import AFTER, NONE, Draft, Timetable
from ringattn.geometry.layout import Layout
from ringattn.geometry.masks import K_START, Q_START, Mask
from ringattn.plan.comm_pattern import CommPattern
from ringattn.plan.comm_volume import pairs_by_half, pairs_by_rank, pairs_of_ranks
from ringattn.plan.exchanges import Exchange, Gather, Ring
from ringattn.plan.exchanges.ring_schedule import RingSchedule
from ringattn.plan.payload import AttentionShape
from ringattn.plan.plan import Phase
from ringattn.types import Floats, Ints


@dataclass(frozen=True)
class Scene:
    """What a direction of a call is about.

    Args:
        masks, layout, kv_layout: of the call.
        sizes: of the tensors.
        phase: the direction, and what travels.
        wanted: whether gradients of (q, k or v) are.
    """

    masks: tuple[Mask, ...]
    layout: Layout
    kv_layout: Layout
    sizes: AttentionShape
    phase: Phase
    wanted: tuple[bool, bool]

    @property
    def travel(self) -> CommPattern:
        """Who needs what of whom."""
        return CommPattern(self.phase.carried, self.masks, self.layout, self.kv_layout)

    @property
    def flops(self) -> Floats:
        """What each rank computes with each block: (world, world), [rank, block]."""
        return self._flops(pairs_by_rank(self.masks, self.layout, self.kv_layout))

    @property
    def flops_of_halves(self) -> tuple[Floats, Floats]:
        """The same with each half of it, cut as by `rows.halves`."""
        outer, middle = pairs_by_half(self.masks, self.layout, self.kv_layout, self.travel.column)
        return self._flops(outer), self._flops(middle)

    @property
    def flops_of_ranks(self) -> Floats:
        """What each rank computes in all: (world,)."""
        staying = K_START if self.phase is Phase.BACKWARD_BY_QUERIES else Q_START
        return self._worth(pairs_of_ranks(self.masks, self.layout, self.kv_layout, staying))

    def _flops(self, pairs: Ints) -> Floats:
        return self._worth(pairs.T if self.phase is Phase.BACKWARD_BY_QUERIES else pairs)

    def _worth(self, pairs: Ints) -> Floats:
        copies = self.sizes.batch if len(self.masks) == 1 else 1
        return pairs.astype(np.float64) * (copies * flops_per_pair(self.sizes, self.phase))

    @property
    def block_rows(self) -> tuple[int, ...]:
        """Rows of each rank's block."""
        return self.travel.block_rows

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of what travels."""
        return self.sizes.row_bytes(self.phase.carried)

    @property
    def sum_row_bytes(self) -> int:
        """Bytes of a row of its gradients; 0 where they do not travel."""
        home = self.wanted[0 if self.phase is Phase.BACKWARD_BY_QUERIES else 1]
        return self.sizes.row_bytes(self.phase.carried.gradient) if self.phase.is_backward and home else 0


def flops_per_pair(sizes: AttentionShape, phase: Phase) -> int:
    """Returns what one (query, key) pair costs over all heads: two products forward, and five backward."""
    d, v = sizes.head_dim, sizes.v_head_dim
    return 2 * sizes.heads * (3 * d + 2 * v if phase.is_backward else d + v)


def timetable_for(exchange: Exchange, scene: Scene) -> Timetable:
    """Returns the timetable of an exchange's programs.

    Args:
        exchange: a Ring or a Gather.
        scene: the direction.
    """
    draft = Draft(scene.layout.world_size)
    write_exchange(draft, exchange, scene)
    return draft.timetable()


def write_exchange(draft: Draft, exchange: Exchange, scene: Scene) -> int:
    """Writes the steps of an exchange and returns how many there are."""
    if isinstance(exchange, Gather):
        steps = _write_gather(draft, exchange.stages, scene)
    elif isinstance(exchange, Ring):
        steps = write_ring(draft, RingSchedule(scene.travel, exchange.num_outer), scene, scene.phase.is_backward)
    else:
        raise TypeError(f"no timetable is known for the exchange {exchange.name}")
    draft.steps(steps)
    return steps


def _write_gather(draft: Draft, stages: int, scene: Scene) -> int:
    rows = scene.travel.rows_needed.copy()
    np.fill_diagonal(rows, 0)
    flops, world = scene.flops, len(rows)
    last = stages + (1 if scene.phase.is_backward else 0) if rows.any() else 0
    parts = scene.flops_of_halves if last and scene.phase.is_backward else (flops,)
    for step, own in zip((0, last), parts, strict=False):
        at = np.flatnonzero(own.diagonal())
        draft.visit(step, at, own[at, at], NONE, NONE, 0)
    if not last:
        return 1
    source, target = np.nonzero(rows)
    whole = rows[source, target]
    order = (target - source) % world
    block_rows = np.array(scene.travel.block_rows, dtype=np.int64)
    for stage in range(stages):
        part = whole * (stage + 1) // stages - whole * stage // stages
        some = part > 0
        src, dst, count = source[some], target[some], part[some]
        # Pieces for several ranks may be the same one, which is copied once; never more than the block.
        packed = np.bincount(src, weights=count, minlength=world).astype(np.int64)
        packed = np.minimum(packed, -(-block_rows // stages)) * scene.row_bytes
        senders = np.flatnonzero(packed)
        draft.pack(stage, senders, packed[senders], min(stage + 1, last))
        sent = draft.message(stage, src, dst, count * scene.row_bytes, stage + 1)
        draft.wait(min(stage + 1, last), AFTER, src, sent)
        work = flops[dst, src] * (count / whole[some])
        draft.visit(stage + 1, dst, work, sent, NONE, order[some])
        if scene.sum_row_bytes:
            home = min(stage + 3, last)
            sums = count * scene.sum_row_bytes
            sent = draft.message(stage + 2, dst, src, sums, stage + 3, gradient=1)
            draft.wait(home, AFTER, dst, sent)
            draft.wait(home, AFTER, src, sent, sums)
    return last + 1
