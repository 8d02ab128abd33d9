"""All-gather and all-to-all of packets, in buffers that are allocated once and reused by every run.

On CPUs a collective is one message between each pair of ranks, all posted together. Gloo's own all-to-all sends the
same messages, but from a thread of its own, and the hand-over to this thread and back takes longer than the messages.
Gloo's all-gather is a ring: it passes packets on in W - 1 steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.comm.packet import Field, Packet, size_of, stacked_views

# Separates these messages from the messages of attention and of the user.
_TAG = 0x6D656574
# The largest packet so far on each group, in bytes. All ranks make the same calls, so all have the same value.
_MAX_BYTES: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class PersistentCollective:
    """A collective with its buffers: fill `local`, call `run()`, read `received`; any number of times.

    `received` is valid until `local` is filled again: this rank's part of it may be the same memory.

    Args:
        local: this rank's tensors, which `run` sends.
        received: one tensor for each in `local`, (ranks, *shape): the parts from all ranks, this one included. Index 0
            holds the part of `first_rank`; the parts of all other ranks follow in order of rank.
        first_rank: the rank whose part is at index 0 of `received`.
        run: sends and receives; all ranks call it together.
    """

    local: tuple[Tensor, ...]
    received: tuple[Tensor, ...]
    first_rank: int
    run: Callable[[], None]


def capacity_bytes_for(fields: Sequence[Field], group: dist.ProcessGroup) -> int:
    """Returns the bytes to reserve for a packet: the largest packet so far on this group, these fields included.

    A rank that has diverged may send any of the packets seen so far. The buffer fits them all, because gloo aborts a
    process that receives more bytes than it posted. The first bytes of each packet then reveal the divergence.
    """
    capacity_bytes = _MAX_BYTES[group] = max(size_of(fields), _MAX_BYTES.get(group, 0))
    return capacity_bytes


def all_gather(
    fields: Sequence[Field], capacity_bytes: int, group: dist.ProcessGroup, device: torch.device
) -> PersistentCollective:
    """Returns a collective in which each rank sends the same packet to all ranks.

    Args:
        fields: of each rank's packet.
        capacity_bytes: from `capacity_bytes_for`.
        group: the ranks.
        device: of the tensors.
    Communication: in each run, one collective; each rank sends its packet to each other rank.
    """
    size, rank, num_bytes = group.size(), group.rank(), size_of(fields)
    if device.type != "cpu" and size > 1:
        buffer = torch.empty(size, num_bytes, dtype=torch.uint8, device=device)
        received = stacked_views(buffer, fields)
        gather = partial(dist.all_gather_into_tensor, buffer.view(-1), buffer[rank], group=group)
        return PersistentCollective(tuple(x[rank] for x in received), received, 0, gather)
    buffer = _empty_rows(size, capacity_bytes)
    received = stacked_views(buffer, fields)
    exchange = _pairwise_exchange(buffer, [buffer[0, :num_bytes]] * size, group)
    return PersistentCollective(tuple(x[0] for x in received), received, rank, exchange)


def all_to_all(
    local: tuple[Tensor, ...],
    send_views: Sequence[Sequence[Tensor]],
    capacity_bytes: int,
    group: dist.ProcessGroup,
    device: torch.device,
) -> PersistentCollective:
    """Returns a collective in which each rank sends another part of its tensors to each rank.

    Args:
        local: the tensors that the caller fills before each run.
        send_views: for each rank, the views of `local` that are sent to it. The shapes of the views for one receiver
            are the same on all senders.
        capacity_bytes: from `capacity_bytes_for`.
        group: the ranks.
        device: of the tensors.
    Communication: in each run, one all-to-all; each rank sends its views for each other rank.
    """
    size, rank = group.size(), group.rank()
    fields = [[Field(tuple(x.shape), x.dtype) for x in views] for views in send_views]
    send_bytes, recv_bytes = _zero_at(rank, [size_of(each) for each in fields]), size_of(fields[rank])
    on_cpu = device.type == "cpu"
    recv_buffer = (
        _empty_rows(size, capacity_bytes) if on_cpu else torch.empty(size, recv_bytes, dtype=torch.uint8, device=device)
    )
    send_buffer = torch.empty(sum(send_bytes), dtype=torch.uint8, device=device)
    packets = list(torch.split(send_buffer, send_bytes))
    packets[rank] = recv_buffer[0, :recv_bytes]
    copies = [
        (target, x)
        for flat, each, views in zip(packets, fields, send_views, strict=True)
        for target, x in zip(Packet(flat, each).tensors, views, strict=True)
        if x.numel()
    ]
    targets, sources = [target for target, _ in copies], [x for _, x in copies]
    if on_cpu:
        exchange = _pairwise_exchange(recv_buffer, packets, group)
    else:
        split_bytes = _zero_at(rank, [recv_bytes] * size)
        received_flat = recv_buffer[1:].view(-1)
        exchange = partial(dist.all_to_all_single, received_flat, send_buffer, split_bytes, send_bytes, group=group)

    def run() -> None:
        torch._foreach_copy_(targets, sources)
        if size > 1:
            exchange()

    return PersistentCollective(local, stacked_views(recv_buffer, fields[rank]), rank, run)


def _empty_rows(size: int, num_bytes: int) -> Tensor:
    """Returns a buffer with one row per rank, this rank's first; each row is aligned for tensors of any dtype."""
    return torch.empty(size, -(-num_bytes // 8) * 8, dtype=torch.uint8)


def _pairwise_exchange(rows: Tensor, packets: Sequence[Tensor], group: dist.ProcessGroup) -> Callable[[], None]:
    """Returns an all-to-all of one message between each pair of ranks, for CPUs.

    It calls the process group directly, which saves the argument checks of torch.distributed in every run.

    Args:
        rows: the receive buffer, (ranks, bytes); rows 1 and up receive the packets of the other ranks, in order of
            rank. A packet may be shorter than a row.
        packets: the packet for each rank; this rank's own is ignored.
        group: the ranks.
    """
    others = [peer for peer in range(group.size()) if peer != group.rank()]
    receives = [([row], peer, _TAG) for row, peer in zip(rows[1:], others, strict=True)]
    sends = [([packets[peer]], peer, _TAG) for peer in others]

    def exchange() -> None:
        # Receives first: gloo sends only after the peer has announced its receive.
        works = [group.recv(*each) for each in receives] + [group.send(*each) for each in sends]
        for work in works:
            work.wait()

    return exchange


def _zero_at(rank: int, counts: Sequence[int]) -> list[int]:
    """Returns the counts with a zero for one rank."""
    return [0 if peer == rank else count for peer, count in enumerate(counts)]
