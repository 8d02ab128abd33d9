"""The executor: runs any plan, forward and backward. There is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.profiler import record_function

from ringattn.attention.backward_modes import (
    BackwardMode,
    GradBuffers,
    KeyGradients,
    backward_mode,
    pack_keys,
    unpack_keys,
)
from ringattn.attention.block_buffers import BlockBuffers
from ringattn.attention.chunked_rows import ChunkedRows
from ringattn.comm.topology import RankMesh
from ringattn.kernels import BackwardQueries, BlockKernel, Keys, Queries, State
from ringattn.plan.head_parallel import HeadSharding
from ringattn.plan.head_shards import HeadSlice
from ringattn.plan.payload import AttentionShape
from ringattn.plan.plan import ComputeTiles, Payload, Plan, Program
from ringattn.score import Score
from ringattn.softmax import add_sink_


@dataclass(frozen=True)
class ExecutionPlan:
    """Everything about a call but its tensors: decided once per signature, the plan being this rank's own."""

    plan: Plan
    spread: HeadSharding | None  # how heads are spread first, if they are: the plan is then one for what comes of it
    kernel: BlockKernel
    score: Score  # resolved, without tensors: what the kernel takes
    head_runs: tuple[HeadSlice, ...]  # the heads, as kernels take them: one run but for uneven shares of grouped ones
    returns_lse: bool  # whether the caller can see lse, so that gradients of it may come on any rank
    wanted: tuple[bool, bool]  # whether gradients of (q, k or v) are, so that they must travel

    @property
    def backward(self) -> Program:
        """The backward's steps, without those gradients that nobody wants."""
        program = self.plan.backward
        return program if self.sums_wanted else program.without_gradients()

    @property
    def sums_wanted(self) -> bool:
        """Whether the gradients of what travels in the backward are wanted."""
        return self.wanted[0 if self.plan.backward.carried is Payload.Q else 1]

    def bytes_sent(self, sizes: AttentionShape) -> tuple[int, int]:
        """Returns the bytes that this rank sends in (forward, backward).

        Args:
            sizes: of the tensors.
        """
        programs = self.plan.forward, self.backward
        if self.spread is None:
            forward, backward = (program.bytes_sent(sizes) for program in programs)
            return forward, backward if any(self.wanted) else 0
        forward, backward = self.spread.bytes_sent(sizes, self.wanted)
        for stage in self.spread.stages:
            share = stage[self.spread.place]
            part = sizes.of_heads(len(share.heads), len(share.kv_heads))
            forward += self.plan.forward.bytes_sent(part)
            backward += self.backward.bytes_sent(part)
        return forward, backward if any(self.wanted) else 0


def run_forward(
    job: ExecutionPlan,
    team: RankMesh,
    queries: Sequence[Queries],
    keys: Sequence[Keys],
    states: Sequence[State],
    sink: Tensor | None,
) -> None:
    """Lets this rank's queries attend to all keys and the sink, each in the plan's parts: updates their states."""
    program = job.plan.forward
    blocks = BlockBuffers(program, team, job.plan.rank, ChunkedRows([pack_keys(part) for part in keys]))
    for step in program.steps:
        blocks.begin(step)
        for visit in step.visits:
            block = unpack_keys(blocks.carried(visit.piece))
            with record_function(f"ringattn: attend to block {visit.piece.block}"):
                for run in job.head_runs:
                    job.kernel.forward(
                        queries[visit.part].of_heads(run.heads),
                        block.of_heads(run.kv_heads),
                        visit.tiles,
                        job.score.of_heads(run.heads),
                        states[visit.part].of_heads(run.heads),
                    )
        blocks.end(step)
    blocks.finish()
    if sink is not None:
        for state in states:
            add_sink_(*state, sink)


def run_backward(
    job: ExecutionPlan, team: RankMesh, queries: Sequence[BackwardQueries], keys: Sequence[Keys], places: GradBuffers
) -> tuple[Sequence[Tensor], Sequence[KeyGradients]]:
    """Returns the dq of each part, and the dk, dv, in the accumulation dtype, every rank's share of them summed up.

    Args:
        job: what to run.
        team: the ranks of its plan.
        queries: this rank's, in the plan's parts.
        keys: the same.
        places: where the gradients of each part are to be.
    """
    program = job.backward
    side = backward_mode(program.carried, queries, keys, places)
    blocks = BlockBuffers(program, team, job.plan.rank, side.own(), side.sums(), side.places())
    for step in program.steps:
        blocks.begin(step)
        for visit in step.visits:
            with record_function(f"ringattn: gradients of block {visit.piece.block}"):
                _add_gradients(job, blocks, side, visit)
        if not job.sums_wanted:
            blocks.forget_sums()
        blocks.end(step)
    home = blocks.home_sums()
    blocks.finish()
    return side.gradients(home)


def _add_gradients(job: ExecutionPlan, blocks: BlockBuffers, side: BackwardMode, visit: ComputeTiles) -> None:
    """Computes a visit's gradients: those that stay in place, the others into the sum that travels with the piece."""
    came, sums = blocks.carried(visit.piece), blocks.sums(visit.piece)
    for run in job.head_runs:
        queries, keys = side.inputs(came, visit.part, run)
        gradients = side.outputs(sums, visit.part, run)
        job.kernel.backward(queries, keys, visit.tiles, job.score.of_heads(run.heads), gradients)
