"""A pool gives buffers back, and keeps no more than it may."""

from __future__ import annotations

import torch

from ringattn.comm.buffer_pool import BufferPool
from tests.harness.poison import poisoned_empty

CPU = torch.device("cpu")


def test_a_buffer_is_used_again() -> None:
    pool = BufferPool()
    first = pool.take(100, CPU)
    assert first.dtype is torch.uint8
    assert first.numel() >= 100
    place = first.data_ptr()
    pool.give(first)
    assert pool.take(101, CPU).data_ptr() == place
    assert pool.take(101, CPU).data_ptr() != place


def test_what_is_kept_is_bounded() -> None:
    pool = BufferPool(max_bytes=1 << 12)
    buffers = {pool.take(1 << 10, CPU) for _ in range(8)}
    for buffer in buffers:
        pool.give(buffer)
    kept = {pool.take(1 << 10, CPU).data_ptr() for _ in range(4)}
    assert kept <= {buffer.data_ptr() for buffer in buffers}
    pool.give(pool.take(1 << 11, CPU))  # other sizes make room for it, the least recently used first
    pool.give(torch.empty(1 << 24, dtype=torch.uint8))  # too large to be kept
    assert pool._num_bytes <= 1 << 12


def test_poisoned_memory_is_always_fresh() -> None:
    pool = BufferPool()
    pool.give(torch.zeros(16, dtype=torch.uint8))
    with poisoned_empty():
        assert pool.take(16, CPU).view(torch.float32).isnan().all()
