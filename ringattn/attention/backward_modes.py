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
from ringattn.kernels import BackwardQueries, Gradients, Keys
from ringattn.plan.head_shards import HeadSlice
from ringattn.plan.plan import Payload


class KeyGradients(NamedTuple):
    """The gradients of keys and values, (B, S, H, D) and (B, S, H, Dv)."""

    dk: Tensor
    dv: Tensor


def pack_keys(keys: Keys) -> tuple[Tensor, ...]:
    """Returns the tensors of keys as they travel, (B, H, S, ...): views."""
    return _turned(keys.k), _turned(keys.v)


def unpack_keys(tensors: Sequence[Tensor]) -> Keys:
    """Returns the keys of tensors from `pack_keys`."""
    k, v = tensors
    return Keys(_turned(k), _turned(v))


def pack_queries(queries: BackwardQueries) -> tuple[Tensor, ...]:
    """Returns the tensors of queries as they travel, q and dout (B, H, S, ...), lse and delta (B, H, S): views."""
    return _turned(queries.q), _turned(queries.dout), queries.lse, queries.delta


def unpack_queries(tensors: Sequence[Tensor], lse_grad: bool) -> BackwardQueries:
    """Returns the queries of tensors from `pack_queries`."""
    q, dout, lse, delta = tensors
    return BackwardQueries(_turned(q), _turned(dout), lse, delta, lse_grad)


def pack_gradients(gradients: KeyGradients) -> tuple[Tensor, ...]:
    """Returns gradients of keys as they travel, (B, H, S, ...): views."""
    return _turned(gradients.dk), _turned(gradients.dv)


def unpack_gradients(tensors: Sequence[Tensor]) -> KeyGradients:
    """Returns the gradients of tensors from `pack_gradients`."""
    dk, dv = tensors
    return KeyGradients(_turned(dk), _turned(dv))


class GradBuffers(NamedTuple):
    """Where gradients are to be, of each part of queries and of keys; None is memory of their own."""

    dq: Sequence[Tensor | None]
    dkv: Sequence[KeyGradients | None]

    @classmethod
    def anywhere(cls, queries: Sequence[BackwardQueries], keys: Sequence[Keys]) -> GradBuffers:
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

    def inputs(self, came: tuple[Tensor, ...], part: int, run: HeadSlice) -> tuple[BackwardQueries, Keys]:
        """Returns the queries and keys of a visit, given the tensors of its piece."""
        ...

    def outputs(self, sums: tuple[Tensor, ...], part: int, run: HeadSlice) -> Gradients:
        """Returns where its gradients are added, given the sums of its piece."""
        ...

    def gradients(self, home: Sequence[tuple[Tensor, ...]]) -> tuple[Sequence[Tensor], Sequence[KeyGradients]]:
        """Returns the dq of each part, and the dk, dv, given the sums of this rank's block."""
        ...


def backward_mode(
    carried: Payload, queries: Sequence[BackwardQueries], keys: Sequence[Keys], places: GradBuffers
) -> BackwardMode:
    """Returns the way of a backward in which `carried` travels."""
    return (MoveKV if carried is Payload.KV else MoveQ)(queries, keys, places)


class MoveKV:
    """Keys and values come, and their gradients go along; queries and theirs stay."""

    def __init__(self, queries: Sequence[BackwardQueries], keys: Sequence[Keys], places: GradBuffers) -> None:
        self._queries, self._keys, self._places = queries, keys, places.dkv
        wide = queries[0].lse.dtype
        self._dq = [
            _zeros(part.q, wide) if place is None else place.zero_()
            for part, place in zip(queries, places.dq, strict=True)
        ]

    def own(self) -> ChunkedRows:
        """See Side."""
        return ChunkedRows([pack_keys(part) for part in self._keys])

    def sums(self) -> list[Field]:
        """See Side."""
        return [Field(tuple(x.shape), self._dq[0].dtype) for x in pack_keys(self._keys[0])]

    def places(self) -> Sequence[tuple[Tensor, ...] | None]:
        """See Side."""
        return [None if place is None else pack_gradients(place) for place in self._places]

    def inputs(self, came: tuple[Tensor, ...], part: int, run: HeadSlice) -> tuple[BackwardQueries, Keys]:
        """See Side."""
        return self._queries[part].of_heads(run.heads), unpack_keys(came).of_heads(run.kv_heads)

    def outputs(self, sums: tuple[Tensor, ...], part: int, run: HeadSlice) -> Gradients:
        """See Side."""
        return Gradients(self._dq[part], *unpack_gradients(sums)).of_heads(run.heads, run.kv_heads)

    def gradients(self, home: Sequence[tuple[Tensor, ...]]) -> tuple[Sequence[Tensor], Sequence[KeyGradients]]:
        """See Side."""
        return self._dq, [unpack_gradients(sums) for sums in home]


class MoveQ:
    """Queries come with all that belongs to them, and their gradients go along; keys and values and theirs stay."""

    def __init__(self, queries: Sequence[BackwardQueries], keys: Sequence[Keys], places: GradBuffers) -> None:
        self._queries, self._keys, self._places = queries, keys, places.dq
        wide = queries[0].lse.dtype
        self._dkv = [
            KeyGradients(_zeros(part.k, wide), _zeros(part.v, wide))
            if place is None
            else KeyGradients(place.dk.zero_(), place.dv.zero_())
            for part, place in zip(keys, places.dkv, strict=True)
        ]

    def own(self) -> ChunkedRows:
        """See Side."""
        return ChunkedRows([pack_queries(part) for part in self._queries])

    def sums(self) -> list[Field]:
        """See Side."""
        return [Field(tuple(_turned(self._queries[0].q).shape), self._dkv[0].dk.dtype)]

    def places(self) -> Sequence[tuple[Tensor, ...] | None]:
        """See Side."""
        return [None if place is None else (_turned(place),) for place in self._places]

    def inputs(self, came: tuple[Tensor, ...], part: int, run: HeadSlice) -> tuple[BackwardQueries, Keys]:
        """See Side."""
        queries = unpack_queries(came, self._queries[0].lse_grad)
        return queries.of_heads(run.heads), self._keys[part].of_heads(run.kv_heads)

    def outputs(self, sums: tuple[Tensor, ...], part: int, run: HeadSlice) -> Gradients:
        """See Side."""
        (dq,) = sums
        return Gradients(_turned(dq), *self._dkv[part]).of_heads(run.heads, run.kv_heads)

    def gradients(self, home: Sequence[tuple[Tensor, ...]]) -> tuple[Sequence[Tensor], Sequence[KeyGradients]]:
        """See Side."""
        return [_turned(dq) for (dq,) in home], self._dkv


def _turned(x: Tensor) -> Tensor:
    """(B, rows, H, D) as (B, H, rows, D), or back."""
    return x.transpose(1, 2)


def _zeros(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(x.shape, dtype=dtype, device=x.device)
