"""Packets: several tensors of any dtypes in one flat buffer, sent as one message."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class Field(NamedTuple):
    """The shape and dtype of one tensor in a packet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """The bytes of the tensor in the buffer."""
        return prod(self.shape) * self.dtype.itemsize


class Packet:
    """A flat buffer of bytes, and tensors that are views of it.

    Tensors of wider dtypes are placed first, so that each tensor is aligned.

    Args:
        buffer: uint8, one-dimensional, at least as long as the fields; the packet starts at its beginning.
        fields: one for each tensor.
    """

    def __init__(self, buffer: Tensor, fields: Sequence[Field]) -> None:
        self.buffer = buffer
        self.flat = buffer[: size_of(fields)]
        self.tensors = _views(self.flat, fields)

    @classmethod
    def empty(cls, fields: Sequence[Field], device: torch.device) -> Packet:
        """Returns a packet with uninitialised tensors."""
        return cls(torch.empty(size_of(fields), dtype=torch.uint8, device=device), fields)

    @classmethod
    def zeros(cls, fields: Sequence[Field], device: torch.device) -> Packet:
        """Returns a packet of zeros."""
        return cls(torch.zeros(size_of(fields), dtype=torch.uint8, device=device), fields)


def stacked_views(buffer: Tensor, fields: Sequence[Field]) -> tuple[Tensor, ...]:
    """Returns one view (packets, *shape) per field, into several packets with the same fields.

    Args:
        buffer: uint8, (packets, bytes). Each row starts with a packet; its length is a multiple of each itemsize.
        fields: of every packet. Fields of equal itemsize keep their order in the buffer, as in a `Packet`.
    """
    return _views(buffer[:, : size_of(fields)], fields)


def size_of(fields: Sequence[Field]) -> int:
    """Returns the bytes of a packet with these fields."""
    return sum(field.num_bytes for field in fields)


def _views(flat: Tensor, fields: Sequence[Field]) -> tuple[Tensor, ...]:
    """Returns the tensors of one packet (bytes,), or of several stacked packets (packets, bytes)."""
    order = sorted(range(len(fields)), key=lambda index: -fields[index].dtype.itemsize)
    parts = torch.split_with_sizes(flat, [fields[index].num_bytes for index in order], dim=-1)
    stack_shape = flat.shape[:-1]
    views = {
        index: part.view(fields[index].dtype).view((*stack_shape, *fields[index].shape))
        for index, part in zip(order, parts, strict=True)
    }
    return tuple(views[index] for index in range(len(fields)))
