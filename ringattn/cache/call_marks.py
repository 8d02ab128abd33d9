"""Whether all ranks mean the same, by marks of 8 bytes that travel with what they exchange anyway.

A mark is two numbers: what has been asked of the cache before, and what is asked now.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ringattn.comm.packet import Field
from ringattn.errors import DisagreementError

_NUMBERS = 2  # int32 numbers of a mark


def mark_field(dtype: torch.dtype) -> Field:
    """Returns the 8 bytes of a mark, to be viewed as int32, in the dtype of what they travel with: to be put first.

    There they are found whatever a rank that disagrees has sent, and however much of it.
    """
    return Field((4 * _NUMBERS // dtype.itemsize,), dtype)


class MarkCheck(Protocol):
    """Compares the marks of all ranks. Every rank sees all marks, so that all find the same."""

    def tell(self, mark: Tensor, before: int, now: int) -> None:
        """Writes a mark.

        Args:
            mark: (2,) int32; written.
            before: of what has been asked of the cache so far; 32 bits, signed.
            now: of this call.
        """
        ...

    def compare(self, marks: Tensor) -> None:
        """Takes the marks of all ranks, (ranks, 2) int32; DisagreementError now or later if they differ."""
        ...

    def settle(self) -> None:
        """Raises what is still to be raised."""
        ...


class HostMarkCheck:
    """Raises at once: the host reads every mark. For CPUs."""

    def tell(self, mark: Tensor, before: int, now: int) -> None:
        """See Agreement.tell."""
        mark.numpy()[:] = before, now

    def compare(self, marks: Tensor) -> None:
        """See Agreement.compare."""
        first, *others = marks.tolist()
        if any(other != first for other in others):
            raise _disagreement([len({mark[i] for mark in (first, *others)}) > 1 for i in range(_NUMBERS)])

    def settle(self) -> None:
        """See Agreement.settle: there is nothing."""


class DeviceMarkCheck:
    """Keeps a flag on the device, and raises when it is asked for: no layer waits for the host. For GPUs.

    Args:
        device: of the marks.
    """

    def __init__(self, device: torch.device) -> None:
        self._differ = torch.zeros(_NUMBERS, dtype=torch.int32, device=device)
        self._used = False

    def tell(self, mark: Tensor, before: int, now: int) -> None:
        """See Agreement.tell."""
        for place, told in enumerate((before, now)):
            mark[place].fill_(told)  # an argument of a kernel: nothing is copied from the host

    def compare(self, marks: Tensor) -> None:
        """See Agreement.compare."""
        self._differ |= (marks != marks[:1]).any(dim=0)
        self._used = True

    def settle(self) -> None:
        """See Agreement.settle: waits for the device, if something was compared since."""
        if not self._used:
            return
        # A captured graph compares without this being called, so what was used once may be used again.
        differ = [bool(each) for each in self._differ.tolist()]
        if any(differ):
            self._differ.zero_()
            raise _disagreement(differ)


def mark_check_on(device: torch.device) -> MarkCheck:
    """Returns the way in which marks on a device are compared."""
    return HostMarkCheck() if device.type == "cpu" else DeviceMarkCheck(device)


def _disagreement(differ: list[bool]) -> DisagreementError:
    before, now = differ
    told = [
        *(["what they have asked of the cache so far (new, extend, fork, truncate, evict, free, note)"] * before),
        *(["what they ask now: the operation, layer, sequences, new tokens, heads, mask, scale or softcap"] * now),
    ]
    return DisagreementError(f"the ranks of the group disagree on {', and on '.join(told)}")
