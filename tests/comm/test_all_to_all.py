"""All-to-all of packets along an axis."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ringattn.comm.all_to_all import AllToAll
from ringattn.comm.packet import Field, Packet
from ringattn.comm.topology import MeshAxis
from tests.harness.ranks import RankPool


def exchange_packets(group: dist.ProcessGroup) -> None:
    """Packets of several sizes, including empty ones, of two dtypes; two exchanges in progress at once."""
    rank, world = group.rank(), group.size()
    axis = MeshAxis(group, tuple(range(world)), rank)

    def fields(sender: int, receiver: int) -> list[Field]:
        return [Field((sender * receiver,), torch.bfloat16), Field((2, receiver), torch.float64)]

    outgoing: list[Packet | None] = []
    for peer in range(world):
        packet = Packet.empty(fields(rank, peer), torch.device("cpu"))
        for tensor in packet.tensors:
            tensor.fill_(10 * rank + peer)
        outgoing.append(None if peer == rank else packet)
    exchanges = [AllToAll(axis, outgoing, [fields(peer, rank) for peer in range(world)]) for _ in range(2)]
    for exchange in exchanges:
        received = exchange.wait()
        assert sorted(received) == [peer for peer in range(world) if peer != rank]
        for peer, packet in received.items():
            assert all((tensor == 10 * peer + rank).all() for tensor in packet.tensors)
            assert [(tuple(t.shape), t.dtype) for t in packet.tensors] == fields(peer, rank)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_packets_of_any_size(pool: RankPool, world: int) -> None:
    pool.run(exchange_packets, world)
