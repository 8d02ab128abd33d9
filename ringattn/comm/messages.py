"""Point-to-point messages: posted together, under way while the caller computes, awaited one by one.

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


class PendingMessage:
    """A message under way. Its buffer must not be read (a receive) or written (a send) before it is awaited."""

    def __init__(self, message: Message, work: dist.Work | None) -> None:
        self._message: Message | None = message  # holds the buffer until the message has landed
        self._work = work

    def wait(self) -> None:
        """Waits for the message; on CUDA the current stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
        self._message = self._work = None


def post(
    group: dist.ProcessGroup, sends: Sequence[Message], receives: Sequence[Message]
) -> tuple[list[PendingMessage], list[PendingMessage]]:
    """Posts all messages of one step and returns at once: a flight for each send, and for each receive.

    The ranks concerned must post matching messages. Those of one kind between two ranks must stand in the same order
    at both: NCCL knows messages by nothing else. Empty ones are not posted.
    Communication: each message once, between its two ranks.
    """
    # Receives first: gloo tells the peer of them in the stream in which it sends, behind what was posted before; and
    # a peer who has not been told does not send. So two ranks would send to each other one after the other.
    posted = [(False, m) for m in receives if m.tensor.numel()] + [(True, m) for m in sends if m.tensor.numel()]
    ops = [
        dist.P2POp(
            dist.isend if is_send else dist.irecv,
            message.tensor,
            group=group,
            tag=message.tag,
            group_peer=message.peer,
        )
        for is_send, message in posted
    ]
    works: list[dist.Work] = dist.batch_isend_irecv(ops) if ops else []
    if len(works) != len(ops):
        # NCCL coalesces a batch into one piece of work: awaiting any message awaits them all.
        works = works[:1] * len(ops)
    rest = iter(works)
    came, left = (
        [PendingMessage(m, next(rest) if m.tensor.numel() else None) for m in messages]
        for messages in (receives, sends)
    )
    return left, came
