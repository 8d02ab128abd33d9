"""A pool of flat buffers for messages: a small call does not pay for fresh memory.

Each process group has a pool of its own, bounded in bytes: large buffers are freed, as they would add to the peak of
the caller's own tensors. On GPUs torch's allocator is such a pool already, so that nothing is kept here.
"""

from __future__ import annotations

from collections import OrderedDict
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

_MAX_BYTES = 16 << 20
_MAX_BUFFER_BYTES = 2 << 20
_ALIGNMENT = 16  # bytes, so that a buffer can be viewed in any dtype


class BufferPool:
    """Buffers that are not in use.

    Args:
        max_bytes: how much is kept; beyond that the buffers of the size used least recently are freed.
    """

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._free: OrderedDict[int, list[Tensor]] = OrderedDict()  # by size, the last used at the end

    def take(self, num_bytes: int, device: torch.device) -> Tensor:
        """Returns a buffer of undefined content, uint8, of `num_bytes` or a few more.

        In torch's deterministic mode, in which fresh memory is filled, it is always fresh.
        """
        size = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        free = self._free.get(size)
        if free and not torch._C._get_deterministic_algorithms() and device.type == "cpu":
            self._num_bytes -= size
            return free.pop()
        return torch.empty(size, dtype=torch.uint8, device=device)

    def give(self, buffer: Tensor) -> None:
        """Takes a buffer back. No message and no caller may use it any more."""
        size = buffer.shape[0]
        if not buffer.is_cpu or size > _MAX_BUFFER_BYTES:
            return
        self._num_bytes += size
        self._free.setdefault(size, []).append(buffer)
        self._free.move_to_end(size)
        while self._num_bytes > self._max_bytes:
            oldest = next(iter(self._free))
            if self._free[oldest]:
                self._free[oldest].pop()
                self._num_bytes -= oldest
            else:
                del self._free[oldest]


_POOLS: WeakKeyDictionary[dist.ProcessGroup, BufferPool] = WeakKeyDictionary()


def pool_of(group: dist.ProcessGroup) -> BufferPool:
    """Returns the pool of a process group."""
    found = _POOLS.get(group)
    if found is None:
        found = _POOLS[group] = BufferPool()
    return found
