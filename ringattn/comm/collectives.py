"""One packet from each rank to all others, or one to each, as a single collective, in memory that is kept.

On CPUs a collective is one message from each rank to each other, all posted together. That is what gloo's all-to-all
does, too, but in a thread of its own: to hand over to it and back takes longer than the messages. Its all-gather passes
packets on from rank to rank, W - 1 hops in a row.
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

# What tells these messages from those of exchanges, and of the caller.
_TAG = 0x6D656574
# Bytes of the largest packet that ranks of a group have met with. All make the same calls, so all have the same.
_MAX_BYTES: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class PersistentCollective:
    """Tensors that a rank fills in, a collective, and the tensors of all ranks: as often as wanted.

    What came is good until `local` is filled in again.

    Args:
        local: what this rank has for the others.
        parts: what all ranks had for this one, itself included, each (ranks, *shape), in order of rank, save that
            the part which stands first belongs at `first`.
        first: see `parts`.
        hold: sends and receives; all ranks call it together.
    """

    local: tuple[Tensor, ...]
    parts: tuple[Tensor, ...]
    first: int
    hold: Callable[[], None]


def buffer_bytes_for(fields: Sequence[Field], group: dist.ProcessGroup) -> int:
    """Returns how many bytes a message of these fields may have: as many as the largest of the group so far.

    A rank that went another way sends another of the messages that there have been. There is room for all of them, for
    gloo ends the process of a rank that gets more than it has asked for; that it is another one is told by what comes
    first in each.
    """
    room = _MAX_BYTES[group] = max(size_of(fields), _MAX_BYTES.get(group, 0))
    return room


def all_gather(
    fields: Sequence[Field], room: int, group: dist.ProcessGroup, device: torch.device
) -> PersistentCollective:
    """Returns a meeting in which every rank has the same for all others.

    Args:
        fields: of what each rank has.
        room: as `buffer_bytes_for` has it.
        group: of the ranks.
        device: of the tensors.
    Communication: one collective each time, in which each rank sends its packet to each other.
    """
    size, rank, count = group.size(), group.rank(), size_of(fields)
    if device.type != "cpu" and size > 1:
        gathered = torch.empty(size, count, dtype=torch.uint8, device=device)
        parts = stacked_views(gathered, fields)
        gather = partial(dist.all_gather_into_tensor, gathered.view(-1), gathered[rank], group=group)
        return PersistentCollective(tuple(x[rank] for x in parts), parts, 0, gather)
    buffer = _rows(size, room)
    parts = stacked_views(buffer, fields)
    trade = _exchange_messages(buffer, [buffer[0, :count]] * size, group)
    return PersistentCollective(tuple(x[0] for x in parts), parts, rank, trade)


def all_to_all(
    local: tuple[Tensor, ...],
    shares: Sequence[Sequence[Tensor]],
    room: int,
    group: dist.ProcessGroup,
    device: torch.device,
) -> PersistentCollective:
    """Returns a meeting in which every rank has something else for each.

    Args:
        local: what is filled in.
        shares: what goes to each rank: views of `local`; what goes to one rank is alike on all ranks.
        room: as `buffer_bytes_for` has it.
        group: of the ranks.
        device: of the tensors.
    Communication: one all-to-all each time; each rank sends every share but its own.
    """
    size, rank = group.size(), group.rank()
    fields = [[Field(tuple(x.shape), x.dtype) for x in share] for share in shares]
    leaving_counts, count = _without_own(rank, [size_of(each) for each in fields]), size_of(fields[rank])
    on_cpu = device.type == "cpu"
    buffer = _rows(size, room) if on_cpu else torch.empty(size, count, dtype=torch.uint8, device=device)
    leaving = torch.empty(sum(leaving_counts), dtype=torch.uint8, device=device)
    places = list(torch.split(leaving, leaving_counts))
    places[rank] = buffer[0, :count]
    copies = [
        (place, x)
        for flat, each, share in zip(places, fields, shares, strict=True)
        for place, x in zip(Packet(flat, each).tensors, share, strict=True)
        if x.numel()
    ]
    to, given = [place for place, _ in copies], [x for _, x in copies]
    if on_cpu:
        trade = _exchange_messages(buffer, places, group)
    else:
        counts = _without_own(rank, [count] * size)
        trade = partial(dist.all_to_all_single, buffer[1:].view(-1), leaving, counts, leaving_counts, group=group)

    def hold() -> None:
        torch._foreach_copy_(to, given)
        if size > 1:
            trade()

    return PersistentCollective(local, stacked_views(buffer, fields[rank]), rank, hold)


def _rows(size: int, room: int) -> Tensor:
    """Makes a row for the packet of each rank, this one's own first, in which tensors of any dtype are aligned."""
    return torch.empty(size, -(-room // 8) * 8, dtype=torch.uint8)


def _exchange_messages(rows: Tensor, leaving: Sequence[Tensor], group: dist.ProcessGroup) -> Callable[[], None]:
    """Returns an all-to-all of one message from each rank to each other, for CPUs.

    The group is called by itself: what torch.distributed's functions check each time is so from the beginning here.

    Args:
        rows: where messages go, (ranks, bytes), but to the first; they may be shorter than a row.
        leaving: by rank; this rank's own is left alone.
        group: of the ranks.
    """
    others = [peer for peer in range(group.size()) if peer != group.rank()]
    receives = [([row], peer, _TAG) for row, peer in zip(rows[1:], others, strict=True)]
    sends = [([leaving[peer]], peer, _TAG) for peer in others]

    def trade() -> None:
        # Receives first: a peer does not send before it has been told of them.
        works = [group.recv(*each) for each in receives] + [group.send(*each) for each in sends]
        for work in works:
            work.wait()

    return trade


def _without_own(rank: int, counts: Sequence[int]) -> list[int]:
    """Returns the counts, with none for this rank itself."""
    return [0 if peer == rank else count for peer, count in enumerate(counts)]
