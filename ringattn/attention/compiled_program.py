"""Programs compiled for one signature: every slot, message, view and wait is decided once, and then only run.

`compile_program` runs a rank's program with symbols in place of tensors. It decides which buffer (a *slot*) each slice
and each sum lies in, when a message is awaited, and which sums are accumulated where. What is left is a list of
instructions that the executor calls in order. A compiled program owns no memory: buffers come from a pool.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import NamedTuple

import torch

from ringattn.attention import instructions as op
from ringattn.attention.instructions import Instruction, View
from ringattn.comm.topology import RankMesh
from ringattn.plan.payload import Payload
from ringattn.plan.plan import BlockSlice, ComputeTiles, Program, Step, Transfer
from ringattn.types import Rows

_TAGS = {payload: tag for tag, payload in enumerate(Payload)}


class Field(NamedTuple):
    """One tensor of a block, (batch, heads, rows, dim) in memory; dim None is (batch, heads, rows)."""

    batch: int
    heads: int
    dim: int | None
    dtype: torch.dtype

    def num_bytes(self, rows: int) -> int:
        """Returns the bytes of so many rows."""
        return prod((self.batch, self.heads, rows, self.dim or 1)) * self.dtype.itemsize


@dataclass(frozen=True)
class CompiledProgram:
    """What one rank runs in one direction.

    Args:
        instructions: in order.
        num_slots: buffers that they name.
        num_messages: messages that they name.
        chunk_rows: the rows of each chunk of this rank's own block.
    """

    instructions: tuple[Instruction, ...]
    num_slots: int
    num_messages: int
    chunk_rows: tuple[int, ...]


def compile_program(
    program: Program, mesh: RankMesh, rank: int, moving: Sequence[Field], returning: Sequence[Field], chunks: Rows
) -> CompiledProgram:
    """Returns the instructions of a rank's program.

    Args:
        program: the rank's steps.
        mesh: the ranks that the program numbers.
        rank: whose program.
        moving: the tensors of a block that moves.
        returning: the tensors that are accumulated for it; () where nothing is.
        chunks: the rows of this rank's own block, as the consecutive chunks in which it lies.
    """
    compiler = _Compiler(program, mesh, rank, moving, returning, chunks)
    for step in program.steps:
        compiler.step(step)
    return compiler.finish()


class _Compiler:
    def __init__(
        self,
        program: Program,
        mesh: RankMesh,
        rank: int,
        moving: Sequence[Field],
        returning: Sequence[Field],
        chunks: Rows,
    ) -> None:
        self._program, self._mesh, self._own, self._chunks = program, mesh, BlockSlice(rank), chunks
        self._fields = {program.moving: tuple(moving), program.moving.returning: tuple(returning)}
        # Without returns, gradients of what moves are computed into memory that is dropped.
        self._keeps_sums = bool(returning) and any(
            t.payload is not program.moving for s in program.steps for t in (*s.sends, *s.receives)
        )
        self._out: list[Instruction] = []
        self._slots: dict[BlockSlice, int] = {}  # slices that lie in a buffer
        self._sums: dict[BlockSlice, int] = {}
        self._arriving: dict[BlockSlice, tuple[int, int]] = {}  # slice: (slot, message)
        self._returns: dict[Transfer, tuple[int, int]] = {}
        self._sending: dict[Transfer, tuple[int, int | None]] = {}  # message, slot to release with it
        self._num_slots = self._num_messages = 0

    def step(self, step: Step) -> None:
        """Compiles the posts, computes, waits and releases of a step."""
        sends = [(t, self._slot_to_send(t)) for t in step.sends]
        receives = [(t, self._new_slot(t.slice, t.payload)) for t in step.receives]
        self._post(sends, receives)
        for compute in step.computes:
            self._compute(compute)
        for t in step.wait_returns:
            if t in self._returns:
                self._accumulate(t)
        for t in step.wait_sends:
            message, slot = self._sending.pop(t)
            self._out.append(op.Wait(message))
            if slot is not None:
                self._out.append(op.Release(slot))
        for block_slice in step.release:
            if block_slice in self._slots:
                self._out.append(op.Release(self._slots.pop(block_slice)))

    def finish(self) -> CompiledProgram:
        """Waits for slices that no step uses: half a block moves as far as its other half must."""
        for _, message in self._arriving.values():
            self._out.append(op.Wait(message))
        rows = tuple(len(chunk) for chunk in self._chunks)
        return CompiledProgram(tuple(self._out), self._num_slots, self._num_messages, rows)

    def _new_slot(self, block_slice: BlockSlice, payload: Payload) -> int:
        slot = self._num_slots
        self._num_slots += 1
        rows = block_slice.num_rows(self._program.block_rows[block_slice.block])
        num_bytes, views = _views(self._fields[payload], rows)
        self._out.append(op.Allocate(slot, num_bytes, views, is_sum=payload is not self._program.moving))
        return slot

    def _slot_to_send(self, t: Transfer) -> int:
        if t.payload is not self._program.moving:
            slot = self._sum_slot(t.slice)
            del self._sums[t.slice]
            return slot
        self._await(t.slice)
        if t.slice not in self._slots:
            slot = self._slots[t.slice] = self._new_slot(t.slice, t.payload)
            self._out.append(op.Pack(slot, tuple(self._cut(t.slice.rows))))
        return self._slots[t.slice]

    def _post(self, sends: list[tuple[Transfer, int]], receives: list[tuple[Transfer, int]]) -> None:
        for axis in range(len(self._mesh.axes)):
            messages = []
            for is_send, transfers in ((False, receives), (True, sends)):
                for t, slot in transfers:
                    on, peer = self._mesh.route(t.peer)
                    if on == axis:
                        messages.append(self._message(t, slot, peer, is_send=is_send))
            if messages := [message for message in messages if message.num_bytes]:
                self._out.append(op.Post(axis, tuple(messages)))

    def _message(self, t: Transfer, slot: int, peer: int, *, is_send: bool) -> op.Message:
        number = self._num_messages
        self._num_messages += 1
        rows = self._program.rows_of(t)
        num_bytes = sum(field.num_bytes(rows) for field in self._fields[t.payload])
        is_sum = t.payload is not self._program.moving
        if is_send:
            self._sending[t] = number, slot if is_sum else None
        elif is_sum:
            self._returns[t] = slot, number
        else:
            self._arriving[t.slice] = slot, number
        return op.Message(is_send, number, slot, num_bytes, peer, _TAGS[t.payload])

    def _await(self, block_slice: BlockSlice) -> None:
        """Makes sure that a slice that is under way has arrived."""
        if block_slice in self._arriving:
            slot, message = self._arriving.pop(block_slice)
            self._out.append(op.Wait(message))
            self._slots[block_slice] = slot

    def _compute(self, compute: ComputeTiles) -> None:
        block_slice = compute.slice
        self._await(block_slice)
        slot = self._slots.get(block_slice)
        moving: int | op.OwnRows = self._own_rows(block_slice) if slot is None else slot
        returning: int | op.OwnRows | None = None
        scratch = None
        if self._fields[self._program.moving.returning]:
            if block_slice.block == self._own.block:
                returning = self._own_rows(block_slice)
            elif self._keeps_sums:
                returning = self._sum_slot(block_slice)
            else:
                returning = scratch = self._zeroed_slot(block_slice)
        self._out.append(op.Compute(block_slice.block, moving, returning, compute.chunk, compute.tiles))
        if scratch is not None:
            self._out.append(op.Release(scratch))

    def _own_rows(self, block_slice: BlockSlice) -> op.OwnRows:
        """The rows of this rank's own block, which lie in one chunk."""
        ((chunk, _, rows),) = self._cut(block_slice.rows)
        return op.OwnRows(chunk, None if rows in (None, slice(0, len(self._chunks[chunk]))) else rows)

    def _zeroed_slot(self, block_slice: BlockSlice) -> int:
        slot = self._new_slot(block_slice, self._program.moving.returning)
        self._out.append(op.Clear(slot))
        return slot

    def _sum_slot(self, block_slice: BlockSlice) -> int:
        for t in [t for t in self._returns if t.slice == block_slice]:
            self._accumulate(t)
        if block_slice not in self._sums:
            self._sums[block_slice] = self._zeroed_slot(block_slice)
        return self._sums[block_slice]

    def _accumulate(self, t: Transfer) -> None:
        """Waits for a return and accumulates it, or takes it for the sum where there is none."""
        slot, message = self._returns.pop(t)
        self._out.append(op.Wait(message))
        if t.slice.block == self._own.block:
            self._out.append(op.AccumulateOwn(slot, tuple(self._cut(t.slice.rows))))
            self._out.append(op.Release(slot))
        elif t.slice in self._sums:
            self._out.append(op.Accumulate(slot, self._sums[t.slice]))
            self._out.append(op.Release(slot))
        else:
            self._sums[t.slice] = slot

    def _cut(self, rows: Rows | None) -> Iterable[op.RowCopy]:
        """Cuts rows of the own block at the chunks: (chunk, rows of the slice, rows of the chunk)."""
        start = 0
        for run in (range(sum(map(len, self._chunks))),) if rows is None else rows:
            for number, chunk in enumerate(self._chunks):
                first, last = max(run.start, chunk.start), min(run.stop, chunk.stop)
                if first < last:
                    at = start + first - run.start
                    if len(self._chunks) == 1 and rows is None:
                        yield op.RowCopy(number, None, None)
                    else:
                        here, there = slice(at, at + last - first), slice(first - chunk.start, last - chunk.start)
                        yield op.RowCopy(number, here, there)
            start += len(run)


def consecutive(num_rows: Sequence[int]) -> Rows:
    """Returns the rows of chunks that follow one another."""
    return tuple(range(*ends) for ends in pairwise(accumulate(num_rows, initial=0)))


def _views(fields: Sequence[Field], rows: int) -> tuple[int, tuple[View, ...]]:
    """Returns the bytes of a buffer, and its tensors: wider dtypes first, so that each is aligned."""
    views: dict[int, View] = {}
    offset = 0
    for index in sorted(range(len(fields)), key=lambda i: -fields[i].dtype.itemsize):
        batch, heads, dim, dtype = fields[index]
        width = dim or 1
        strides = (heads * rows * width, width, rows * width, 1)
        if dim is None:
            views[index] = View(dtype, (batch, heads, rows), (heads * rows, rows, 1), offset // dtype.itemsize)
        else:
            views[index] = View(dtype, (batch, rows, heads, dim), strides, offset // dtype.itemsize)
        offset += fields[index].num_bytes(rows)
    return offset, tuple(views[index] for index in range(len(fields)))
