"""What goes over the wire: counted where it is handed to the process group, and where it leaves the machine's devices.

The same place serves to send nothing at all, so that what a call costs without its messages can be measured.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from ringattn.comm import messages


class _Landed:
    """Work that is done."""

    def wait(self) -> None:
        pass


@contextmanager
def watched(silent: Collection[dist.ProcessGroup] = ()) -> Iterator[list[int]]:
    """Within it, every message that this process sends point to point leaves its bytes in the list.

    Args:
        silent: groups whose messages are not sent: all are done at once, and zeros have been received.
    """
    sent: list[int] = []
    original = messages.start

    def posting(group: dist.ProcessGroup, operations: Sequence[messages.Operation]) -> list[messages.PendingMessage]:
        if group in silent:
            for op in operations:
                if not op.is_send:
                    op.message.tensor.zero_()
            return [messages.PendingMessage(op.message, None) for op in operations]
        sent.extend(op.message.tensor.nbytes for op in operations if op.is_send)
        return original(group, operations)

    messages.start = posting
    try:
        yield sent
    finally:
        messages.start = original


def device_bytes() -> tuple[int, int]:
    """Returns which network namespace this process is in, and how many bytes its devices have sent, loopback too.

    Other programs' traffic, acknowledgements and headers are among them.
    """
    files = Path("/sys/class/net").glob("*/statistics/tx_bytes")
    return os.stat("/proc/self/ns/net").st_ino, sum(int(file.read_text()) for file in files)


def over_devices(before: tuple[int, int], after: tuple[int, int]) -> int:
    """Returns the bytes that all ranks' devices sent, given each rank's `device_bytes` before and after.

    Ranks of one namespace see the same counters. All ranks call it together.
    """
    changes = [(before[0], after[1] - before[1])] * dist.get_world_size()
    dist.all_gather_object(changes, changes[0])
    return sum(dict(changes).values())
