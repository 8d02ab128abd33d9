"""Spreading heads: an all-to-all there, the plan for fewer heads of more rows, an all-to-all back; stage by stage.

The next stage's heads are on their way while one is computed, and so are the results of the one before.

Rows stay in parts as the plan has them: where a part is one rank's, the kernel reads it where it came, and its results
arise where they leave from, or where they are to be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.attention.backward_modes import (
    GradBuffers,
    KeyGradients,
    pack_gradients,
    pack_keys,
    pack_queries,
    unpack_gradients,
    unpack_keys,
    unpack_queries,
)
from ringattn.attention.chunked_rows import ROW_DIM
from ringattn.attention.executor import ExecutionPlan, run_backward, run_forward
from ringattn.comm.all_to_all import AllToAll
from ringattn.comm.packet import Field, Packet
from ringattn.comm.topology import RankMesh
from ringattn.kernels import BackwardQueries, Keys, Queries
from ringattn.plan.head_parallel import GatheredRows, HeadSharding
from ringattn.plan.head_shards import HeadShard
from ringattn.softmax import accumulation_dtype, empty_state


class _HeadTensor(NamedTuple):
    """A tensor on its way, (B, H, rows, ...), with the rows and heads of queries or of keys.

    As a place for what comes back: that is copied into it, or added to it, being sent in its dtype.
    """

    x: Tensor
    of_keys: bool
    adds: bool = False

    def heads(self, share: HeadShard) -> slice:
        found = share.kv_heads if self.of_keys else share.heads
        return slice(found.start, found.stop)


def ulysses_forward(
    job: ExecutionPlan, spread: HeadSharding, team: RankMesh, q: Tensor, keys: Keys, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of this rank's queries, out in the dtype of q, lse in the accumulation dtype."""
    paths = _HeadExchange(spread, team)
    there = [_HeadTensor(_turned(q), False), *(_HeadTensor(x, True) for x in pack_keys(keys))]
    wide = accumulation_dtype(q.dtype)
    v_dim = keys.v.shape[3]
    out = torch.empty(*q.shape[:3], v_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=wide, device=q.device)
    home = [_HeadTensor(_turned(out), False), _HeadTensor(lse, False)]
    for stage, (q_here, *keys_here) in paths.stages(there, home):
        share = spread.stages[stage][spread.place]
        sink_here = None if sink is None else sink[share.heads.start : share.heads.stop]
        inner = replace(job, head_runs=share.runs())
        queries = [Queries(_turned(x)) for x in q_here]
        states = [
            empty_state(part.q, v_dim, _turned_place(out_place), lse_place)
            for part, out_place, lse_place in zip(
                queries, *(paths.places(stage, index, wide) for index in (0, 1)), strict=True
            )
        ]
        run_forward(inner, paths.inner, queries, _key_blocks(keys_here), states, sink_here)
        paths.give(stage, [[_turned(state.out) for state in states], [state.lse for state in states]])
    return out, lse


def ulysses_backward(
    job: ExecutionPlan, spread: HeadSharding, team: RankMesh, queries: BackwardQueries, keys: Keys
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns this rank's dq, dk, dv, None where they are not wanted."""
    paths = _HeadExchange(spread, team)
    wide = queries.lse.dtype
    there = [_HeadTensor(x, False) for x in pack_queries(queries)] + [_HeadTensor(x, True) for x in pack_keys(keys)]
    dq = torch.empty_like(queries.q, memory_format=torch.contiguous_format) if job.wanted[0] else None
    # Sums over ranks are made in the accumulation dtype, and rounded once.
    made = partial(torch.zeros_like, dtype=wide) if spread.replicates else torch.empty_like
    made_like = partial(made, memory_format=torch.contiguous_format)
    dkv = KeyGradients(made_like(keys.k), made_like(keys.v)) if job.wanted[1] else None
    home = [_HeadTensor(_turned(dq), False)] if dq is not None else []
    of_keys = len(home)
    home += [_HeadTensor(x, True, spread.replicates) for x in pack_gradients(dkv)] if dkv is not None else []
    for stage, came in paths.stages(there, home):
        inner = replace(job, head_runs=spread.stages[stage][spread.place].runs())
        parts = [unpack_queries(tensors, queries.lse_grad) for tensors in zip(*came[:4], strict=True)]
        keys_here = _key_blocks(came[4:])
        places = GradBuffers.anywhere(parts, keys_here)
        if dq is not None:
            places = places._replace(dq=[_turned_place(x) for x in paths.places(stage, 0, wide)])
        if dkv is not None:
            pairs = zip(*(paths.places(stage, of_keys + index, wide) for index in (0, 1)), strict=True)
            places = places._replace(
                dkv=[None if dk is None or dv is None else unpack_gradients((dk, dv)) for dk, dv in pairs]
            )
        dq_here, dkv_here = run_backward(inner, paths.inner, parts, keys_here, places)
        results = [[_turned(x) for x in dq_here]] if dq is not None else []
        results += [list(x) for x in zip(*map(pack_gradients, dkv_here), strict=True)] if dkv is not None else []
        paths.give(stage, results)
    return dq, *(dkv or (None, None))


def _key_blocks(tensors: Sequence[Sequence[Tensor]]) -> list[Keys]:
    """Keys in parts, of (k, v) in parts as they travel."""
    return [unpack_keys(pair) for pair in zip(*tensors, strict=True)]


class _HeadExchange:
    """The all-to-alls of one call: there, and back."""

    def __init__(self, spread: HeadSharding, team: RankMesh) -> None:
        self._spread, self._axis = spread, team.axes[-1]
        self.inner = RankMesh(team.axes[:-1])
        self._home: Sequence[_HeadTensor] = ()
        self._leaving: list[Packet | None] = []
        self._placed: set[tuple[int, int]] = set()  # (load, rank)
        self._returning: tuple[int, AllToAll] | None = None

    def stages(
        self, there: Sequence[_HeadTensor], home: Sequence[_HeadTensor]
    ) -> Iterator[tuple[int, list[list[Tensor]]]]:
        """Yields each stage and its tensors, (B, share's heads, rows, ...), in parts; `home` takes what is given."""
        self._home = home
        coming = self._send(0, there)
        for stage in range(len(self._spread.stages)):
            came = self._unite(stage, there, coming.wait())
            if stage + 1 < len(self._spread.stages):
                coming = self._send(stage + 1, there)
            self._leaving, self._placed = [], set()
            yield stage, came
            del came
        self._collect()

    def places(self, stage: int, index: int, dtype: torch.dtype) -> list[Tensor | None]:
        """Returns where the results for `home[index]` are to arise, one for each part; None where they are copied.

        Whoever asks makes them there.
        """
        load = self._home[index]
        if load.x.dtype is not dtype or not all(part.in_place for part in self._unions(load)):
            return [None] * len(self._unions(load))
        # What is added at home does not begin there.
        found = [
            None if load.adds and peer == self._spread.place else target
            for peer, target in enumerate(self._targets(stage, index))
        ]
        self._placed |= {(index, peer) for peer, target in enumerate(found) if target is not None}
        return found

    def give(self, stage: int, results: Sequence[Sequence[Tensor]]) -> None:
        """Sends the stage's results, in parts, in the order of `home`, to the ranks whose rows they are."""
        self._collect()
        shares, place = self._spread.stages[stage], self._spread.place
        self._copy_out(stage, results, [peer for peer in range(len(shares)) if peer != place])
        came = [self._fields(self._home, share, place) for share in shares]
        trade = AllToAll(self._axis, self._outgoing(stage), came)
        self._copy_out(stage, results, [place])
        self._returning, self._leaving = (stage, trade), []

    def _copy_out(self, stage: int, results: Sequence[Sequence[Tensor]], peers: Sequence[int]) -> None:
        """Puts results where they leave from, or belong, unless they have arisen there."""
        for index, (load, parts) in enumerate(zip(self._home, results, strict=True)):
            targets = self._targets(stage, index)
            for part, peer, places in self._members(load):
                if peer not in peers or (index, peer) in self._placed:
                    continue
                adds = load.adds and peer == self._spread.place
                for rows, held in places:
                    _copy_or_add(targets[peer][:, :, rows], parts[part][:, :, held], adds)

    def _collect(self) -> None:
        """Puts what was returned last into its place, in the order of ranks."""
        if self._returning is None:
            return
        stage, trade = self._returning
        self._returning = None
        for peer, packet in trade.wait().items():
            for load, x in zip(self._home, packet.tensors, strict=True):
                _copy_or_add(load.x[:, load.heads(self._spread.stages[stage][peer])], x, load.adds)

    def _targets(self, stage: int, index: int) -> list[Tensor]:
        """Each rank's rows of this rank's heads: where they leave from; of this rank, where they are to be."""
        load, share = self._home[index], self._spread.stages[stage][self._spread.place]
        own = load.x[:, load.heads(share)]
        return [own if packet is None else packet.tensors[index] for packet in self._outgoing(stage)]

    def _outgoing(self, stage: int) -> list[Packet | None]:
        """The packets in which the stage's results leave."""
        if not self._leaving:
            shares, place, device = self._spread.stages[stage], self._spread.place, self._home[0].x.device
            self._leaving = [
                None if peer == place else Packet.empty(self._fields(self._home, shares[place], peer), device)
                for peer in range(len(shares))
            ]
        return self._leaving

    def _send(self, stage: int, there: Sequence[_HeadTensor]) -> AllToAll:
        shares, place = self._spread.stages[stage], self._spread.place
        packets: list[Packet | None] = []
        for peer, share in enumerate(shares):
            if peer == place:
                packets.append(None)
                continue
            packet = Packet.empty(self._fields(there, share, place), there[0].x.device)
            for load, into in zip(there, packet.tensors, strict=True):
                into.copy_(load.x[:, load.heads(share)])
            packets.append(packet)
        return AllToAll(self._axis, packets, [self._fields(there, shares[place], peer) for peer in range(len(shares))])

    def _unite(self, stage: int, there: Sequence[_HeadTensor], came: dict[int, Packet]) -> list[list[Tensor]]:
        """Puts everybody's rows of this rank's heads together, part by part."""
        share = self._spread.stages[stage][self._spread.place]
        found = []
        for index, load in enumerate(there):
            own = load.x[:, load.heads(share)]
            parts = []
            for part in self._unions(load):
                shape = (*own.shape[:ROW_DIM], part.total, *own.shape[ROW_DIM + 1 :])
                parts.append(None if part.in_place else own.new_empty(shape))
            for number, peer, places in self._members(load):
                x = own if peer == self._spread.place else came[peer].tensors[index]
                whole = parts[number]
                if whole is None:
                    parts[number] = x
                    continue
                for rows, held in places:
                    whole[:, :, held] = x[:, :, rows]
            found.append([x for x in parts if x is not None])
        return found

    def _unions(self, load: _HeadTensor) -> tuple[GatheredRows, ...]:
        return self._spread.kv_rows if load.of_keys else self._spread.q_rows

    def _members(self, load: _HeadTensor) -> Iterator[tuple[int, int, tuple[tuple[slice, slice], ...]]]:
        """Yields each rank's part, its place on the axis, and where its rows are in the part."""
        peer = 0
        for number, part in enumerate(self._unions(load)):
            for places in part.places:
                yield number, peer, places
                peer += 1

    def _fields(self, loads: Sequence[_HeadTensor], share: HeadShard, rows_of: int) -> list[Field]:
        """What goes between two ranks: heads of `share`, rows of the rank at place `rows_of`."""
        fields = []
        for load in loads:
            heads = load.heads(share)
            rows = [rows for part in self._unions(load) for rows in part.num_rows][rows_of]
            shape = (load.x.shape[0], heads.stop - heads.start, rows, *load.x.shape[ROW_DIM + 1 :])
            fields.append(Field(shape, load.x.dtype))
        return fields


def _copy_or_add(target: Tensor, x: Tensor, adds: bool) -> None:
    if adds:
        target += x
    else:
        target.copy_(x)


def _turned(x: Tensor) -> Tensor:
    """(B, rows, H, D) as (B, H, rows, D), or back."""
    return x.transpose(1, 2)


def _turned_place(x: Tensor | None) -> Tensor | None:
    return None if x is None else _turned(x)
