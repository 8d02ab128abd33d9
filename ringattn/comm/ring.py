"""Point-to-point messages of one step: posted together, under way while the caller computes, awaited one by one.

All messages of a step are posted at once, so no order of sends and receives can deadlock, and nothing but the
messages themselves makes ranks wait for each other: no barrier, no device synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor


class Message(NamedTuple):
    """A contiguous tensor on its way to (or from) `peer`, a rank of the group; `tag` tells kinds apart."""

    tensor: Tensor
    peer: int
    tag: int


class Flight:
    """Messages under way. Buffers must not be read (receives) or written (sends) before they are awaited."""

    def __init__(self, works: list[tuple[str, Message, dist.Work]]) -> None:
        self._works = works  # holds the buffers, too, until the messages have landed

    def wait_receive(self, tag: int) -> None:
        """Waits for the messages of this kind to arrive; on CUDA the current stream waits, not the host."""
        for kind, message, work in self._works:
            if kind == "receive" and message.tag == tag:
                work.wait()
        self._works = [entry for entry in self._works if not (entry[0] == "receive" and entry[1].tag == tag)]

    def wait(self) -> None:
        """Waits for all messages that have not been awaited yet."""
        for _, _, work in self._works:
            work.wait()
        self._works = []


def launch(group: dist.ProcessGroup, sends: Sequence[Message], receives: Sequence[Message]) -> Flight:
    """Posts all messages of one step and returns at once.

    The ranks concerned must post matching messages, at most one per kind and direction between two ranks.
    Communication: each message once, between its two ranks.
    """
    kinds = [("send", m) for m in sends if m.tensor.numel()] + [("receive", m) for m in receives if m.tensor.numel()]
    if not kinds:
        return Flight([])
    ops = [
        dist.P2POp(
            dist.isend if kind == "send" else dist.irecv,
            message.tensor,
            group=group,
            tag=message.tag,
            group_peer=message.peer,
        )
        for kind, message in kinds
    ]
    works = dist.batch_isend_irecv(ops)
    if len(works) != len(kinds):
        # NCCL coalesces a batch into one piece of work: awaiting any message awaits them all.
        works = works[:1] * len(kinds)
    return Flight([(kind, message, work) for (kind, message), work in zip(kinds, works, strict=True)])
