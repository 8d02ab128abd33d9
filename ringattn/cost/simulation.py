"""The simulator: runs a timetable with numbers from a cost model in place of tensors.

Each rank has a clock. A message leaves when both its ranks have posted it and its way is free: a rank sends, and
receives, one message at a time on each axis, and both at once. Messages travel while ranks compute. A rank waits for
what the executor would wait for, in the same place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ringattn.cost.cost_model import CostModel
from ringattn.cost.timetable import AFTER, BEFORE, Timetable
from ringattn.types import Bools, Column, Floats, Ints


@dataclass(frozen=True, eq=False)
class Times:
    """What was found, seconds of each rank, (world,).

    Args:
        done: when it is through.
        busy: how long it computed and copied; the rest it waited.
    """

    done: Floats
    busy: Floats

    @property
    def total(self) -> float:
        """Seconds until all ranks are through."""
        return float(self.done.max(initial=0.0))

    @property
    def exposed(self) -> float:
        """The longest that a rank waited."""
        return float((self.done - self.busy).max(initial=0.0))


def simulate(timetable: Timetable, model: CostModel, *, backward: bool = False) -> Times:
    """Returns how long each rank takes.

    Args:
        timetable: one direction of all ranks.
        model: links and compute.
        backward: at which rate it computes.
    """
    return _Clock(timetable, model, backward).run()


class _Clock:
    def __init__(self, timetable: Timetable, model: CostModel, backward: bool) -> None:
        self._timetable, self._compute = timetable, model.compute
        self._rate = model.compute.backward_flops_per_s if backward else model.compute.flops_per_s
        world = timetable.world_size
        self._now, self._busy = np.zeros(world), np.zeros(world)
        # By axis: until when a rank's way out, and its way in, is taken.
        self._leaving, self._coming = np.zeros((2, world)), np.zeros((2, world))
        # When each message is there; one of no bytes, which is not sent, and no message at all, never keep one waiting.
        self._arrival = np.zeros(len(timetable.messages.step) + 1)
        self._latency = np.array([link.latency_s for link in model.links])
        self._per_byte = np.array([1.0 / link.bytes_per_s for link in model.links])

    def run(self) -> Times:
        m, v, w, p = (self._timetable.messages, self._timetable.visits, self._timetable.waits, self._timetable.packs)
        number = np.arange(len(m.step))
        # Of a rank's messages of one step the nearest go first; what is carried before gradients. So in each round
        # every rank sends, and receives, one; of those of one kind between two ranks the first goes first.
        world = self._timetable.world_size
        kind = m.gradient * world + (m.target - m.source) % world
        rounds = _ranked(kind, m.step * world + m.source)
        messages = _Groups([*m[1:4], m.num_bytes, number], m.step, rounds, m.num_bytes > 0)
        visits = _Groups([*v[2:]], v.step, v.order)
        waits = _Groups([*w[2:]], w.step, w.moment)
        packs = _Groups([*p[1:3]], p.step, np.zeros_like(p.step))
        for step in range(self._timetable.num_steps):
            for rank, message, copied in waits.at(step, BEFORE):
                self._wait(rank, message, copied)
            for rank, num_bytes in packs.at(step):
                self._spend(rank, num_bytes / self._compute.copy_bytes_per_s)
            posted = self._now.copy()
            for columns in messages.at(step):
                self._send(posted, *columns)
            for columns in visits.at(step):
                self._visit(*columns)
            for rank, message, copied in waits.at(step, AFTER):
                self._wait(rank, message, copied)
        return Times(self._now, self._busy)

    def _wait(self, rank: Ints, message: Ints, copied: Ints) -> None:
        np.maximum.at(self._now, rank, self._arrival[message])
        if copied.any():
            self._spend(rank, copied / self._compute.copy_bytes_per_s)

    def _spend(self, rank: Ints, seconds: Floats) -> None:
        np.add.at(self._now, rank, seconds)
        np.add.at(self._busy, rank, seconds)

    def _send(self, posted: Floats, source: Ints, target: Ints, axis: Ints, num_bytes: Ints, number: Ints) -> None:
        ready = np.maximum(posted[source], posted[target])
        free = np.maximum(self._leaving[axis, source], self._coming[axis, target])
        end = np.maximum(ready, free) + num_bytes * self._per_byte[axis]
        self._leaving[axis, source] = self._coming[axis, target] = end
        self._arrival[number] = end + self._latency[axis]

    def _visit(self, rank: Ints, flops: Ints, piece: Ints, total: Ints) -> None:
        work = flops / self._rate + self._compute.launch_s
        here = np.maximum(self._arrival[piece], self._arrival[total])
        self._now[rank] = np.maximum(self._now[rank], here) + work
        self._busy[rank] += work


def _ranked(kind: Ints, sender: Ints) -> Ints:
    """Returns the kinds, made different where a sender has several messages of one, in the order they stand in."""
    if not len(kind):
        return kind
    order = np.lexsort((kind, sender))
    same = (np.diff(kind[order], prepend=-1) == 0) & (np.diff(sender[order], prepend=-1) == 0)
    index = np.arange(len(kind))
    number = np.empty_like(kind)
    number[order] = index - np.maximum.accumulate(np.where(same, 0, index))
    found: Ints = kind * (int(number.max()) + 1) + number
    return found


class _Groups:
    """Rows of a table by step and by what comes first in it."""

    def __init__(self, columns: list[Column], step: Ints, within: Ints, some: Bools | None = None) -> None:
        width = int(within.max(initial=0)) + 1
        key = step * width + within
        chosen = np.arange(len(key)) if some is None else np.flatnonzero(some)
        order = chosen[np.argsort(key[chosen], kind="stable")]
        key = key[order]
        self._columns = [column[order] for column in columns]
        starts = np.flatnonzero(np.append(True, key[1:] != key[:-1])[: len(key)])
        self._bounds = [*starts.tolist(), len(key)]
        self._within = (key[starts] % width).tolist()
        num_steps = int(step.max(initial=-1)) + 2
        self._first = np.searchsorted(key[starts] // width, np.arange(num_steps)).tolist()

    def at(self, step: int, within: int | None = None) -> Iterator[list[Column]]:
        """Yields the groups of a step in order; only the one that is named, if one is."""
        if step + 1 >= len(self._first):
            return
        for group in range(self._first[step], self._first[step + 1]):
            if within is None or self._within[group] == within:
                here = slice(self._bounds[group], self._bounds[group + 1])
                yield [column[here] for column in self._columns]
