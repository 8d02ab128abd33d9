"""What a rank holds while it runs a program: pieces, sums of gradients, and the messages that carry them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.profiler import record_function

from ringattn.attention.chunked_rows import ROW_DIM, ChunkedRows
from ringattn.comm.messages import Message, PendingMessage, post
from ringattn.comm.packet import Field, Packet, size_of
from ringattn.comm.topology import RankMesh
from ringattn.plan.plan import BlockSlice, Payload, Program, Step, Transfer

_TAGS = {payload: tag for tag, payload in enumerate(Payload)}


class BlockBuffers:
    """The pieces that a rank holds, their gradients' sums, and the transfers of both.

    In packets heads come before rows, (B, H, rows, D): a kernel then finds a head's rows next to each other, for no
    more than the copy that a message costs anyway. A piece of this rank's own block is copied into a packet once,
    however many ranks it goes to.

    Args:
        program: whose steps are run.
        team: the ranks that the program numbers.
        rank: this one's number.
        own: this rank's block, (B, H, rows, ...), in the parts that the program visits.
        sums: shapes and dtype of the gradients' sums of a block, (B, H, rows, ...); none are kept if there are none.
        places: where the sums of each part of the own block are to be; None is memory of their own.
    """

    def __init__(
        self,
        program: Program,
        team: RankMesh,
        rank: int,
        own: ChunkedRows,
        sums: Sequence[Field] = (),
        places: Sequence[tuple[Tensor, ...] | None] = (),
    ) -> None:
        self._program, self._team = program, team
        self._home = BlockSlice(rank)
        self._own, self._sum_fields, self._places = own, tuple(sums), places
        self._device = own.parts[0][0].device
        self._own_sums: ChunkedRows | None = None
        self._packets: dict[BlockSlice, Packet] = {}
        self._sums: dict[BlockSlice, Packet] = {}
        self._coming: dict[Transfer, tuple[Packet, PendingMessage]] = {}
        self._leaving: dict[Transfer, PendingMessage] = {}
        self._spare: list[Tensor] = []

    def begin(self, step: Step) -> None:
        """Posts the step's messages, waiting for what they need."""
        outgoing = [(t, self._to_send(t)) for t in step.sends]
        incoming = [(t, self._to_receive(t)) for t in step.receives]
        with record_function("ringattn: post"):
            for axis in range(len(self._team.axes)):
                self._post(axis, outgoing, incoming)

    def end(self, step: Step) -> None:
        """Waits for what the step says, and lets go of what is done with."""
        for t in step.added:
            if t in self._coming:
                self._add(t)
        with record_function("ringattn: wait"):
            for t in step.sent:
                self._leaving.pop(t).wait()
        for piece in step.frees:
            if piece in self._packets:
                self._spare.append(self._packets.pop(piece).buffer)

    def finish(self) -> None:
        """Waits for what came and nobody needed: half a block goes as far as the other half must.

        A message cannot be forgotten: gloo would hang over one whose buffer is gone.
        """
        while self._coming:
            _, (_, flight) = self._coming.popitem()
            flight.wait()

    def carried(self, piece: BlockSlice) -> tuple[Tensor, ...]:
        """Returns the tensors of a piece, (B, H, rows, ...), once it is here."""
        self._await(piece)
        if piece in self._packets:
            return self._packets[piece].tensors
        assert piece.block == self._home.block, "a piece that never came"
        return self._own.only(piece.rows)

    def sums(self, piece: BlockSlice) -> tuple[Tensor, ...]:
        """Returns the sums so far of a piece's gradients, (B, H, rows, ...), once they are here; or zeros.

        What others send home of this rank's own block is added apart, when the program says so.
        """
        if piece.block == self._home.block:
            return self._home_sums().only(piece.rows)
        return self._sum_of(piece).tensors

    def forget_sums(self) -> None:
        """Lets go of all sums: nobody wants them."""
        self._sums.clear()
        self._own_sums = None

    def home_sums(self) -> tuple[tuple[Tensor, ...], ...]:
        """Returns the sums of each part of this rank's own block."""
        return self._home_sums().parts

    def _post(
        self, axis: int, outgoing: list[tuple[Transfer, Packet]], incoming: list[tuple[Transfer, Packet]]
    ) -> None:
        def on_axis(pairs: list[tuple[Transfer, Packet]]) -> list[tuple[Transfer, Packet, Message]]:
            routed = [(t, packet, self._team.route(t.peer)) for t, packet in pairs]
            return [(t, p, Message(p.flat, peer, _TAGS[t.payload])) for t, p, (on, peer) in routed if on == axis]

        sends, receives = on_axis(outgoing), on_axis(incoming)
        left, came = post(self._team.axes[axis].group, [m for *_, m in sends], [m for *_, m in receives])
        self._leaving.update((t, flight) for (t, *_), flight in zip(sends, left, strict=True))
        self._coming.update((t, (packet, flight)) for (t, packet, _), flight in zip(receives, came, strict=True))

    def _to_send(self, t: Transfer) -> Packet:
        if t.payload is not self._program.carried:
            packet = self._sum_of(t.piece)
            del self._sums[t.piece]  # its flight holds it
            return packet
        self._await(t.piece)
        if t.piece not in self._packets:
            packet = self._packets[t.piece] = self._new(self._fields(t.piece))
            for rows, held in self._own.cut(t.piece.rows):
                for place, x in zip(packet.tensors, held, strict=True):
                    place[:, :, rows].copy_(x)
        return self._packets[t.piece]

    def _to_receive(self, t: Transfer) -> Packet:
        if t.payload is not self._program.carried:
            return Packet.empty(self._sized(self._sum_fields, t.piece), self._device)
        return self._new(self._fields(t.piece))

    def _await(self, piece: BlockSlice) -> None:
        """A piece that is on its way is here afterwards."""
        for t in [t for t in self._coming if t.piece == piece and t.payload is self._program.carried]:
            self._packets[piece], flight = self._coming.pop(t)
            with record_function("ringattn: wait"):
                flight.wait()

    def _sum_of(self, piece: BlockSlice) -> Packet:
        for t in [t for t in self._coming if t.piece == piece and t.payload is not self._program.carried]:
            self._add(t)
        if piece not in self._sums:
            self._sums[piece] = Packet.zeros(self._sized(self._sum_fields, piece), self._device)
        return self._sums[piece]

    def _home_sums(self) -> ChunkedRows:
        if self._own_sums is None:
            self._own_sums = ChunkedRows([*map(self._zeros_for, self._own.parts, self._places)])
        return self._own_sums

    def _zeros_for(self, part: tuple[Tensor, ...], place: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        if place is not None:
            return tuple(x.zero_() for x in place)
        fields = [_with_rows(field, part[0].shape[ROW_DIM]) for field in self._sum_fields]
        return Packet.zeros(fields, self._device).tensors

    def _add(self, t: Transfer) -> None:
        """Waits for a gradient and adds it to the sum of its rows, or lets it be the sum if there is none."""
        packet, flight = self._coming.pop(t)
        with record_function("ringattn: wait"):
            flight.wait()
        if t.piece.block == self._home.block:
            self._add_at_home(t.piece, packet)
        elif t.piece in self._sums:
            for total, x in zip(self._sums[t.piece].tensors, packet.tensors, strict=True):
                total += x
        else:
            self._sums[t.piece] = packet

    def _add_at_home(self, piece: BlockSlice, packet: Packet) -> None:
        if piece == self._home and self._own_sums is None and list(self._places) == [None]:
            self._own_sums = ChunkedRows([packet.tensors])
            return
        for rows, held in self._home_sums().cut(piece.rows):
            for total, x in zip(held, packet.tensors, strict=True):
                total += x[:, :, rows]

    def _new(self, fields: Sequence[Field]) -> Packet:
        """A packet for a piece, in a buffer that is done with if one is large enough."""
        needed = size_of(fields)
        spare = next((i for i, buffer in enumerate(self._spare) if buffer.numel() >= needed), None)
        return Packet.empty(fields, self._device) if spare is None else Packet(self._spare.pop(spare), fields)

    def _fields(self, piece: BlockSlice) -> list[Field]:
        return self._sized([Field(tuple(x.shape), x.dtype) for x in self._own.parts[0]], piece)

    def _sized(self, fields: Sequence[Field], piece: BlockSlice) -> list[Field]:
        rows = piece.num_rows(self._program.block_rows[piece.block])
        return [_with_rows(field, rows) for field in fields]


def _with_rows(field: Field, rows: int) -> Field:
    return Field((*field.shape[:ROW_DIM], rows, *field.shape[ROW_DIM + 1 :]), field.dtype)
