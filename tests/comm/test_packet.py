"""Packets: tensors of any dtypes as views of one flat buffer."""

from __future__ import annotations

import pytest
import torch

from ringattn.comm.packet import Field, Packet, size_of

CPU = torch.device("cpu")
MIXED = [
    Field((2, 3), torch.bfloat16),
    Field((3,), torch.float32),
    Field((1,), torch.float16),
    Field((1, 2), torch.float64),
]


def test_tensors_are_views_that_do_not_overlap() -> None:
    packet = Packet.zeros(MIXED, CPU)
    assert packet.flat.numel() == size_of(MIXED) == 12 + 12 + 2 + 16
    assert packet.flat.dtype is torch.uint8
    assert [(tuple(t.shape), t.dtype) for t in packet.tensors] == MIXED
    for number, tensor in enumerate(packet.tensors, start=1):
        tensor.fill_(number)
    assert [set(t.flatten().tolist()) for t in packet.tensors] == [{1.0}, {2.0}, {3.0}, {4.0}]
    assert packet.flat.is_contiguous()
    packet.flat.zero_()
    assert not any(t.any() for t in packet.tensors)


def test_bytes_arrive_as_they_left() -> None:
    sent, received = Packet.empty(MIXED, CPU), Packet.empty(MIXED, CPU)
    for tensor in sent.tensors:
        tensor.copy_(torch.randn(tensor.shape))
    received.flat.copy_(sent.flat)
    for a, b in zip(sent.tensors, received.tensors, strict=True):
        assert torch.equal(a, b)


def test_a_larger_buffer_is_used_from_its_beginning() -> None:
    buffer = torch.full((64,), 7, dtype=torch.uint8)
    packet = Packet(buffer, [Field((2, 2), torch.float32), Field((1,), torch.float32)])
    assert packet.buffer is buffer
    assert packet.flat.numel() == 20
    packet.tensors[1].fill_(0)
    assert buffer.tolist() == [7] * 16 + [0] * 4 + [7] * 44


def test_a_buffer_of_exactly_the_size() -> None:
    assert Packet(torch.zeros(5, dtype=torch.uint8), [Field((5,), torch.uint8)]).flat.numel() == 5


def test_a_buffer_that_is_too_small_is_refused() -> None:
    with pytest.raises(RuntimeError):
        Packet(torch.zeros(4, dtype=torch.uint8), [Field((5,), torch.uint8)])


def test_empty_tensors() -> None:
    packet = Packet.empty([Field((1, 0, 2, 4), torch.float32), Field((1, 0, 2, 3), torch.bfloat16)], CPU)
    assert packet.flat.numel() == 0
    assert [tuple(t.shape) for t in packet.tensors] == [(1, 0, 2, 4), (1, 0, 2, 3)]
    mixed = Packet.zeros([Field((0, 3), torch.float64), Field((2,), torch.float64)], CPU)
    assert [tuple(t.shape) for t in mixed.tensors] == [(0, 3), (2,)]
