"""One packet from each rank to all others, or one to each, as a single collective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.comm.packet import Field, Packet, size_of, stacked


def all_gather_packets(packet: Packet, fields: Sequence[Field], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Returns the tensors of every rank's packet, each (ranks, *shape), in order of rank.

    Args:
        packet: this rank's.
        fields: of the packets of all ranks, which are alike.
        group: all its ranks call this together.
    Communication: one collective, in which each rank sends its packet to each other.
    """
    size = group.size()
    if size == 1:
        return stacked(packet.flat, fields)
    buffer = packet.flat.new_empty(size * packet.flat.numel())
    if packet.flat.is_cpu:
        # gloo's all-gather passes packets on from rank to rank, W - 1 hops in a row. These go straight to every reader.
        dist.all_to_all_single(buffer, packet.flat.repeat(size), group=group)
    else:
        dist.all_gather_into_tensor(buffer, packet.flat, group=group)
    return stacked(buffer, fields)


def all_to_all_packets(
    packets: Sequence[Packet], fields: Sequence[Field], group: dist.ProcessGroup, device: torch.device
) -> tuple[Tensor, ...]:
    """Returns the tensors of what each rank had for this one, each (ranks, *shape), in order of rank.

    Args:
        packets: what goes to each rank, one after the other in one buffer: see `packets_in_a_row`.
        fields: of what comes, which is alike from all ranks.
        group: all its ranks call this together.
        device: of the packets.
    Communication: one all-to-all; each rank sends each packet but its own.
    """
    if group.size() == 1:
        return stacked(packets[0].flat, fields)
    counts = [packet.flat.numel() for packet in packets]
    leaving = packets[0].flat.as_strided((sum(counts),), (1,))
    count = size_of(fields)
    buffer = torch.empty(group.size() * count, dtype=torch.uint8, device=device)
    dist.all_to_all_single(buffer, leaving, [count] * group.size(), counts, group=group)
    return stacked(buffer, fields)


def packets_in_a_row(fields: Sequence[Sequence[Field]], device: torch.device) -> list[Packet]:
    """Returns packets of undefined content, one after the other in one buffer."""
    counts = [size_of(each) for each in fields]
    buffer = torch.empty(sum(counts), dtype=torch.uint8, device=device)
    return [Packet(part, each) for part, each in zip(torch.split(buffer, counts), fields, strict=True)]
