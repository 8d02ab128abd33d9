"""Measures the link between neighbours in a group: its latency with small messages, its bandwidth with large ones."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.comm.messages import Message, post

_SMALL_BYTES, _LARGE_BYTES = 16, 1 << 22
_ROUNDS = 5
_TAG = 96


def measure_neighbour_link(group: dist.ProcessGroup, device: torch.device) -> tuple[float, float]:
    """Returns (latency in seconds of a message to a neighbour, bandwidth in bytes per second).

    All ranks send to the next rank and receive from the previous one at the same time, as in a ring. The result is that
    of the slowest rank, and the same on all ranks.

    Args:
        group: two ranks or more; all of them call this together.
        device: of the messages.
    Communication: some messages of 16 bytes and of 4 MiB to a neighbour, fewer large ones on a slow link; a few
        all-gathers of one number.
    """
    small = [torch.zeros(_SMALL_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
    latency_s = _slowest(group, min(_time_shift(group, *small) for _ in range(4 * _ROUNDS)))
    large = [torch.zeros(_LARGE_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
    # A sixteenth of the message predicts how many whole ones fit in half a second; all ranks use the same prediction.
    part = [x[: _LARGE_BYTES // 16] for x in large]
    _time_shift(group, *part)
    predicted_s = 16.0 * _slowest(group, _time_shift(group, *part))
    rounds = min(_ROUNDS, int(0.5 / max(predicted_s, 1e-6)))
    num_bytes = _LARGE_BYTES if rounds else _LARGE_BYTES // 16
    seconds = min(_time_shift(group, *(large if rounds else part)) for _ in range(max(rounds, 1)))
    return latency_s, num_bytes / max(_slowest(group, seconds) - latency_s, 1e-9)


def _time_shift(group: dist.ProcessGroup, send_buffer: Tensor, recv_buffer: Tensor) -> float:
    """Sends to the next rank, receives from the previous one, and returns the seconds until both are complete."""
    rank, size = group.rank(), group.size()
    start = time.perf_counter()
    send = Message(send_buffer, (rank + 1) % size, _TAG)
    receive = Message(recv_buffer, (rank - 1) % size, _TAG)
    sends, receives = post(group, [send], [receive])
    for message in (*receives, *sends):
        message.wait()
    if send_buffer.is_cuda:
        torch.cuda.synchronize(send_buffer.device)
    return time.perf_counter() - start


def _slowest(group: dist.ProcessGroup, seconds: float) -> float:
    """Returns the maximum over all ranks."""
    gathered: list[float | None] = [None] * group.size()
    dist.all_gather_object(gathered, seconds, group=group)
    return max(float(s) for s in gathered if s is not None)
