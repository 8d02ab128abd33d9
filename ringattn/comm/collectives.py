"""One packet from each rank to all others, or one to each, as a single collective, in memory that is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.comm.packet import Field, Packet, size_of, stacked


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
    # gloo's all-gather passes packets on from rank to rank, W - 1 hops in a row. These go straight to every reader, and
    # are copied only where there are several.
    leaving = mine if size <= 2 else torch.empty_like(coming)
    counts = _but(rank, [count] * size)

    def hold() -> None:
        if size > 2:
            leaving.view(-1, count).copy_(mine)
        if size > 1:
            dist.all_to_all_single(coming, leaving, counts, counts, group=group)

    return Meeting(tuple(x[0] for x in parts), parts, rank, hold)


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

    def hold() -> None:
        for place, x in copies:
            place.copy_(x)
        if size > 1:
            dist.all_to_all_single(coming, leaving, coming_counts, leaving_counts, group=group)

    return Meeting(local, stacked(buffer, fields[rank]), rank, hold)


def _but(rank: int, counts: Sequence[int]) -> list[int]:
    """Returns the counts, with none for this rank itself."""
    return [0 if peer == rank else count for peer, count in enumerate(counts)]
