"""Ulysses: an all-to-all that shards heads, attention of a rank's heads over more rows, and an all-to-all back.

Stages overlap: while the heads of one stage are computed, the heads of the next stage and the results of the previous
stage are in flight.

On CPU the rows of each peer are a chunk: the kernel reads it in the receive buffer, and writes results into the send
buffer, or into the output. On GPU the rows are concatenated, since a launch costs more than a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.attention.compiled_program import CompiledProgram
from ringattn.attention.execution_plan import ExecutionPlan
from ringattn.attention.executor import execute
from ringattn.attention.movement import Backward, BackwardByQueries, Forward
from ringattn.comm.all_to_all import AllToAll
from ringattn.comm.packet import Field, Packet
from ringattn.comm.topology import RankMesh
from ringattn.kernels.contract import BackwardQueries, Keys, Queries
from ringattn.plan.head_parallel import GatheredRows, HeadSharding
from ringattn.plan.head_shards import HeadShard
from ringattn.softmax import accumulation_dtype, add_sink_, empty_state

ROW_DIM = 2  # the dim of rows, of tensors (B, H, rows, ...)


class _HeadTensor(NamedTuple):
    """A tensor that is exchanged, (B, H, rows, ...), with the rows and heads of queries or of keys.

    As an output it takes the results that return: copied, or added, in its dtype.
    """

    x: Tensor
    of_keys: bool
    adds: bool = False

    def heads(self, shard: HeadShard) -> slice:
        """Returns its heads in a shard."""
        found = shard.kv_heads if self.of_keys else shard.heads
        return slice(found.start, found.stop)


def ulysses_forward(
    plan: ExecutionPlan, sharding: HeadSharding, mesh: RankMesh, q: Tensor, keys: Keys, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of this rank's queries, out in the dtype of q, lse in the accumulation dtype."""
    exchange = _HeadExchange(sharding, mesh)
    sums, v_dim = accumulation_dtype(q.dtype), keys.v.shape[3]
    out = torch.empty(*q.shape[:3], v_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=sums, device=q.device)
    inputs = [_HeadTensor(_by_head(q), False), *(_HeadTensor(_by_head(x), True) for x in keys[:2])]
    outputs = [_HeadTensor(_by_head(out), False), _HeadTensor(lse, False)]
    for stage, (q_chunks, k_chunks, v_chunks) in exchange.stages(inputs, outputs):
        shard = sharding.stages[stage][sharding.rank]
        queries = [Queries(_by_row(x)) for x in q_chunks]
        buffers = zip(*(exchange.result_buffers(stage, index, sums) for index in (0, 1)), strict=True)
        states = [
            empty_state(x.q, v_dim, None if out_rows is None else _by_row(out_rows), lse_rows)
            for x, (out_rows, lse_rows) in zip(queries, buffers, strict=True)
        ]
        chunks = [Keys(_by_row(k), _by_row(v)) for k, v in zip(k_chunks, v_chunks, strict=True)]
        movement = Forward(plan.headwise_of(shard), queries, states, chunks)
        execute(_compiled(plan, exchange, shard, backward=False), exchange.inner, movement)
        if sink is not None:
            for state in states:
                add_sink_(state.out, state.lse, sink[shard.heads.start : shard.heads.stop])
        exchange.send_back(stage, [[_by_head(state.out) for state in states], [state.lse for state in states]])
    return out, lse


def ulysses_backward(
    plan: ExecutionPlan, sharding: HeadSharding, mesh: RankMesh, queries: BackwardQueries, keys: Keys
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns this rank's dq, dk, dv, None where they are not wanted."""
    exchange = _HeadExchange(sharding, mesh)
    sums = queries.lse.dtype
    inputs = [_HeadTensor(_by_head(x), False) for x in (queries.q, queries.dout)]
    inputs += [_HeadTensor(x, False) for x in (queries.lse, queries.delta)]
    inputs += [_HeadTensor(_by_head(x), True) for x in keys[:2]]
    dq = torch.empty_like(queries.q, memory_format=torch.contiguous_format) if plan.wanted[0] else None
    # Sums over ranks are made in the accumulation dtype, and rounded once.
    make = partial(torch.zeros_like, dtype=sums) if sharding.replicates else torch.empty_like
    dkv = [make(x, memory_format=torch.contiguous_format) for x in keys[:2]] if plan.wanted[1] else []
    outputs = [_HeadTensor(_by_head(dq), False)] if dq is not None else []
    outputs += [_HeadTensor(_by_head(x), True, sharding.replicates) for x in dkv]
    for stage, gathered in exchange.stages(inputs, outputs):
        shard = sharding.stages[stage][sharding.rank]
        q_chunks = [
            BackwardQueries(_by_row(q), _by_row(dout), lse, delta, queries.lse_grad)
            for q, dout, lse, delta in zip(*gathered[:4], strict=True)
        ]
        kv_chunks = [Keys(_by_row(k), _by_row(v)) for k, v in zip(*gathered[4:], strict=True)]
        buffers = [exchange.result_buffers(stage, index, sums) for index in range(len(outputs))]
        dq_chunks = _zeros([chunk.q for chunk in q_chunks], sums, buffers[0] if dq is not None else None)
        dk_chunks = _zeros([chunk.k for chunk in kv_chunks], sums, buffers[-2] if dkv else None)
        dv_chunks = _zeros([chunk.v for chunk in kv_chunks], sums, buffers[-1] if dkv else None)
        kind = BackwardByQueries if plan.moves_queries_back else Backward
        gradients = list(zip(dk_chunks, dv_chunks, strict=True))
        movement = kind(plan.headwise_of(shard), q_chunks, kv_chunks, dq_chunks, gradients)
        execute(_compiled(plan, exchange, shard, backward=True), exchange.inner, movement)
        results = ([dq_chunks] if dq is not None else []) + ([dk_chunks, dv_chunks] if dkv else [])
        exchange.send_back(stage, [[_by_head(x) for x in chunks] for chunks in results])
    return (dq, dkv[0], dkv[1]) if dkv else (dq, None, None)


def _compiled(plan: ExecutionPlan, exchange: _HeadExchange, shard: HeadShard, *, backward: bool) -> CompiledProgram:
    return plan.compiled(exchange.inner, shard, backward=backward)


def _zeros(like: Sequence[Tensor], dtype: torch.dtype, buffers: Sequence[Tensor | None] | None) -> list[Tensor]:
    """Returns zeros of these shapes, (B, rows, H, D), in the buffers (B, H, rows, D) where there are any."""
    found = []
    for x, buffer in zip(like, buffers or [None] * len(like), strict=True):
        fresh = torch.zeros(x.shape, dtype=dtype, device=x.device) if buffer is None else _by_row(buffer.zero_())
        found.append(fresh)
    return found


class _HeadExchange:
    """The all-to-alls of one call: to the ranks that compute the heads, and back."""

    def __init__(self, sharding: HeadSharding, mesh: RankMesh) -> None:
        self._sharding, self._axis = sharding, mesh.axes[-1]
        self.inner = RankMesh(mesh.axes[:-1])
        self._outputs: Sequence[_HeadTensor] = ()
        self._outgoing_packets: list[Packet | None] = []
        self._written: set[tuple[int, int]] = set()  # (output, rank): results that the kernel wrote into their target
        self._returning: tuple[int, AllToAll] | None = None

    def stages(
        self, inputs: Sequence[_HeadTensor], outputs: Sequence[_HeadTensor]
    ) -> Iterator[tuple[int, list[list[Tensor]]]]:
        """Yields each stage and its tensors, (B, heads, rows, ...), in chunks; `outputs` takes the results."""
        self._outputs = outputs
        pending = self._send(0, inputs)
        for stage in range(len(self._sharding.stages)):
            gathered = self._gather_rows(stage, inputs, pending.wait())
            if stage + 1 < len(self._sharding.stages):
                pending = self._send(stage + 1, inputs)
            self._outgoing_packets, self._written = [], set()
            yield stage, gathered
            del gathered
        self._collect()

    def result_buffers(self, stage: int, index: int, dtype: torch.dtype) -> list[Tensor | None]:
        """Returns where the results for `outputs[index]` are written, one for each chunk; None where they are copied.

        The caller must write them there.
        """
        tensor = self._outputs[index]
        if tensor.x.dtype is not dtype or not all(chunk.in_place for chunk in self._row_sets(tensor)):
            return [None] * len(self._row_sets(tensor))
        # An output that adds takes its own results from a buffer, too.
        found = [
            None if tensor.adds and peer == self._sharding.rank else target
            for peer, target in enumerate(self._targets(stage, index))
        ]
        self._written |= {(index, peer) for peer, target in enumerate(found) if target is not None}
        return found

    def send_back(self, stage: int, results: Sequence[Sequence[Tensor]]) -> None:
        """Sends a stage's results, in chunks, in the order of `outputs`, to the ranks that hold the rows."""
        self._collect()
        shards, rank = self._sharding.stages[stage], self._sharding.rank
        self._copy_out(stage, results, [peer for peer in range(len(shards)) if peer != rank])
        incoming = [self._fields(self._outputs, shard, rank) for shard in shards]
        pending = AllToAll(self._axis, self._outgoing(stage), incoming)
        self._copy_out(stage, results, [rank])
        self._returning, self._outgoing_packets = (stage, pending), []

    def _copy_out(self, stage: int, results: Sequence[Sequence[Tensor]], peers: Sequence[int]) -> None:
        """Copies results into the send buffers and the outputs, unless the kernel wrote them there."""
        for index, (tensor, chunks) in enumerate(zip(self._outputs, results, strict=True)):
            targets = self._targets(stage, index)
            for chunk, peer, row_slices in self._members(tensor):
                if peer not in peers or (index, peer) in self._written:
                    continue
                adds = tensor.adds and peer == self._sharding.rank
                for rows, held in row_slices:
                    _copy_or_add(targets[peer][:, :, rows], chunks[chunk][:, :, held], adds)

    def _collect(self) -> None:
        """Copies the results of the last stage into the outputs, in the order of ranks."""
        if self._returning is None:
            return
        stage, pending = self._returning
        self._returning = None
        for peer, packet in pending.wait().items():
            for tensor, x in zip(self._outputs, packet.tensors, strict=True):
                _copy_or_add(tensor.x[:, tensor.heads(self._sharding.stages[stage][peer])], x, tensor.adds)

    def _targets(self, stage: int, index: int) -> list[Tensor]:
        """Each rank's rows of this rank's heads: in its outgoing packet; of this rank, in the output."""
        tensor, shard = self._outputs[index], self._sharding.stages[stage][self._sharding.rank]
        own = tensor.x[:, tensor.heads(shard)]
        return [own if packet is None else packet.tensors[index] for packet in self._outgoing(stage)]

    def _outgoing(self, stage: int) -> list[Packet | None]:
        """The packets in which the stage's results are sent."""
        if not self._outgoing_packets:
            shards, rank, device = self._sharding.stages[stage], self._sharding.rank, self._outputs[0].x.device
            self._outgoing_packets = [
                None if peer == rank else Packet.empty(self._fields(self._outputs, shards[rank], peer), device)
                for peer in range(len(shards))
            ]
        return self._outgoing_packets

    def _send(self, stage: int, inputs: Sequence[_HeadTensor]) -> AllToAll:
        shards, rank = self._sharding.stages[stage], self._sharding.rank
        packets: list[Packet | None] = []
        for peer, shard in enumerate(shards):
            if peer == rank:
                packets.append(None)
                continue
            packet = Packet.empty(self._fields(inputs, shard, rank), inputs[0].x.device)
            for tensor, into in zip(inputs, packet.tensors, strict=True):
                into.copy_(tensor.x[:, tensor.heads(shard)])
            packets.append(packet)
        return AllToAll(self._axis, packets, [self._fields(inputs, shards[rank], peer) for peer in range(len(shards))])

    def _gather_rows(
        self, stage: int, inputs: Sequence[_HeadTensor], received: dict[int, Packet]
    ) -> list[list[Tensor]]:
        """Gathers the rows of all ranks for this rank's heads, chunk by chunk."""
        shard = self._sharding.stages[stage][self._sharding.rank]
        found = []
        for index, tensor in enumerate(inputs):
            own = tensor.x[:, tensor.heads(shard)]
            chunks = []
            for chunk in self._row_sets(tensor):
                shape = (*own.shape[:ROW_DIM], chunk.total, *own.shape[ROW_DIM + 1 :])
                chunks.append(None if chunk.in_place else own.new_empty(shape))
            for number, peer, row_slices in self._members(tensor):
                x = own if peer == self._sharding.rank else received[peer].tensors[index]
                whole = chunks[number]
                if whole is None:
                    chunks[number] = x
                    continue
                for rows, held in row_slices:
                    whole[:, :, held] = x[:, :, rows]
            found.append([x for x in chunks if x is not None])
        return found

    def _row_sets(self, tensor: _HeadTensor) -> tuple[GatheredRows, ...]:
        return self._sharding.kv_rows if tensor.of_keys else self._sharding.q_rows

    def _members(self, tensor: _HeadTensor) -> Iterator[tuple[int, int, tuple[tuple[slice, slice], ...]]]:
        """Yields each rank's chunk, its rank on the axis, and the slices (of its rows, of the chunk's rows)."""
        peer = 0
        for number, chunk in enumerate(self._row_sets(tensor)):
            for row_slices in chunk.row_slices:
                yield number, peer, row_slices
                peer += 1

    def _fields(self, tensors: Sequence[_HeadTensor], shard: HeadShard, rows_of: int) -> list[Field]:
        """The packet between two ranks: heads of `shard`, rows of the axis' rank `rows_of`."""
        fields = []
        for tensor in tensors:
            heads = tensor.heads(shard)
            rows = [rows for chunk in self._row_sets(tensor) for rows in chunk.num_rows][rows_of]
            shape = (tensor.x.shape[0], heads.stop - heads.start, rows, *tensor.x.shape[ROW_DIM + 1 :])
            fields.append(Field(shape, tensor.x.dtype))
        return fields


def _copy_or_add(target: Tensor, x: Tensor, adds: bool) -> None:
    if adds:
        target += x
    else:
        target.copy_(x)


def _by_head(x: Tensor) -> Tensor:
    """(B, rows, H, D) as (B, H, rows, D)."""
    return x.transpose(1, 2)


def _by_row(x: Tensor) -> Tensor:
    """(B, H, rows, D) as (B, rows, H, D)."""
    return x.transpose(1, 2)
