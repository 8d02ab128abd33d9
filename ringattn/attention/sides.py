"""The two ways of a backward: keys and values travel, or queries do. The executor need not know which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ringattn.comm.packet import Field
from ringattn.geometry.heads import HeadRun
from ringattn.geometry.plan import Payload


class Queries(NamedTuple):
    """Queries and what belongs to them in a backward: q, dout (B, S, H, D); lse, delta (B, H, S), final."""

    q: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor

    def of(self, heads: range) -> Queries:
        """Returns some of the heads."""
        q, dout = (_heads(x, heads) for x in (self.q, self.dout))
        return Queries(q, dout, self.lse[:, heads.start : heads.stop], self.delta[:, heads.start : heads.stop])


class Side(Protocol):
    """What travels, and what stays. Tensors that travel are (B, H, rows, ...), as in packets."""

    def own(self) -> list[Tensor]:
        """Returns this rank's block."""
        ...

    def sums(self) -> list[Field]:
        """Returns what the sums of a block's gradients look like."""
        ...

    def inputs(self, came: tuple[Tensor, ...], part: int, run: HeadRun) -> tuple[Queries, Tensor, Tensor]:
        """Returns the queries, keys and values of a visit, given the tensors of its piece."""
        ...

    def outputs(self, sums: tuple[Tensor, ...], part: int, run: HeadRun) -> tuple[Tensor, Tensor, Tensor]:
        """Returns where its dq, dk, dv are added, given the sums of its piece."""
        ...

    def gradients(self, home: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Returns the dq of each part, dk, dv, given the sums of this rank's block."""
        ...


def side_of(carried: Payload, parts: Sequence[Queries], places: Sequence[Tensor | None], k: Tensor, v: Tensor) -> Side:
    """Returns the way of a backward in which `carried` travels."""
    if carried is Payload.KV:
        return KeysTravel(parts, places, k, v)
    (queries,) = parts
    return QueriesTravel(queries, k, v)


class KeysTravel:
    """Keys and values come, and their gradients go along; queries and theirs stay, in as many parts as there are."""

    def __init__(self, parts: Sequence[Queries], places: Sequence[Tensor | None], k: Tensor, v: Tensor) -> None:
        self._parts, self._k, self._v = parts, k, v
        self._dq = [
            _zeros(queries.q, queries.lse.dtype) if place is None else place.zero_()
            for queries, place in zip(parts, places, strict=True)
        ]

    def own(self) -> list[Tensor]:
        """See Side."""
        return [_turned(self._k), _turned(self._v)]

    def sums(self) -> list[Field]:
        """See Side."""
        return [Field(tuple(x.shape), self._dq[0].dtype) for x in self.own()]

    def inputs(self, came: tuple[Tensor, ...], part: int, run: HeadRun) -> tuple[Queries, Tensor, Tensor]:
        """See Side."""
        k, v = (_heads(_turned(x), run.kv_heads) for x in came)
        return self._parts[part].of(run.heads), k, v

    def outputs(self, sums: tuple[Tensor, ...], part: int, run: HeadRun) -> tuple[Tensor, Tensor, Tensor]:
        """See Side."""
        dk, dv = (_heads(_turned(x), run.kv_heads) for x in sums)
        return _heads(self._dq[part], run.heads), dk, dv

    def gradients(self, home: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor, Tensor]:
        """See Side."""
        dk, dv = map(_turned, home)
        return self._dq, dk, dv


class QueriesTravel:
    """Queries come with all that belongs to them, and their gradients go along; keys and values and theirs stay."""

    def __init__(self, queries: Queries, k: Tensor, v: Tensor) -> None:
        self._queries, self._k, self._v = queries, k, v
        self._dk, self._dv = (_zeros(x, queries.lse.dtype) for x in (k, v))

    def own(self) -> list[Tensor]:
        """See Side."""
        q, dout, lse, delta = self._queries
        return [_turned(q), _turned(dout), lse, delta]

    def sums(self) -> list[Field]:
        """See Side."""
        return [Field(tuple(_turned(self._queries.q).shape), self._dk.dtype)]

    def inputs(self, came: tuple[Tensor, ...], part: int, run: HeadRun) -> tuple[Queries, Tensor, Tensor]:
        """See Side."""
        q, dout, lse, delta = came
        queries = Queries(_turned(q), _turned(dout), lse, delta)
        return queries.of(run.heads), _heads(self._k, run.kv_heads), _heads(self._v, run.kv_heads)

    def outputs(self, sums: tuple[Tensor, ...], part: int, run: HeadRun) -> tuple[Tensor, Tensor, Tensor]:
        """See Side."""
        (dq,) = sums
        return _heads(_turned(dq), run.heads), _heads(self._dk, run.kv_heads), _heads(self._dv, run.kv_heads)

    def gradients(self, home: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor, Tensor]:
        """See Side."""
        (dq,) = home
        return [_turned(dq)], self._dk, self._dv


def _turned(x: Tensor) -> Tensor:
    """(B, rows, H, D) as (B, H, rows, D), or back."""
    return x.transpose(1, 2)


def _heads(x: Tensor, heads: range) -> Tensor:
    return x[:, :, heads.start : heads.stop]


def _zeros(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(x.shape, dtype=dtype, device=x.device)
