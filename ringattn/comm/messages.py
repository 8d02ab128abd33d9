"""Point-to-point messages: posted together, in progress while the caller computes, waited for one by one.

All messages of a step are posted in one batch, so no order of sends and receives can deadlock. Ranks wait for each
other's messages only: there is no barrier and no device synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor


class Message(NamedTuple):
    """A message to or from another rank.

    Args:
        tensor: the buffer that is sent or received into; contiguous.
        peer: the other rank, numbered in the group.
        tag: separates messages of different kinds between the same two ranks.
    """

    tensor: Tensor
    peer: int
    tag: int


class PendingMessage:
    """A message in progress. Until `wait` returns, the caller must not read a receive buffer or write a send buffer."""

    __slots__ = ("_message", "_work")

    def __init__(self, message: Message, work: dist.Work | None) -> None:
        self._message: Message | None = message  # keeps the buffer alive until the message is complete
        self._work = work

    def wait(self) -> None:
        """Waits until the message is complete; on CUDA the current stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
        self._message = self._work = None


def post(
    group: dist.ProcessGroup, sends: Sequence[Message], receives: Sequence[Message]
) -> tuple[list[PendingMessage], list[PendingMessage]]:
    """Posts all messages of one step and returns at once.

    Each send must match a receive on its peer. Messages of one kind between two ranks must be listed in the same order
    on both, because NCCL matches messages by order alone. Empty messages are not posted.

    Args:
        group: the group that numbers the peers.
        sends: may be empty.
        receives: may be empty.
    Returns:
        The pending sends and the pending receives, in the order of the arguments.
    Communication: each message once, directly between its two ranks.
    """
    # Receives first: gloo announces a receive to the peer on the same stream on which it sends data, after everything
    # posted before, and a peer sends nothing until the announcement arrives. In the other order, two ranks would send
    # to each other in one direction after the other.
    posted = [Operation(False, m) for m in receives if m.tensor.numel()]
    posted += [Operation(True, m) for m in sends if m.tensor.numel()]
    pending = iter(start(group, posted) if posted else [])
    pending_receives, pending_sends = (
        [next(pending) if m.tensor.numel() else PendingMessage(m, None) for m in messages]
        for messages in (receives, sends)
    )
    return pending_sends, pending_receives


class Operation(NamedTuple):
    """A message that this rank sends or receives."""

    is_send: bool
    message: Message


def start(group: dist.ProcessGroup, operations: Sequence[Operation]) -> list[PendingMessage]:
    """Hands operations to the process group, and returns the pending message of each. None of them may be empty.

    On CPUs the group is called directly: torch.distributed checks every argument again, which takes as long as a small
    message. On GPUs operations are one batch, because NCCL must start them together.
    """
    if operations[0].message.tensor.is_cpu:
        pending = []
        for is_send, message in operations:
            tensor, peer, tag = message
            work = group.send([tensor], peer, tag) if is_send else group.recv([tensor], peer, tag)
            pending.append(PendingMessage(message, work))
        return pending
    batch = [
        dist.P2POp(dist.isend if is_send else dist.irecv, m.tensor, group=group, tag=m.tag, group_peer=m.peer)
        for is_send, m in operations
    ]
    works = dist.batch_isend_irecv(batch)
    if len(works) != len(batch):
        # NCCL coalesces a batch into one piece of work: waiting for one message waits for all of them.
        works = works[:1] * len(batch)
    return [PendingMessage(m, work) for (_, m), work in zip(operations, works, strict=True)]
