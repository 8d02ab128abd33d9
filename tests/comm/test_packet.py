"""Packets: tensors as views of one flat buffer."""

from __future__ import annotations

import pytest
import torch

from ringattn.comm.packet import Packet

CPU = torch.device("cpu")


def test_tensors_are_views_one_after_the_other() -> None:
    packet = Packet.zeros([(2, 3), (4,), (1, 2, 1)], torch.float32, CPU)
    for number, tensor in enumerate(packet.tensors, start=1):
        tensor.fill_(number)
    assert packet.flat.tolist() == [1.0] * 6 + [2.0] * 4 + [3.0] * 2
    assert [tuple(t.shape) for t in packet.tensors] == [(2, 3), (4,), (1, 2, 1)]
    packet.flat.zero_()
    assert not any(t.any() for t in packet.tensors)
    assert packet.flat.is_contiguous()


def test_of_copies_tensors_of_any_strides() -> None:
    whole = torch.arange(48.0).reshape(4, 6, 2)
    strided, other = whole.transpose(0, 1)[::2], whole[:, 1:3, :1].expand(4, 2, 3)
    assert not strided.is_contiguous()
    packet = Packet.of([strided, other])
    assert torch.equal(packet.tensors[0], strided)
    assert torch.equal(packet.tensors[1], other)
    assert packet.flat.tolist() == [*strided.flatten().tolist(), *other.flatten().tolist()]
    whole.zero_()
    assert packet.flat.any(), "a copy: what happens to the tensors later does not show"


def test_of_takes_the_first_tensors_dtype_and_device() -> None:
    packet = Packet.of([torch.ones(2, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)])
    assert packet.flat.dtype is torch.bfloat16
    assert packet.flat.numel() == 5


def test_of_holds_no_graph() -> None:
    leaf = torch.ones(3)
    assert not Packet.of([leaf]).flat.requires_grad


def test_a_larger_buffer_is_used_from_its_beginning() -> None:
    buffer = torch.full((10,), 7.0)
    packet = Packet(buffer, [(2, 2), (1,)])
    assert packet.buffer is buffer
    assert packet.flat.numel() == 5
    packet.tensors[1].fill_(1)
    assert buffer.tolist() == [7.0] * 4 + [1.0] + [7.0] * 5


def test_a_buffer_of_exactly_the_size() -> None:
    assert Packet(torch.zeros(5), [(2, 2), (1,)]).flat.numel() == 5


def test_a_buffer_that_is_too_small_is_refused() -> None:
    with pytest.raises(RuntimeError):
        Packet(torch.zeros(4), [(2, 2), (1,)])


def test_empty_tensors() -> None:
    packet = Packet.of([torch.empty(1, 0, 2, 4), torch.empty(1, 0, 2, 3)])
    assert packet.flat.numel() == 0
    assert [tuple(t.shape) for t in packet.tensors] == [(1, 0, 2, 4), (1, 0, 2, 3)]
    mixed = Packet.zeros([(0, 3), (2,)], torch.float64, CPU)
    assert [tuple(t.shape) for t in mixed.tensors] == [(0, 3), (2,)]
    assert Packet.empty([(3, 2)], torch.float16, CPU).flat.numel() == 6
