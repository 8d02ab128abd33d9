"""Lower bounds: the least time that one direction of an exchange takes, from sums over ranks.

A rank's time is at least its compute plus its copies, its send time, and the longest path that one of its blocks
travels. The greatest of these never exceeds what a simulation of the programs finds, and it takes well under a second
for thousands of ranks. Bytes, messages and buffers are approximate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ringattn.cost.cost_model import Link
from ringattn.types import Floats, Ints


@dataclass(frozen=True, eq=False)
class LowerBound:
    """What one direction takes.

    Args:
        seconds: until all ranks have finished, at least.
        flops: of each rank, (world,).
        busy_s: seconds that each rank computes and copies, at least, (world,).
        link_s: seconds that the busiest rank's link is in use, at least.
        path_s: seconds until the block that travels furthest has arrived, at least.
        num_bytes, num_messages: sent by each rank, approximately, (world,).
        buffer_bytes: held by the fullest rank, approximately.
    """

    seconds: float
    flops: Floats
    busy_s: Floats
    link_s: float
    path_s: float
    num_bytes: Floats
    num_messages: Floats
    buffer_bytes: float


def nothing(world_size: int) -> LowerBound:
    """Returns the bound of ranks that do nothing."""
    zeros = np.zeros(world_size)
    return LowerBound(0.0, zeros, zeros, 0.0, 0.0, zeros, zeros, 0.0)


def transfer_s(num_bytes: Floats | Ints, link: Link) -> Floats:
    """Returns the seconds that messages of so many bytes take; a message without bytes is not sent."""
    found: Floats = num_bytes / link.bytes_per_s + (num_bytes > 0) * link.latency_s
    return found
