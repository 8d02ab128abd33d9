"""All-to-all of packets of any sizes: each rank of a group sends another packet to each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ringattn.comm.group import MeshAxis
from ringattn.comm.messages import Message, post
from ringattn.comm.packet import Field, Packet

_TAG = 64


class AllToAll:
    """An all-to-all under way."""

    def __init__(self, axis: MeshAxis, parts: Sequence[Packet | None], fields: Sequence[Sequence[Field]]) -> None:
        """Posts it and returns at once.

        Args:
            axis: whose ranks trade.
            parts: what goes to each place; this rank's own is not looked at.
            fields: what comes from each place.
        Communication: each part once.
        """
        device = next((p.flat.device for p in parts if p is not None), torch.device("cpu"))
        others = [place for place in range(len(axis.members)) if place != axis.place]
        self._came = {place: Packet.empty(fields[place], device) for place in others}
        outgoing = [(place, parts[place]) for place in others]
        sends = [Message(part.flat, axis.members[place], _TAG) for place, part in outgoing if part is not None]
        receives = [Message(packet.flat, axis.members[place], _TAG) for place, packet in self._came.items()]
        sending, receiving = post(axis.group, sends, receives)
        self._flights = [*receiving, *sending]

    def wait(self) -> dict[int, Packet]:
        """Returns what came from each other place, once all has come and gone; nothing of it is kept here."""
        for flight in self._flights:
            flight.wait()
        came, self._came, self._flights = self._came, {}, []
        return came
