"""All-to-all of packets: each rank of a mesh axis sends another packet, of any size, to each other rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ringattn.comm.messages import Message, post
from ringattn.comm.packet import Field, Packet
from ringattn.comm.topology import MeshAxis

_TAG = 64


class AllToAll:
    """An all-to-all in progress."""

    def __init__(
        self,
        axis: MeshAxis,
        outgoing: Sequence[Packet | None],
        incoming_fields: Sequence[Sequence[Field]],
    ) -> None:
        """Posts all messages and returns at once.

        Args:
            axis: the ranks that exchange packets.
            outgoing: the packet for each coordinate of the axis; this rank's own is ignored.
            incoming_fields: the fields of the packet from each coordinate; this rank's own are ignored.
        Communication: each rank sends each packet once, directly to its receiver.
        """
        device = next((p.flat.device for p in outgoing if p is not None), torch.device("cpu"))
        peers = [peer for peer in range(len(axis.ranks)) if peer != axis.coordinate]
        self._received = {peer: Packet.empty(incoming_fields[peer], device) for peer in peers}
        packets = [(peer, outgoing[peer]) for peer in peers]
        sends = [Message(packet.flat, axis.ranks[peer], _TAG) for peer, packet in packets if packet is not None]
        receives = [Message(packet.flat, axis.ranks[peer], _TAG) for peer, packet in self._received.items()]
        pending_sends, pending_receives = post(axis.group, sends, receives)
        self._pending = [*pending_receives, *pending_sends]

    def wait(self) -> dict[int, Packet]:
        """Waits for all messages and returns the received packets by coordinate, without keeping references to them."""
        for message in self._pending:
            message.wait()
        received, self._received, self._pending = self._received, {}, []
        return received
