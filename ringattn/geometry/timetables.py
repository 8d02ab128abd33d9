"""Timetables written straight from who needs what of whom: those of the programs, of all ranks at once.

Steps, messages and waits are those that `exchanges/` and the executor have, which tests compare. What is not known
without tiles is estimated: a part of the rows is taken to hold as great a part of the work.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ringattn.geometry.demand import pairs_seen
from ringattn.geometry.exchanges import Exchange, Gather, Ring
from ringattn.geometry.exchanges.ring import Turns
from ringattn.geometry.layout import Ints, Layout
from ringattn.geometry.masks import Mask
from ringattn.geometry.plan import Phase
from ringattn.geometry.sizes import Sizes
from ringattn.geometry.timetable import AFTER, BEFORE, NONE, Draft, Floats, Timetable
from ringattn.geometry.travel import Travel


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
    sizes: Sizes
    phase: Phase
    wanted: tuple[bool, bool]

    @property
    def travel(self) -> Travel:
        """Who needs what of whom."""
        return Travel(self.phase.carried, self.masks, self.layout, self.kv_layout)

    @property
    def flops(self) -> Floats:
        """What each rank computes with each block: (world, world), [rank, block]."""
        pairs = pairs_seen(self.masks, self.layout, self.kv_layout)
        copies = self.sizes.batch if len(self.masks) == 1 else 1
        by_rank = pairs.T if self.phase is Phase.BACKWARD_BY_QUERIES else pairs
        return by_rank.astype(np.float64) * (copies * flops_per_pair(self.sizes, self.phase))

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of what travels."""
        return self.sizes.row_bytes(self.phase.carried)

    @property
    def sum_row_bytes(self) -> int:
        """Bytes of a row of its gradients; 0 where they do not travel."""
        home = self.wanted[0 if self.phase is Phase.BACKWARD_BY_QUERIES else 1]
        return self.sizes.row_bytes(self.phase.carried.gradient) if self.phase.is_backward and home else 0


def flops_per_pair(sizes: Sizes, phase: Phase) -> int:
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
        steps = _RingWriter(draft, Turns(scene.travel, exchange.num_outer), scene).write()
    else:
        raise TypeError(f"no timetable is known for the exchange {exchange.name}")
    draft.steps(steps)
    return steps


def _write_gather(draft: Draft, stages: int, scene: Scene) -> int:
    rows = scene.travel.rows_needed.copy()
    np.fill_diagonal(rows, 0)
    flops, world = scene.flops, len(rows)
    own = np.flatnonzero(flops.diagonal())
    draft.visit(0, own, flops[own, own], NONE, NONE, 0)
    if not rows.any():
        return 1
    last = stages + (1 if scene.phase.is_backward else 0)
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


class _RingWriter:
    """Writes what `exchanges/ring.py` does for one rank, for all of them: arrays over the ranks."""

    def __init__(self, draft: Draft, turns: Turns, scene: Scene) -> None:
        self._draft, self._turns, self._flops = draft, turns, scene.flops
        self._world = len(self._flops)
        self._rank = np.arange(self._world)
        self._outer, self._inner = np.divmod(self._rank, turns.num_inner)
        rows = np.array(scene.travel.block_rows, dtype=np.int64)
        self._bytes, self._sum_bytes = rows * scene.row_bytes, rows * scene.sum_row_bytes
        self._backward = scene.phase.is_backward
        self._sums = scene.sum_row_bytes > 0
        self._last = turns.num_steps(self._backward) - 1
        self._guest_sum = self._none()

    def write(self) -> int:
        came = self._none()
        crosses = self._turns.outer_reach > 0
        packed = np.flatnonzero((self._turns.reach[:, 0] > 0) | crosses)
        until = np.where(crosses, self._turns.starts[1] - 1, 0)[packed]
        self._draft.pack(0, packed, self._bytes[packed], until)
        for turn in range(self._turns.num_turns):
            start, stop = self._turns.starts[turn], self._turns.starts[turn + 1]
            to_come = self._write_outer(turn, came)
            self._guest_sum = self._none()
            total = self._none()
            for hop in range(min(stop - start, self._turns.num_inner)):
                came, total = self._write_hop(turn, hop, came, total)
            if self._sums and turn:
                self._write_return(turn)
            came = to_come
        return self._last + 1

    def _write_outer(self, turn: int, came: Ints) -> Ints:
        """The block that the turn begins with goes to the next group; returns what comes there."""
        start, stop = self._turns.starts[turn], self._turns.starts[turn + 1]
        guest = self._block(turn, 0)
        goes = np.flatnonzero(self._turns.outer_reach[guest] > turn)
        target = self._at(self._outer + 1, self._inner)[goes]
        self._draft.wait(start, BEFORE, goes, came[goes])
        until = self._turns.starts[min(turn + 2, self._turns.num_turns)] - 1
        sent = self._draft.message(start, goes, target, self._bytes[guest[goes]], until, axis=1)
        self._draft.wait(stop - 1, AFTER, goes, sent)
        return self._received(target, sent)

    def _write_hop(self, turn: int, hop: int, came: Ints, total: Ints) -> tuple[Ints, Ints]:
        """The block at hand is passed on and attended to; returns by which messages the next, and its sum, come."""
        step, block = self._turns.starts[turn] + hop, self._block(turn, hop)
        reach, first = self._turns.reach[block, turn], self._turns.first[block, turn]
        after = self._at(self._outer, self._inner + 1)
        goes = np.flatnonzero(hop < reach)
        self._draft.wait(step, BEFORE, goes, came[goes])
        sent = self._draft.message(step, goes, after[goes], self._bytes[block[goes]], step + 1)
        self._draft.wait(step, AFTER, goes, sent)
        visits = self._flops[self._rank, block] > 0
        at = np.flatnonzero(visits)
        self._draft.visit(step, at, self._flops[at, block[at]], came[at], total[at], 0)
        coming = self._received(after[goes], sent)
        if not self._sums:
            return coming, self._none()
        awaited = np.where(visits, NONE, total)
        along, back = (first <= hop) & (hop < reach), (hop == reach) & (reach > 0)
        gives = np.flatnonzero(along | back)
        target = np.where(along, after, self._at(self._outer, self._inner - hop))[gives]
        self._draft.wait(step + 1, BEFORE, gives, awaited[gives])
        sums = self._sum_bytes[block[gives]]
        sent = self._draft.message(step + 1, gives, target, sums, step + 2, gradient=1)
        self._draft.wait(step + 1, AFTER, gives, sent)
        is_home = back[gives]
        if turn == 0:
            self._draft.wait(step + 1, AFTER, target[is_home], sent[is_home], sums[is_home])
        else:
            self._guest_sum[target[is_home]] = sent[is_home]
        return coming, self._received(target[~is_home], sent[~is_home])

    def _write_return(self, turn: int) -> None:
        """The sums of what this group added go home, each with a turn's time."""
        guest = self._block(turn, 0)
        reach = self._turns.reach[guest, turn]
        start, stop = self._turns.starts[turn], self._turns.starts[turn + 1]
        for far in np.unique(reach[reach >= 0]).tolist():
            gives = np.flatnonzero(reach == far)
            step = start + far + (2 if far else 1)
            until = min(step + stop - start - 1, self._last)
            target = self._at(self._outer - turn, self._inner)[gives]
            self._draft.wait(step, BEFORE, gives, self._guest_sum[gives])
            sums = self._sum_bytes[guest[gives]]
            sent = self._draft.message(step, gives, target, sums, step + 1, axis=1, gradient=1)
            self._draft.wait(until, AFTER, gives, sent)
            self._draft.wait(until, AFTER, target, sent, sums)

    def _at(self, outer: Ints, inner: Ints) -> Ints:
        place: Ints = outer % self._turns.num_outer * self._turns.num_inner + inner % self._turns.num_inner
        return place

    def _block(self, turn: int, hop: int) -> Ints:
        return self._at(self._outer - turn, self._inner - hop)

    def _none(self) -> Ints:
        return np.full(self._world, NONE, dtype=np.int64)

    def _received(self, target: Ints, sent: Ints) -> Ints:
        came = self._none()
        came[target] = sent
        return came
