"""Packets: several tensors, of any dtypes, in one flat buffer, so that they travel as one message."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class Field(NamedTuple):
    """The shape and dtype of one tensor of a packet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """How much of the buffer it takes."""
        return prod(self.shape) * self.dtype.itemsize


class Packet:
    """A flat buffer of bytes and the tensors that are views of it.

    Args:
        buffer: uint8, one-dimensional, at least as long as the fields; used from its beginning.
        fields: of the tensors. In the buffer those of wider dtypes come first, so that each is aligned.
    """

    def __init__(self, buffer: Tensor, fields: Sequence[Field]) -> None:
        self.buffer = buffer
        self.flat = buffer[: size_of(fields)]
        self.tensors = _views(self.flat, fields)

    @classmethod
    def empty(cls, fields: Sequence[Field], device: torch.device) -> Packet:
        """Returns a packet of undefined content."""
        return cls(torch.empty(size_of(fields), dtype=torch.uint8, device=device), fields)

    @classmethod
    def zeros(cls, fields: Sequence[Field], device: torch.device) -> Packet:
        """Returns a packet of zeros."""
        return cls(torch.zeros(size_of(fields), dtype=torch.uint8, device=device), fields)


def stacked_views(buffer: Tensor, fields: Sequence[Field]) -> tuple[Tensor, ...]:
    """Returns the tensors of several packets, all with these fields: views (packets, *shape).

    Args:
        buffer: uint8, (packets, bytes): a packet at the beginning of each row, which is as long as a multiple of each
            itemsize.
        fields: of every packet. Of those as wide as each other, the first comes first, as in a `Packet`.
    """
    return _views(buffer[:, : size_of(fields)], fields)


def size_of(fields: Sequence[Field]) -> int:
    """Returns the bytes of a packet with these fields."""
    return sum(field.num_bytes for field in fields)


def _views(flat: Tensor, fields: Sequence[Field]) -> tuple[Tensor, ...]:
    """Returns the tensors of one packet (bytes), or of several (packets, bytes)."""
    order = sorted(range(len(fields)), key=lambda index: -fields[index].dtype.itemsize)
    parts = torch.split_with_sizes(flat, [fields[index].num_bytes for index in order], dim=-1)
    several = flat.shape[:-1]
    views = {i: x.view(fields[i].dtype).view((*several, *fields[i].shape)) for i, x in zip(order, parts, strict=True)}
    return tuple(views[index] for index in range(len(fields)))
