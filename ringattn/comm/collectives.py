"""One packet from each rank to all others, or one to each, as a single collective, in memory that is kept.

On CPUs a collective is one message from each rank to each other, all posted together. That is what gloo's all-to-all
does, too, but in a thread of its own: to hand over to it and back takes longer than the messages. Its all-gather passes
packets on from rank to rank, W - 1 hops in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.comm.packet import Field, Packet, size_of, stacked

# What tells these messages from those of exchanges, and of the caller.
_TAG = 0x6D656574


@dataclass(frozen=True)
class Meeting:
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


def gathering(fields: Sequence[Field], group: dist.ProcessGroup, device: torch.device) -> Meeting:
    """Returns a meeting in which every rank has the same for all others.

    Args:
        fields: of what each rank has.
        group: of the ranks.
        device: of the tensors.
    Communication: one collective each time, in which each rank sends its packet to each other.
    """
    size, rank, count = group.size(), group.rank(), size_of(fields)
    buffer = torch.empty(size * count, dtype=torch.uint8, device=device)
    parts = stacked(buffer, fields)
    if device.type != "cpu" and size > 1:
        mine = buffer[rank * count : (rank + 1) * count]
        local = tuple(x[rank] for x in parts)
        return Meeting(local, parts, 0, lambda: dist.all_gather_into_tensor(buffer, mine, group=group))
    mine, coming = buffer[:count], buffer[count:]
    counts = _but(rank, [count] * size)
    trade = _swapping(torch.split(coming, counts), [mine] * size, group)
    return Meeting(tuple(x[0] for x in parts), parts, rank, trade)


def dealing(
    local: tuple[Tensor, ...], shares: Sequence[Sequence[Tensor]], group: dist.ProcessGroup, device: torch.device
) -> Meeting:
    """Returns a meeting in which every rank has something else for each.

    Args:
        local: what is filled in.
        shares: what goes to each rank: views of `local`; what goes to one rank is alike on all ranks.
        group: of the ranks.
        device: of the tensors.
    Communication: one all-to-all each time; each rank sends every share but its own.
    """
    size, rank = group.size(), group.rank()
    fields = [[Field(tuple(x.shape), x.dtype) for x in share] for share in shares]
    leaving_counts, count = _but(rank, [size_of(each) for each in fields]), size_of(fields[rank])
    buffer = torch.empty(size * count, dtype=torch.uint8, device=device)
    mine, coming = buffer[:count], buffer[count:]
    coming_counts = _but(rank, [count] * size)
    leaving = torch.empty(sum(leaving_counts), dtype=torch.uint8, device=device)
    places = list(torch.split(leaving, leaving_counts))
    places[rank] = mine
    copies = [
        (place, x)
        for flat, each, share in zip(places, fields, shares, strict=True)
        for place, x in zip(Packet(flat, each).tensors, share, strict=True)
        if x.numel()
    ]
    to, given = [place for place, _ in copies], [x for _, x in copies]
    if device.type == "cpu":
        trade = _swapping(torch.split(coming, coming_counts), places, group)
    else:
        trade = partial(dist.all_to_all_single, coming, leaving, coming_counts, leaving_counts, group=group)

    def hold() -> None:
        torch._foreach_copy_(to, given)
        if size > 1:
            trade()

    return Meeting(local, stacked(buffer, fields[rank]), rank, hold)


def _swapping(coming: Sequence[Tensor], leaving: Sequence[Tensor], group: dist.ProcessGroup) -> Callable[[], None]:
    """Returns an all-to-all of one message from each rank to each other, for CPUs.

    The group is called by itself: what torch.distributed's functions check each time is so from the beginning here.

    Args:
        coming, leaving: by rank; this rank's own are left alone.
        group: of the ranks.
    """
    others = [peer for peer in range(group.size()) if peer != group.rank()]
    receives, sends = (
        [([messages[peer]], peer, _TAG) for peer in others if messages[peer].numel()] for messages in (coming, leaving)
    )

    def trade() -> None:
        # Receives first: a peer does not send before it has been told of them.
        works = [group.recv(*each) for each in receives] + [group.send(*each) for each in sends]
        for work in works:
            work.wait()

    return trade


def _but(rank: int, counts: Sequence[int]) -> list[int]:
    """Returns the counts, with none for this rank itself."""
    return [0 if peer == rank else count for peer, count in enumerate(counts)]
