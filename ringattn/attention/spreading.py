"""Spreading heads: an all-to-all there, the plan for fewer heads of more rows, an all-to-all back; stage by stage.

The next stage's heads are on their way while one is computed, and so are the results of the one before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.attention.executor import Job, run_backward, run_forward
from ringattn.attention.sides import Queries
from ringattn.comm.all_to_all import Trade
from ringattn.comm.group import Team
from ringattn.comm.packet import Field, Packet
from ringattn.geometry.heads import Share
from ringattn.geometry.spread import Spread, Union
from ringattn.softmax import accumulation_dtype

_ROWS = 2  # the dim of rows of tensors on their way


class _Part(NamedTuple):
    """A tensor on its way, (B, H, rows, ...), with the rows and heads of queries or of keys.

    As a place for what comes back: that is copied into it, or added to it, being sent in its dtype.
    """

    x: Tensor
    of_keys: bool
    adds: bool = False

    def heads(self, share: Share) -> slice:
        found = share.kv_heads if self.of_keys else share.heads
        return slice(found.start, found.stop)


def spread_forward(
    job: Job, spread: Spread, team: Team, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of this rank's queries, out in the dtype of q, lse in the accumulation dtype."""
    paths = _Paths(spread, team)
    there = [_Part(q.transpose(1, 2), False), _Part(k.transpose(1, 2), True), _Part(v.transpose(1, 2), True)]
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=accumulation_dtype(q.dtype), device=q.device)
    home = [_Part(out.transpose(1, 2), False), _Part(lse, False)]
    for stage, came in paths.stages(there, home):
        share = spread.stages[stage][spread.place]
        q_here, k_here, v_here = (x.transpose(1, 2) for x in came)
        sink_here = None if sink is None else sink[share.heads.start : share.heads.stop]
        inner = replace(job, head_runs=share.runs())
        out_here, lse_here = run_forward(inner, paths.inner, q_here, k_here, v_here, sink_here)
        paths.give(stage, [out_here.transpose(1, 2), lse_here])
    return out, lse


def spread_backward(
    job: Job, spread: Spread, team: Team, queries: Queries, k: Tensor, v: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns this rank's dq, dk, dv, None where they are not wanted."""
    paths = _Paths(spread, team)
    q, dout, lse, delta = queries
    there = [_Part(x, False) for x in (q.transpose(1, 2), dout.transpose(1, 2), lse, delta)]
    there += [_Part(x.transpose(1, 2), True) for x in (k, v)]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format) if job.wanted[0] else None
    # Sums over ranks are made in the accumulation dtype, and rounded once.
    adds = spread.replicates
    dtype = lse.dtype if adds else k.dtype
    dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) if job.wanted[1] else None for x in (k, v))
    home = [_Part(dq.transpose(1, 2), False)] if dq is not None else []
    home += [_Part(x.transpose(1, 2), True, adds) for x in (dk, dv) if x is not None]
    for stage, came in paths.stages(there, home):
        q_here, dout_here, lse_here, delta_here, k_here, v_here = came
        inner = replace(job, head_runs=spread.stages[stage][spread.place].runs())
        here = Queries(q_here.transpose(1, 2), dout_here.transpose(1, 2), lse_here, delta_here)
        gradients = run_backward(inner, paths.inner, here, k_here.transpose(1, 2), v_here.transpose(1, 2))
        wanted = [x for x, goes in zip(gradients, (job.wanted[0], job.wanted[1], job.wanted[1]), strict=True) if goes]
        paths.give(stage, [x.transpose(1, 2) for x in wanted])
    return dq, dk, dv


class _Paths:
    """The all-to-alls of one call: there, and back."""

    def __init__(self, spread: Spread, team: Team) -> None:
        self._spread, self._axis = spread, team.axes[-1]
        self.inner = Team(team.axes[:-1])
        self._home: Sequence[_Part] = ()
        self._returning: tuple[int, Trade] | None = None

    def stages(self, there: Sequence[_Part], home: Sequence[_Part]) -> Iterator[tuple[int, list[Tensor]]]:
        """Yields each stage and its tensors, (B, share's heads, rows of all ranks, ...); `home` takes what is given."""
        self._home = home
        coming = self._send(0, there)
        for stage in range(len(self._spread.stages)):
            came = self._unite(stage, there, coming.wait())
            if stage + 1 < len(self._spread.stages):
                coming = self._send(stage + 1, there)
            yield stage, came
            del came
        self._collect()

    def give(self, stage: int, results: Sequence[Tensor]) -> None:
        """Sends the stage's results, in the order of `home`, to the ranks whose rows they are."""
        self._collect()
        shares, place = self._spread.stages[stage], self._spread.place
        parts: list[Packet | None] = []
        for peer in range(len(shares)):
            if peer == place:
                parts.append(None)
                continue
            packet = Packet.empty(self._fields(self._home, shares[place], peer), results[0].device)
            for result, part, into in zip(results, self._home, packet.tensors, strict=True):
                for rows, held in self._rows(part).places[peer]:
                    into[:, :, rows].copy_(result[:, :, held])
            parts.append(packet)
        came = [self._fields(self._home, share, place) for share in shares]
        trade = Trade(self._axis, parts, came)
        for result, part in zip(results, self._home, strict=True):
            for rows, held in self._rows(part).places[place]:
                _put(part, shares[place], result[:, :, held], rows)
        self._returning = stage, trade

    def _collect(self) -> None:
        """Puts what was returned last into its place, in the order of ranks."""
        if self._returning is None:
            return
        stage, trade = self._returning
        self._returning = None
        for peer, packet in trade.wait().items():
            for part, x in zip(self._home, packet.tensors, strict=True):
                _put(part, self._spread.stages[stage][peer], x, slice(None))

    def _send(self, stage: int, there: Sequence[_Part]) -> Trade:
        shares, place = self._spread.stages[stage], self._spread.place
        parts: list[Packet | None] = []
        for peer, share in enumerate(shares):
            if peer == place:
                parts.append(None)
                continue
            packet = Packet.empty(self._fields(there, share, place), there[0].x.device)
            for part, into in zip(there, packet.tensors, strict=True):
                into.copy_(part.x[:, part.heads(share)])
            parts.append(packet)
        return Trade(self._axis, parts, [self._fields(there, shares[place], peer) for peer in range(len(shares))])

    def _unite(self, stage: int, there: Sequence[_Part], came: dict[int, Packet]) -> list[Tensor]:
        """Puts everybody's rows of this rank's heads together."""
        place = self._spread.place
        share = self._spread.stages[stage][place]
        found = []
        for index, part in enumerate(there):
            own, union = part.x[:, part.heads(share)], self._rows(part)
            whole = own.new_empty((*own.shape[:_ROWS], union.total, *own.shape[_ROWS + 1 :]))
            for peer, places in enumerate(union.places):
                x = own if peer == place else came[peer].tensors[index]
                for rows, held in places:
                    whole[:, :, held] = x[:, :, rows]
            found.append(whole)
        return found

    def _rows(self, part: _Part) -> Union:
        return self._spread.kv_rows if part.of_keys else self._spread.q_rows

    def _fields(self, parts: Sequence[_Part], share: Share, rows_of: int) -> list[Field]:
        """What goes between two ranks: heads of `share`, rows of the rank at place `rows_of`."""
        fields = []
        for part in parts:
            heads, rows = part.heads(share), self._rows(part).num_rows[rows_of]
            shape = (part.x.shape[0], heads.stop - heads.start, rows, *part.x.shape[_ROWS + 1 :])
            fields.append(Field(shape, part.x.dtype))
        return fields


def _put(part: _Part, share: Share, x: Tensor, rows: slice) -> None:
    target = part.x[:, part.heads(share), rows]
    if part.adds:
        target += x
    else:
        target.copy_(x)
