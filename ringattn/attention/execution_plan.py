"""Execution plans: everything about a call but its tensors, decided once per signature."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch

from ringattn.attention.compiled_program import CompiledProgram, Field, compile_program, consecutive
from ringattn.attention.movement import HeadwiseKernel
from ringattn.comm.topology import RankMesh
from ringattn.kernels import BlockKernel
from ringattn.plan.head_parallel import HeadSharding
from ringattn.plan.head_shards import HeadShard, all_heads
from ringattn.plan.payload import AttentionShape, Payload
from ringattn.plan.plan import Plan, Program
from ringattn.score import Score
from ringattn.softmax import accumulation_dtype


class TensorSpec(NamedTuple):
    """The dims of the tensors of a call that its buffers depend on, and their dtype."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype

    @property
    def shape(self) -> AttentionShape:
        """The same for predictions."""
        return AttentionShape(*self[:5], self.dtype.itemsize, accumulation_dtype(self.dtype).itemsize)

    def fields(self, payload: Payload) -> tuple[Field, ...]:
        """Returns the tensors of a block that carries `payload`."""
        batch, heads, kv_heads, dim, v_dim, dtype = self
        sums = accumulation_dtype(dtype)
        return {
            Payload.KV: (Field(batch, kv_heads, dim, dtype), Field(batch, kv_heads, v_dim, dtype)),
            Payload.DKV: (Field(batch, kv_heads, dim, sums), Field(batch, kv_heads, v_dim, sums)),
            Payload.Q: (Field(batch, heads, dim, dtype),),
            Payload.STATE: (Field(batch, heads, v_dim, sums), Field(batch, heads, None, sums)),
            Payload.Q_BACKWARD: (
                Field(batch, heads, dim, dtype),
                Field(batch, heads, v_dim, dtype),
                Field(batch, heads, None, sums),
                Field(batch, heads, None, sums),
            ),
            Payload.DQ: (Field(batch, heads, dim, sums),),
        }[payload]


@dataclass(frozen=True)
class ExecutionPlan:
    """How one rank runs a call, forward and backward.

    Args:
        plan: this rank's programs; where heads are sharded, for the gathered rows.
        sharding: how heads are sharded first; None if they are not.
        kernel: what computes.
        score: the options, without tensors.
        tensors: the dims and dtype of q, k, v.
        q_chunks, kv_chunks: rows of the chunks in which this rank's own queries and keys lie.
        returns_lse: whether the caller can see lse, so that any rank may have a gradient of it.
        wanted: whether gradients of (q, k or v) are wanted, so that they are sent.
    """

    plan: Plan
    sharding: HeadSharding | None
    kernel: BlockKernel
    score: Score
    tensors: TensorSpec
    q_chunks: tuple[int, ...]
    kv_chunks: tuple[int, ...]
    returns_lse: bool
    wanted: tuple[bool, bool]
    _compiled: dict[tuple[bool, int, int], CompiledProgram] = field(default_factory=dict, repr=False, compare=False)

    @property
    def backward(self) -> Program:
        """The backward's steps, without gradients that are not wanted."""
        program = self.plan.backward
        return program if self.wanted[0 if self.moves_queries_back else 1] else program.without_returns()

    def shards(self) -> tuple[HeadShard, ...]:
        """Returns the heads that this rank computes, stage by stage."""
        if self.sharding is None:
            return (all_heads(self.tensors.heads, self.tensors.kv_heads),)
        return tuple(stage[self.sharding.rank] for stage in self.sharding.stages)

    @cached_property
    def headwise(self) -> HeadwiseKernel:
        """The kernel for all heads."""
        return self.headwise_of(all_heads(self.tensors.heads, self.tensors.kv_heads))

    def headwise_of(self, shard: HeadShard) -> HeadwiseKernel:
        """Returns the kernel for a shard of the heads."""
        return HeadwiseKernel(self.kernel, self.score, shard.runs())

    @cached_property
    def moves_queries_back(self) -> bool:
        """Whether queries move in the backward."""
        return self.plan.backward.moving.moves_queries

    def compiled(self, mesh: RankMesh, shard: HeadShard | None = None, *, backward: bool) -> CompiledProgram:
        """Returns the compiled program of a direction for a shard of the heads; None is all heads."""
        spec = self.tensors
        heads, kv_heads = (spec.heads, spec.kv_heads) if shard is None else (len(shard.heads), len(shard.kv_heads))
        key = backward, heads, kv_heads
        found = self._compiled.get(key)
        if found is None:
            part = spec._replace(heads=heads, kv_heads=kv_heads)
            program = self.backward if backward else self.plan.forward
            returning = part.fields(program.moving.returning) if backward or program.moving is Payload.Q else ()
            chunks = consecutive(self.q_chunks if program.moving.moves_queries else self.kv_chunks)
            found = compile_program(program, mesh, self.plan.rank, part.fields(program.moving), returning, chunks)
            self._compiled[key] = found
        return found

    def bytes_sent(self) -> tuple[int, int]:
        """Returns the bytes that this rank sends in (forward, backward)."""
        shape = self.tensors.shape
        forward, backward = (0, 0) if self.sharding is None else self.sharding.bytes_sent(shape, self.wanted)
        for shard in self.shards():
            part = shape.of_heads(len(shard.heads), len(shard.kv_heads))
            forward += self.plan.forward.bytes_sent(part)
            backward += self.backward.bytes_sent(part)
        return forward, backward if any(self.wanted) else 0


def without_tensors(score: Score) -> Score:
    """Returns the options that kernels and plans keep."""
    return replace(score, sink=None)
