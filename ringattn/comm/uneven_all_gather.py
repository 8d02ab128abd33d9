"""All-gather of rows, of which each rank has another number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.comm.messages import Message, post
from ringattn.comm.topology import RankMesh


def all_gather_rows(x: Tensor, num_rows: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Returns the rows of every rank, in order of rank.

    Args:
        x: this rank's rows, (num_rows[rank], ...), contiguous.
        num_rows: the number of rows of each rank; the other dims are the same on all ranks.
        group: the ranks, which all call this together.
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
        for message in (*receives, *sends):
            message.wait()
    return rows


def all_gather_mesh_rows(x: Tensor, num_rows: Sequence[int], mesh: RankMesh) -> Tensor:
    """Returns the rows of all ranks of a mesh, concatenated in order of rank.

    Args:
        x: this rank's rows, (num_rows[rank], ...), contiguous.
        num_rows: the number of rows of each rank of the mesh; the other dims are the same on all ranks.
        mesh: the ranks, which all call this together.
    Returns:
        (sum(num_rows), ...) in x.dtype.
    Communication: an all-gather along each axis, the last axis first; each sends the rows gathered so far.
    """
    # The rows gathered so far belong to the ranks first_rank .. first_rank + num_ranks - 1.
    first_rank, num_ranks = mesh.rank, 1
    for axis in reversed(mesh.axes):
        first_rank -= axis.coordinate * num_ranks
        counts = [0] * len(axis.ranks)
        for coordinate, rank in enumerate(axis.ranks):
            start = first_rank + coordinate * num_ranks
            counts[rank] = sum(num_rows[start : start + num_ranks])
        rows = all_gather_rows(x, counts, axis.group)
        x = torch.cat([rows[rank] for rank in axis.ranks])
        num_ranks *= len(axis.ranks)
    return x
