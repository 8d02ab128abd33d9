"""The instructions of a compiled program, and the state of a run that they act on.

Tensors are seen as (batch, rows, heads, dim) by kernels, and lie heads before rows in buffers: a kernel then finds the
rows of a head next to each other, for no more than the copy that a message costs anyway. `Allocate` is the one place
where this memory order is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from ringattn.comm import messages as comm_messages
from ringattn.comm.buffer_pool import BufferPool
from ringattn.comm.messages import PendingMessage
from ringattn.comm.topology import RankMesh
from ringattn.geometry.tiles import Tiles

if TYPE_CHECKING:
    from ringattn.attention.movement import Movement

Tensors = tuple[Tensor, ...]


class View(NamedTuple):
    """A tensor in a buffer; offset in elements."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class RowCopy(NamedTuple):
    """Rows of a slice of the own block, and where they lie in a chunk of it; None, None is all of both."""

    chunk: int
    slice_rows: slice | None
    chunk_rows: slice | None


class OwnRows(NamedTuple):
    """Rows of a chunk of the own block; None is all of them."""

    chunk: int
    rows: slice | None


class Message(NamedTuple):
    """A message: its direction, its number, the slot that it sends or fills, and the rank in the axis' group."""

    is_send: bool
    number: int
    slot: int
    num_bytes: int
    peer: int
    tag: int


class Run:
    """The state of one run of a compiled program.

    Args:
        mesh: the ranks.
        movement: which tensors move, stay and return.
        pool: where buffers come from.
        num_slots, num_messages: as the program has them.
    """

    __slots__ = ("buffers", "device", "mesh", "messages", "movement", "pool", "tensors")

    def __init__(self, mesh: RankMesh, movement: Movement, pool: BufferPool, num_slots: int, num_messages: int) -> None:
        self.mesh, self.movement, self.pool = mesh, movement, pool
        self.device = movement.device
        self.buffers: list[Tensor | None] = [None] * num_slots
        self.tensors: list[Tensors] = [()] * num_slots
        self.messages: list[PendingMessage | None] = [None] * num_messages

    def own(self, chunks: Sequence[Tensors], where: OwnRows) -> Tensors:
        """Returns views of rows of the own block."""
        tensors = chunks[where.chunk]
        return tensors if where.rows is None else tuple([rows_of(x, where.rows) for x in tensors])


class Instruction(Protocol):
    """Something that a run does."""

    def __call__(self, run: Run) -> None: ...


class Allocate(NamedTuple):
    """Takes a buffer for a slot, and makes its tensors."""

    slot: int
    num_bytes: int
    views: tuple[View, ...]
    is_sum: bool

    def __call__(self, run: Run) -> None:
        buffer = run.buffers[self.slot] = run.pool.take(self.num_bytes, run.device)
        tensors = []
        for dtype, size, stride, offset in self.views:
            tensors.append(buffer.view(dtype).as_strided(size, stride, offset))
        run.tensors[self.slot] = tuple(tensors)


class Pack(NamedTuple):
    """Copies rows of the own block into a slot."""

    slot: int
    copies: tuple[RowCopy, ...]

    def __call__(self, run: Run) -> None:
        targets = run.tensors[self.slot]
        for chunk, slice_rows, chunk_rows in self.copies:
            for target, source in zip(targets, run.movement.moving[chunk], strict=True):
                if slice_rows is None or chunk_rows is None:
                    target.copy_(source)
                else:
                    rows_of(target, slice_rows).copy_(rows_of(source, chunk_rows))


class Post(NamedTuple):
    """Posts the messages of a step on one axis, receives first; see `comm.messages.post`."""

    axis: int
    messages: tuple[Message, ...]

    def __call__(self, run: Run) -> None:
        operations, buffers = [], run.buffers
        for is_send, _, slot, num_bytes, peer, tag in self.messages:
            buffer = buffers[slot]
            assert buffer is not None
            message = comm_messages.Message(buffer[:num_bytes], peer, tag)
            operations.append(comm_messages.Operation(is_send, message))
        pending = comm_messages.start(run.mesh.axes[self.axis].group, operations)
        for posted, each in zip(self.messages, pending, strict=True):
            run.messages[posted[1]] = each


class Wait(NamedTuple):
    """Waits for a message."""

    message: int

    def __call__(self, run: Run) -> None:
        pending, run.messages[self.message] = run.messages[self.message], None
        if pending is not None:
            pending.wait()


class Clear(NamedTuple):
    """Sets a sum to nothing accumulated."""

    slot: int

    def __call__(self, run: Run) -> None:
        run.movement.clear(run.tensors[self.slot])


class Accumulate(NamedTuple):
    """Accumulates a slot into another."""

    source: int
    target: int

    def __call__(self, run: Run) -> None:
        run.movement.accumulate(run.tensors[self.target], run.tensors[self.source])


class AccumulateOwn(NamedTuple):
    """Accumulates a slot into this rank's own sums."""

    source: int
    copies: tuple[RowCopy, ...]

    def __call__(self, run: Run) -> None:
        source = run.tensors[self.source]
        for chunk, slice_rows, chunk_rows in self.copies:
            target = run.movement.returned[chunk]
            if slice_rows is None or chunk_rows is None:
                run.movement.accumulate(target, source)
            else:
                run.movement.accumulate(
                    tuple([rows_of(x, chunk_rows) for x in target]), tuple([rows_of(x, slice_rows) for x in source])
                )


class Release(NamedTuple):
    """Gives a slot's buffer back to the pool."""

    slot: int

    def __call__(self, run: Run) -> None:
        buffer, run.buffers[self.slot] = run.buffers[self.slot], None
        run.tensors[self.slot] = ()
        if buffer is not None:
            run.pool.give(buffer)


class Compute(NamedTuple):
    """Computes tiles of a slice with a chunk of the side that stays."""

    block: int
    moving: int | OwnRows
    returning: int | OwnRows | None
    chunk: int
    tiles: Tiles

    def __call__(self, run: Run) -> None:
        movement = run.movement
        moving = run.tensors[self.moving] if isinstance(self.moving, int) else run.own(movement.moving, self.moving)
        returning: Tensors = ()
        if self.returning is not None:
            returning = (
                run.tensors[self.returning]
                if isinstance(self.returning, int)
                else run.own(movement.returned, self.returning)
            )
        if torch._C._autograd._profiler_enabled():
            with record_function(f"ringattn: block {self.block}"):
                movement.compute(self.chunk, moving, returning, self.tiles)
        else:
            movement.compute(self.chunk, moving, returning, self.tiles)


def rows_of(x: Tensor, rows: slice) -> Tensor:
    """Returns rows of a tensor (batch, rows, heads, dim), or (batch, heads, rows)."""
    return x[:, rows] if x.ndim == 4 else x[:, :, rows]
