"""The two ways of a backward: keys and values travel, or queries do. The executor need not know which.

On either side there may be several parts, one after the other, as the plan has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ringattn.attention.chunked_rows import ChunkedRows
from ringattn.comm.packet import Field
from ringattn.plan.head_shards import HeadSlice
from ringattn.plan.plan import Payload


class QueryBlock(NamedTuple):
    """Queries and what belongs to them in a backward: q, dout (B, S, H, D); lse, delta (B, H, S), final."""

    q: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor

    def of(self, heads: range) -> QueryBlock:
        """Returns some of the heads."""
        q, dout = (_heads(x, heads) for x in (self.q, self.dout))
        return QueryBlock(q, dout, self.lse[:, heads.start : heads.stop], self.delta[:, heads.start : heads.stop])

    def turned(self) -> QueryBlock:
        """Returns them with (B, H, S, D) for (B, S, H, D), or back."""
        return QueryBlock(_turned(self.q), _turned(self.dout), self.lse, self.delta)


class KeyBlock(NamedTuple):
    """Keys and values, (B, S, H, D) and (B, S, H, Dv); or their gradients."""

    k: Tensor
    v: Tensor

    def of(self, heads: range) -> KeyBlock:
        """Returns some of the heads."""
        return KeyBlock(_heads(self.k, heads), _heads(self.v, heads))

    def turned(self) -> KeyBlock:
        """Returns them with (B, H, S, D) for (B, S, H, D), or back."""
        return KeyBlock(_turned(self.k), _turned(self.v))


class GradBuffers(NamedTuple):
    """Where gradients are to be, of each part of queries and of keys; None is memory of their own."""

    dq: Sequence[Tensor | None]
    dkv: Sequence[KeyBlock | None]

    @classmethod
    def anywhere(cls, queries: Sequence[QueryBlock], keys: Sequence[KeyBlock]) -> GradBuffers:
        """Returns those of nobody who cares."""
        return cls([None] * len(queries), [None] * len(keys))


class BackwardMode(Protocol):
    """What travels, and what stays. Tensors that travel are (B, H, rows, ...), as in packets."""

    def own(self) -> ChunkedRows:
        """Returns this rank's block."""
        ...

    def sums(self) -> list[Field]:
        """Returns what the sums of a block's gradients look like."""
        ...

    def places(self) -> Sequence[tuple[Tensor, ...] | None]:
        """Returns where those of each part of the own block are to be."""
        ...

    def inputs(self, came: tuple[Tensor, ...], part: int, run: HeadSlice) -> tuple[QueryBlock, KeyBlock]:
        """Returns the queries and keys of a visit, given the tensors of its piece."""
        ...

    def outputs(self, sums: tuple[Tensor, ...], part: int, run: HeadSlice) -> tuple[Tensor, KeyBlock]:
        """Returns where its dq and its dk, dv are added, given the sums of its piece."""
        ...

    def gradients(self, home: Sequence[tuple[Tensor, ...]]) -> tuple[Sequence[Tensor], Sequence[KeyBlock]]:
        """Returns the dq of each part, and the dk, dv, given the sums of this rank's block."""
        ...


def backward_mode(
    carried: Payload, queries: Sequence[QueryBlock], keys: Sequence[KeyBlock], places: GradBuffers
) -> BackwardMode:
    """Returns the way of a backward in which `carried` travels."""
    return (MoveKV if carried is Payload.KV else MoveQ)(queries, keys, places)


class MoveKV:
    """Keys and values come, and their gradients go along; queries and theirs stay."""

    def __init__(self, queries: Sequence[QueryBlock], keys: Sequence[KeyBlock], places: GradBuffers) -> None:
        self._queries, self._keys, self._places = queries, keys, places.dkv
        wide = queries[0].lse.dtype
        self._dq = [
            _zeros(part.q, wide) if place is None else place.zero_()
            for part, place in zip(queries, places.dq, strict=True)
        ]

    def own(self) -> ChunkedRows:
        """See Side."""
        return ChunkedRows([part.turned() for part in self._keys])

    def sums(self) -> list[Field]:
        """See Side."""
        return [Field(tuple(x.shape), self._dq[0].dtype) for x in self._keys[0].turned()]

    def places(self) -> Sequence[tuple[Tensor, ...] | None]:
        """See Side."""
        return [None if place is None else place.turned() for place in self._places]

    def inputs(self, came: tuple[Tensor, ...], part: int, run: HeadSlice) -> tuple[QueryBlock, KeyBlock]:
        """See Side."""
        return self._queries[part].of(run.heads), KeyBlock(*came).turned().of(run.kv_heads)

    def outputs(self, sums: tuple[Tensor, ...], part: int, run: HeadSlice) -> tuple[Tensor, KeyBlock]:
        """See Side."""
        return _heads(self._dq[part], run.heads), KeyBlock(*sums).turned().of(run.kv_heads)

    def gradients(self, home: Sequence[tuple[Tensor, ...]]) -> tuple[Sequence[Tensor], Sequence[KeyBlock]]:
        """See Side."""
        return self._dq, [KeyBlock(*sums).turned() for sums in home]


class MoveQ:
    """Queries come with all that belongs to them, and their gradients go along; keys and values and theirs stay."""

    def __init__(self, queries: Sequence[QueryBlock], keys: Sequence[KeyBlock], places: GradBuffers) -> None:
        self._queries, self._keys, self._places = queries, keys, places.dq
        wide = queries[0].lse.dtype
        self._dkv = [
            KeyBlock(*(_zeros(x, wide) for x in part) if place is None else (x.zero_() for x in place))
            for part, place in zip(keys, places.dkv, strict=True)
        ]

    def own(self) -> ChunkedRows:
        """See Side."""
        return ChunkedRows([part.turned() for part in self._queries])

    def sums(self) -> list[Field]:
        """See Side."""
        return [Field(tuple(_turned(self._queries[0].q).shape), self._dkv[0].k.dtype)]

    def places(self) -> Sequence[tuple[Tensor, ...] | None]:
        """See Side."""
        return [None if place is None else (_turned(place),) for place in self._places]

    def inputs(self, came: tuple[Tensor, ...], part: int, run: HeadSlice) -> tuple[QueryBlock, KeyBlock]:
        """See Side."""
        return QueryBlock(*came).turned().of(run.heads), self._keys[part].of(run.kv_heads)

    def outputs(self, sums: tuple[Tensor, ...], part: int, run: HeadSlice) -> tuple[Tensor, KeyBlock]:
        """See Side."""
        (dq,) = sums
        return _heads(_turned(dq), run.heads), self._dkv[part].of(run.kv_heads)

    def gradients(self, home: Sequence[tuple[Tensor, ...]]) -> tuple[Sequence[Tensor], Sequence[KeyBlock]]:
        """See Side."""
        return [_turned(dq) for (dq,) in home], self._dkv


def _turned(x: Tensor) -> Tensor:
    """(B, rows, H, D) as (B, H, rows, D), or back."""
    return x.transpose(1, 2)


def _heads(x: Tensor, heads: range) -> Tensor:
    return x[:, :, heads.start : heads.stop]


def _zeros(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(x.shape, dtype=dtype, device=x.device)
