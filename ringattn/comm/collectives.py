"""One packet from each rank to all others, or one to each, as a single collective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ringattn.comm.packet import Field, Packet, size_of


def all_gather_packets(packet: Packet, fields: Sequence[Field], group: dist.ProcessGroup) -> list[Packet]:
    """Returns every rank's packet, in order of rank.

    Args:
        packet: this rank's.
        fields: of the packets of all ranks, which are alike.
        group: all its ranks call this together.
    Communication: one all-gather; each rank sends its packet to each other.
    """
    if group.size() == 1:
        return [packet]
    count = packet.flat.numel()
    buffer = packet.flat.new_empty(group.size() * count)
    dist.all_gather_into_tensor(buffer, packet.flat, group=group)
    return [Packet(part, fields) for part in torch.split(buffer, count)]


def all_to_all_packets(
    packets: Sequence[Packet], fields: Sequence[Field], group: dist.ProcessGroup, device: torch.device
) -> list[Packet]:
    """Returns what each rank had for this one, in order of rank.

    Args:
        packets: what goes to each rank, one after the other in one buffer: see `packets_in_a_row`.
        fields: of what comes, which is alike from all ranks.
        group: all its ranks call this together.
        device: of the packets.
    Communication: one all-to-all; each rank sends each packet but its own.
    """
    if group.size() == 1:
        return list(packets)
    counts = [packet.flat.numel() for packet in packets]
    leaving = packets[0].flat.as_strided((sum(counts),), (1,))
    count = size_of(fields)
    buffer = torch.empty(group.size() * count, dtype=torch.uint8, device=device)
    dist.all_to_all_single(buffer, leaving, [count] * group.size(), counts, group=group)
    return [Packet(part, fields) for part in torch.split(buffer, count)]


def packets_in_a_row(fields: Sequence[Sequence[Field]], device: torch.device) -> list[Packet]:
    """Returns packets of undefined content, one after the other in one buffer."""
    counts = [size_of(each) for each in fields]
    buffer = torch.empty(sum(counts), dtype=torch.uint8, device=device)
    return [Packet(part, each) for part, each in zip(torch.split(buffer, counts), fields, strict=True)]
