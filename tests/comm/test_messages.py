"""Messages of one step: uneven, empty, several at once, between ranks of any group; and all-gather of rows."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist

from ringattn.comm import messages
from ringattn.comm.messages import Message, post
from ringattn.comm.uneven_all_gather import all_gather_rows
from tests.harness.ranks import RankPool

WORLDS = (1, 2, 3, 4)


def content(rank: int, length: int) -> torch.Tensor:
    return torch.arange(length, dtype=torch.float32) + 100.0 * rank


def exchange(group: dist.ProcessGroup, sends: list[Message], receives: list[Message]) -> None:
    for pending in post(group, sends, receives):
        for message in pending:
            message.wait()


def pass_on(group: dist.ProcessGroup, lengths: list[int]) -> list[float]:
    """Each rank sends a message of its own length to the next one; returns the message received."""
    rank, world = group.rank(), group.size()
    after, before = (rank + 1) % world, (rank - 1) % world
    received = torch.full((lengths[before],), torch.nan)
    sends, receives = post(group, [Message(content(rank, lengths[rank]), after, 0)], [Message(received, before, 0)])
    for message in (*receives, *sends):
        message.wait()
        message.wait()  # again: nothing more to wait for
    found: list[float] = received.tolist()
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(
    "lengths", [[5, 5, 5, 5], [1, 7, 0, 3], [0, 0, 0, 0], [0, 4, 0, 0], [50_000, 1, 2, 3]], ids=str
)
def test_uneven_and_empty_messages(pool: RankPool, world: int, lengths: list[int]) -> None:
    found = pool.run(pass_on, world, lengths[:world])
    for rank, received in enumerate(found):
        before = (rank - 1) % world
        assert received == content(before, lengths[before]).tolist()


def exchange_two_kinds(group: dist.ProcessGroup) -> list[list[float]]:
    """Every rank to every other, two kinds at once, the second of another dtype and length."""
    rank, world = group.rank(), group.size()
    peers = [peer for peer in range(world) if peer != rank]
    small = {peer: torch.full((2,), torch.nan) for peer in peers}
    large = {peer: torch.full((9,), torch.nan, dtype=torch.float64) for peer in peers}
    sends = [Message(content(rank, 2) + peer, peer, 0) for peer in peers]
    sends += [Message(content(rank, 9).double() - peer, peer, 1) for peer in peers]
    receives = [Message(large[peer], peer, 1) for peer in peers]  # in another order than the sends
    receives += [Message(small[peer], peer, 0) for peer in reversed(peers)]
    pending_sends, pending_receives = post(group, sends, receives)
    for message in pending_receives[: len(peers)]:
        message.wait()
    for peer in peers:
        assert torch.equal(large[peer], content(peer, 9).double() - rank)
    for message in pending_receives[len(peers) :]:
        message.wait()
    for peer in peers:
        assert torch.equal(small[peer], content(peer, 2) + rank)
    for message in pending_sends:
        message.wait()
    return [small[peer].tolist() for peer in peers]


@pytest.mark.parametrize("world", WORLDS)
def test_kinds_do_not_mix(pool: RankPool, world: int) -> None:
    found = pool.run(exchange_two_kinds, world)
    assert [len(each) for each in found] == [world - 1] * world


def many_steps(group: dist.ProcessGroup) -> float:
    """Steps without barriers: ranks may run ahead, and messages still arrive in order."""
    rank, world = group.rank(), group.size()
    value = torch.full((3,), float(rank))
    for _ in range(5 * world):
        received = torch.full((3,), torch.nan)
        exchange(group, [Message(value, (rank + 1) % world, 0)], [Message(received, (rank - 1) % world, 0)])
        value = received + 1
    return float(value[0])


def test_many_steps(pool: RankPool) -> None:
    assert pool.run(many_steps, 4) == [20.0 + rank for rank in range(4)]


def only_some_ranks(group: dist.ProcessGroup) -> float:
    """Rank 0 to rank 2; the others have nothing to do and return at once."""
    received = torch.full((1,), torch.nan)
    sends = [Message(torch.ones(1), 2, 0)] if group.rank() == 0 else []
    exchange(group, sends, [Message(received, 0, 0)] if group.rank() == 2 else [])
    return float(received[0])


def test_ranks_without_messages(pool: RankPool) -> None:
    assert pool.run(only_some_ranks, 3)[2] == 1.0


def on_the_last_ranks(_: dist.ProcessGroup) -> list[float] | None:
    """Peers are ranks of the group, not of the world."""
    group = dist.new_group([2, 3])
    return pass_on(group, [2, 5]) if dist.get_rank() >= 2 else None


def test_peers_are_ranks_of_the_group(pool: RankPool) -> None:
    found = pool.run(on_the_last_ranks, 4)
    assert found == [None, None, content(1, 5).tolist(), content(0, 2).tolist()]


def gather(group: dist.ProcessGroup, num_rows: list[int]) -> list[list[list[float]]]:
    rank = group.rank()
    own = content(rank, 2 * num_rows[rank]).reshape(-1, 2).requires_grad_()
    return [rows.tolist() for rows in all_gather_rows(own, num_rows, group)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("num_rows", [[3, 3, 3, 3], [1, 4, 0, 2], [0, 0, 0, 0]], ids=str)
def test_gather_rows(pool: RankPool, world: int, num_rows: list[int]) -> None:
    expected = [content(rank, 2 * num_rows[rank]).reshape(-1, 2).tolist() for rank in range(world)]
    assert pool.run(gather, world, num_rows[:world]) == [expected] * world


def order_posted(group: dist.ProcessGroup) -> list[bool]:
    """Whether each operation handed to the process group sends."""
    peer = 1 - group.rank()
    seen: list[bool] = []
    original = messages.start

    def watching(group: dist.ProcessGroup, operations: Sequence[messages.Operation]) -> list[messages.PendingMessage]:
        seen.extend(op.is_send for op in operations)
        return original(group, operations)

    messages.start = watching
    try:
        exchange(group, [Message(content(0, 3), peer, 0)], [Message(torch.empty(3), peer, 0)])
    finally:
        messages.start = original
    return seen


def test_receives_are_posted_first(pool: RankPool) -> None:
    """Otherwise gloo sends between two ranks in one direction after the other."""
    assert pool.run(order_posted, 2) == [[False, True]] * 2
