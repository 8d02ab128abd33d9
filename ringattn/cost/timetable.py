"""Timetables: the programs of all ranks as arrays, which is all that time depends on.

A timetable says which rank computes how much in which step, which messages are posted, and what waits for which of
them. It is read out of the programs of all ranks (`reading.py`), or written straight from who needs what of whom
(`timetables.py`), which takes thousands of ranks for little more time than a few.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ringattn.types import Column, Floats, Ints

NONE = -1  # no message
BEFORE, AFTER = 0, 1  # a wait is before the step's messages are posted, or after its visits


class Messages(NamedTuple):
    """Messages, by their numbers: who sends how many bytes to whom in which step, on which axis."""

    step: Ints
    source: Ints
    target: Ints
    axis: Ints  # 0 the fast one, 1 the slow one
    gradient: Ints  # 1 for gradients, which are posted after what is carried
    num_bytes: Ints
    until: Ints  # the last step in which the receiver holds its buffer


class Visits(NamedTuple):
    """Work: flops of a rank in a step, once the piece, and the sum, has come with these messages."""

    step: Ints
    order: Ints  # visits of a rank in a step, one after the other
    rank: Ints
    flops: Floats
    piece: Ints
    total: Ints


class Waits(NamedTuple):
    """A rank waits for a message, and then copies some bytes."""

    step: Ints
    moment: Ints
    rank: Ints
    message: Ints
    copied: Ints


class Packs(NamedTuple):
    """Bytes that a rank copies before it posts a step's messages, and holds until the end of another step."""

    step: Ints
    rank: Ints
    num_bytes: Ints
    until: Ints


@dataclass(frozen=True)
class Timetable:
    """What all ranks do, in `num_steps` steps."""

    world_size: int
    num_steps: int
    messages: Messages
    visits: Visits
    waits: Waits
    packs: Packs

    @property
    def bytes_sent(self) -> Ints:
        """The bytes that each rank sends, (world,)."""
        return self._by_rank(self.messages.source, self.messages.num_bytes)

    @property
    def messages_sent(self) -> Ints:
        """How many messages each rank sends, (world,)."""
        return self._by_rank(self.messages.source, (self.messages.num_bytes > 0).astype(np.int64))

    @property
    def flops(self) -> Floats:
        """What each rank computes, (world,)."""
        total = np.zeros(self.world_size)
        np.add.at(total, self.visits.rank, self.visits.flops)
        return total

    @property
    def buffer_bytes(self) -> Ints:
        """The most that each rank holds at once of what is received and packed, (world,)."""
        change = np.zeros((self.num_steps + 1, self.world_size), dtype=np.int64)
        m, p = self.messages, self.packs
        for step, until, rank, held in ((m.step, m.until, m.target, m.num_bytes), (p.step, p.until, p.rank, p[2])):
            np.add.at(change, (step, rank), held)
            np.add.at(change, (np.minimum(until, self.num_steps - 1) + 1, rank), -held)
        most: Ints = change.cumsum(axis=0).max(axis=0)
        return most

    def _by_rank(self, rank: Ints, amount: Ints) -> Ints:
        total = np.zeros(self.world_size, dtype=np.int64)
        np.add.at(total, rank, amount)
        return total


@dataclass
class Draft:
    """A timetable while it is written. Every argument may be one number, or an array of as many as the others.

    Args:
        world_size: ranks.
        ranks, axis, first_step: of a draft within another: which ranks it numbers 0, 1, ..., which axis it calls its
            own fast one, and when it begins.
    """

    world_size: int
    ranks: Ints | None = None
    axis: int = 0
    first_step: int = 0
    _rows: dict[type, list[tuple[Column, ...]]] = field(default_factory=dict)
    _num_messages: list[int] = field(default_factory=lambda: [0])
    _num_steps: list[int] = field(default_factory=lambda: [0])

    def within(self, ranks: Ints, axis: int, first_step: int) -> Draft:
        """Returns a draft of some of the ranks, on another axis, from a later step on; what it notes is noted here."""
        return Draft(self.world_size, ranks, axis, first_step, self._rows, self._num_messages, self._num_steps)

    def steps(self, number: int) -> None:
        """There are this many steps, counted from the draft's own first."""
        self._num_steps[0] = max(self._num_steps[0], self.first_step + number)

    def message(
        self,
        step: int,
        source: Ints,
        target: Ints,
        num_bytes: Ints | int,
        until: int,
        *,
        axis: int = 0,
        gradient: int = 0,
    ) -> Ints:
        """Notes messages and returns their numbers."""
        first = self._num_messages[0]
        place = self._place
        self._add(
            Messages,
            step + self.first_step,
            place(source),
            place(target),
            axis + self.axis,
            gradient,
            num_bytes,
            until + self.first_step,
        )
        self._num_messages[0] += len(source)
        return np.arange(first, first + len(source))

    def visit(
        self, step: int, rank: Ints, flops: Floats, piece: Ints | int, total: Ints | int, order: Ints | int
    ) -> None:
        """Notes visits, whose piece and sum come with these messages."""
        self._add(Visits, step + self.first_step, order, self._place(rank), flops, piece, total)

    def wait(self, step: int, moment: int, rank: Ints, message: Ints, copied: Ints | int = 0) -> None:
        """Notes waits, but for those for no message."""
        some = message != NONE
        copied = np.broadcast_to(copied, some.shape)[some]
        self._add(Waits, step + self.first_step, moment, self._place(rank[some]), message[some], copied)

    def pack(self, step: int, rank: Ints, num_bytes: Ints, until: Ints | int) -> None:
        """Notes copies before a step's messages."""
        self._add(Packs, step + self.first_step, self._place(rank), num_bytes, until + self.first_step)

    def timetable(self) -> Timetable:
        """Returns what was written."""
        return Timetable(
            self.world_size,
            self._num_steps[0],
            Messages(*self._table(Messages)),
            Visits(*self._table(Visits)),
            Waits(*self._table(Waits)),
            Packs(*self._table(Packs)),
        )

    def _place(self, rank: Ints) -> Ints:
        return rank if self.ranks is None else self.ranks[rank]

    def _add(self, kind: type, *columns: Ints | Floats | int) -> None:
        self._rows.setdefault(kind, []).append(np.broadcast_arrays(*np.atleast_1d(*columns)))

    def _table(self, kind: type[tuple[Any, ...]]) -> list[Column]:
        parts = self._rows.get(kind)
        if not parts:
            return [np.empty(0, dtype=np.int64) for _ in kind._fields]  # type: ignore[attr-defined]
        return [np.concatenate(column) for column in zip(*parts, strict=True)]
