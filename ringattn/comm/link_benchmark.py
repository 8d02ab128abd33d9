"""Measuring the links of a group: a few small messages to a neighbour and back, and a few large ones."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.comm.messages import Message, post

_SMALL, _LARGE = 16, 1 << 22
_ROUNDS = 5
_TAG = 96


def measure_neighbour_link(group: dist.ProcessGroup, device: torch.device) -> tuple[float, float]:
    """Returns the seconds that a message of no size takes to a neighbour, and the bytes per second of a large one.

    Every rank sends to the next one and receives from the one before at once, as in a ring. The slowest rank's figures
    are returned, the same on all ranks.

    Args:
        group: two ranks or more; all of them call this together.
        device: where the messages are.
    Communication: some messages of 16 bytes and of 4 MiB to a neighbour, fewer large ones if they are slow; two
        all-gathers of a number.
    """
    small = [torch.zeros(_SMALL, dtype=torch.uint8, device=device) for _ in range(2)]
    latency_s = _slowest(group, min(_shift_once(group, *small) for _ in range(4 * _ROUNDS)))
    large = [torch.zeros(_LARGE, dtype=torch.uint8, device=device) for _ in range(2)]
    # A part of it tells how many of the whole may be had in half a second; all ranks hear the same number.
    part = [x[: _LARGE // 16] for x in large]
    _shift_once(group, *part)
    expected_s = 16.0 * _slowest(group, _shift_once(group, *part))
    rounds = min(_ROUNDS, int(0.5 / max(expected_s, 1e-6)))
    num_bytes = _LARGE if rounds else _LARGE // 16
    seconds = min(_shift_once(group, *(large if rounds else part)) for _ in range(max(rounds, 1)))
    return latency_s, num_bytes / max(_slowest(group, seconds) - latency_s, 1e-9)


def _shift_once(group: dist.ProcessGroup, out: Tensor, into: Tensor) -> float:
    """Returns the seconds until a message to the next rank, and one from the rank before, have gone through."""
    rank, size = group.rank(), group.size()
    start = time.perf_counter()
    sends, receives = post(group, [Message(out, (rank + 1) % size, _TAG)], [Message(into, (rank - 1) % size, _TAG)])
    for flight in (*receives, *sends):
        flight.wait()
    if out.is_cuda:
        torch.cuda.synchronize(out.device)
    return time.perf_counter() - start


def _slowest(group: dist.ProcessGroup, seconds: float) -> float:
    heard: list[float | None] = [None] * group.size()
    dist.all_gather_object(heard, seconds, group=group)
    return max(float(s) for s in heard if s is not None)
