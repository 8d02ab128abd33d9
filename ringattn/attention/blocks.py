"""What a rank holds while it runs a program: pieces, sums of gradients, and the messages that carry them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.profiler import record_function

from ringattn.comm.group import Team
from ringattn.comm.messages import Flight, Message, launch
from ringattn.comm.packet import Field, Packet, size_of
from ringattn.geometry.plan import Payload, Piece, Program, Step, Transfer

_TAGS = {payload: tag for tag, payload in enumerate(Payload)}
_ROWS = 2  # the dim of rows in a packet


class Blocks:
    """The pieces that a rank holds, their gradients' sums, and the transfers of both.

    In packets heads come before rows, (B, H, rows, D): a kernel then finds a head's rows next to each other, for no
    more than the copy that a message costs anyway. A piece of this rank's own block is copied into a packet once,
    however many ranks it goes to.

    Args:
        program: whose steps are run.
        team: the ranks that the program numbers.
        rank: this one's number.
        own: this rank's block, tensors (B, H, rows, ...).
        sums: shapes and dtype of the gradients' sums of a block, (B, H, rows, ...); none are kept if there are none.
    """

    def __init__(
        self, program: Program, team: Team, rank: int, own: Sequence[Tensor], sums: Sequence[Field] = ()
    ) -> None:
        self._program, self._team = program, team
        self._home = Piece(rank)
        self._own, self._sum_fields = tuple(own), tuple(sums)
        self._device = own[0].device
        self._packets: dict[Piece, Packet] = {}
        self._sums: dict[Piece, Packet] = {}
        self._coming: dict[Transfer, tuple[Packet, Flight]] = {}
        self._leaving: dict[Transfer, Flight] = {}
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

    def carried(self, piece: Piece) -> tuple[Tensor, ...]:
        """Returns the tensors of a piece, (B, H, rows, ...), once it is here."""
        self._await(piece)
        if piece == self._home and piece not in self._packets:
            return self._own
        return self._packets[piece].tensors

    def sums(self, piece: Piece) -> tuple[Tensor, ...]:
        """Returns the sums so far of a piece's gradients, (B, H, rows, ...), once they are here; or zeros.

        What others send home of this rank's own block is added apart, when the program says so.
        """
        return self._sum_of(piece).tensors

    def forget_sums(self) -> None:
        """Lets go of all sums: nobody wants them."""
        self._sums.clear()

    def home_sums(self) -> tuple[Tensor, ...]:
        """Returns the sums of this rank's own block."""
        return self.sums(self._home)

    def _post(
        self, axis: int, outgoing: list[tuple[Transfer, Packet]], incoming: list[tuple[Transfer, Packet]]
    ) -> None:
        def on_axis(pairs: list[tuple[Transfer, Packet]]) -> list[tuple[Transfer, Packet, Message]]:
            routed = [(t, packet, self._team.route(t.peer)) for t, packet in pairs]
            return [(t, p, Message(p.flat, peer, _TAGS[t.payload])) for t, p, (on, peer) in routed if on == axis]

        sends, receives = on_axis(outgoing), on_axis(incoming)
        left, came = launch(self._team.axes[axis].group, [m for *_, m in sends], [m for *_, m in receives])
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
            for place, x in zip(packet.tensors, self._own, strict=True):
                for rows, held in _places(t.piece, x.shape[_ROWS]):
                    place[:, :, rows].copy_(x[:, :, held])
        return self._packets[t.piece]

    def _to_receive(self, t: Transfer) -> Packet:
        if t.payload is not self._program.carried:
            return Packet.empty(self._sized(self._sum_fields, t.piece), self._device)
        return self._new(self._fields(t.piece))

    def _await(self, piece: Piece) -> None:
        """A piece that is on its way is here afterwards."""
        for t in [t for t in self._coming if t.piece == piece and t.payload is self._program.carried]:
            self._packets[piece], flight = self._coming.pop(t)
            with record_function("ringattn: wait"):
                flight.wait()

    def _sum_of(self, piece: Piece) -> Packet:
        for t in [t for t in self._coming if t.piece == piece and t.payload is not self._program.carried]:
            self._add(t)
        if piece not in self._sums:
            self._sums[piece] = Packet.zeros(self._sized(self._sum_fields, piece), self._device)
        return self._sums[piece]

    def _add(self, t: Transfer) -> None:
        """Waits for a gradient and adds it to the sum of its rows, or lets it be the sum if there is none."""
        packet, flight = self._coming.pop(t)
        with record_function("ringattn: wait"):
            flight.wait()
        target = self._target(t)
        if target not in self._sums and target == t.piece:
            self._sums[target] = packet
            return
        if target not in self._sums:
            self._sums[target] = Packet.zeros(self._sized(self._sum_fields, target), self._device)
        for total, part in zip(self._sums[target].tensors, packet.tensors, strict=True):
            places = [(slice(None), slice(None))] if target == t.piece else _places(t.piece, total.shape[_ROWS])
            for rows, held in places:
                total[:, :, held] += part[:, :, rows]

    def _target(self, t: Transfer) -> Piece:
        """The piece whose sum a gradient belongs to: at home, that of the whole block."""
        return self._home if t.piece.block == self._home.block else t.piece

    def _new(self, fields: Sequence[Field]) -> Packet:
        """A packet for a piece, in a buffer that is done with if one is large enough."""
        needed = size_of(fields)
        spare = next((i for i, buffer in enumerate(self._spare) if buffer.numel() >= needed), None)
        return Packet.empty(fields, self._device) if spare is None else Packet(self._spare.pop(spare), fields)

    def _fields(self, piece: Piece) -> list[Field]:
        return self._sized([Field(tuple(x.shape), x.dtype) for x in self._own], piece)

    def _sized(self, fields: Sequence[Field], piece: Piece) -> list[Field]:
        rows = piece.num_rows(self._program.block_rows[piece.block])
        return [Field((*f.shape[:_ROWS], rows, *f.shape[_ROWS + 1 :]), f.dtype) for f in fields]


def _places(piece: Piece, block_rows: int) -> list[tuple[slice, slice]]:
    """For each run of a piece: its rows in the piece's packet, and in the block."""
    runs = (range(block_rows),) if piece.rows is None else piece.rows
    found, start = [], 0
    for run in runs:
        found.append((slice(start, start + len(run)), slice(run.start, run.stop)))
        start += len(run)
    return found
