"""Packets: several tensors in one flat buffer, so that they travel as one message."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


class Packet:
    """A flat, contiguous buffer and the tensors that are views of it, one after the other.

    Args:
        buffer: one-dimensional, at least as long as the tensors; used from its beginning.
        shapes: of the tensors.
    """

    def __init__(self, buffer: Tensor, shapes: Sequence[Sequence[int]]) -> None:
        sizes = [prod(shape) for shape in shapes]
        self.buffer = buffer
        self.flat = buffer[: sum(sizes)]
        self.tensors = [part.view(*shape) for part, shape in zip(torch.split(self.flat, sizes), shapes, strict=True)]

    @classmethod
    def empty(cls, shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> Packet:
        """Returns a packet of undefined content."""
        return cls(torch.empty(sum(map(prod, shapes)), dtype=dtype, device=device), shapes)

    @classmethod
    def zeros(cls, shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> Packet:
        """Returns a packet of zeros."""
        return cls(torch.zeros(sum(map(prod, shapes)), dtype=dtype, device=device), shapes)

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Packet:
        """Returns a packet that holds copies of the tensors, which may have any strides."""
        packet = cls.empty([t.shape for t in tensors], tensors[0].dtype, tensors[0].device)
        for place, tensor in zip(packet.tensors, tensors, strict=True):
            place.copy_(tensor)
        return packet
