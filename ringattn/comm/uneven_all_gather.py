"""Gathering the rows of every rank, of uneven numbers, on all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.comm.group import RankMesh
from ringattn.comm.messages import Message, post


def all_gather_rows(x: Tensor, num_rows: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Returns every rank's rows, in order of rank.

    Args:
        x: this rank's rows, (num_rows[rank], ...), contiguous.
        num_rows: how many rows each rank has; the other dims are the same on all.
        group: all its ranks call this together.
    Communication: each rank sends its rows to each other rank, once.
    """
    rank = group.rank()
    rows = [x if peer == rank else x.new_empty((count, *x.shape[1:])) for peer, count in enumerate(num_rows)]
    peers = [peer for peer in range(group.size()) if peer != rank]
    with torch.no_grad():
        sends, receives = post(
            group,
            [Message(x, peer, 0) for peer in peers],
            [Message(rows[peer], peer, 0) for peer in peers],
        )
        for flight in (*receives, *sends):
            flight.wait()
    return rows


def all_gather_mesh_rows(x: Tensor, num_rows: Sequence[int], team: RankMesh) -> Tensor:
    """Returns the rows of all ranks of a team, one rank after the other.

    Args:
        x: this rank's rows, (num_rows[rank], ...), contiguous.
        num_rows: how many rows each rank has; the other dims are the same on all.
        team: all its ranks call this together.
    Communication: each rank sends its rows along the last axis, and then those of the whole axis along the one before.
    """
    first, span = team.rank, 1
    for axis in reversed(team.axes):
        first -= axis.place * span
        counts = [0] * len(axis.members)
        for place, member in enumerate(axis.members):
            counts[member] = sum(num_rows[first + place * span : first + (place + 1) * span])
        rows = all_gather_rows(x, counts, axis.group)
        x = torch.cat([rows[member] for member in axis.members])
        span *= len(axis.members)
    return x
