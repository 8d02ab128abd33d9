"""Call marks: 8 bytes in each message of a decoding step that show whether all ranks make the same call.

A mark is two int32 numbers: a digest of the cache's history, and a digest of the present call.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ringattn.comm.packet import Field
from ringattn.errors import DisagreementError

_NUMBERS = 2  # int32 numbers in a mark


def mark_field(dtype: torch.dtype) -> Field:
    """Returns the packet field of a mark: 8 bytes of `dtype`, to be viewed as int32.

    The field has the dtype of the packet's other fields and must be the first. Then the mark of a diverged rank is at
    the beginning of its packet too, whatever the packet holds and however long it is.
    """
    return Field((4 * _NUMBERS // dtype.itemsize,), dtype)


class MarkCheck(Protocol):
    """Compares the marks of all ranks. Every rank sees all marks, so all ranks find the same differences."""

    def write(self, mark: Tensor, history: int, call: int) -> None:
        """Writes a mark.

        Args:
            mark: (2,) int32; overwritten.
            history: digest of all operations on the cache so far; 32 bits, signed.
            call: digest of the present call; 32 bits, signed.
        """
        ...

    def compare(self, marks: Tensor) -> None:
        """Compares the marks of all ranks, (ranks, 2) int32.

        Raises:
            DisagreementError: if the marks differ; a device check raises it in `raise_pending` instead.
        """
        ...

    def raise_pending(self) -> None:
        """Raises the DisagreementError of an earlier `compare` that has not been raised yet, once."""
        ...


class HostMarkCheck:
    """Reads the marks on the host and raises at once. For CPUs."""

    def write(self, mark: Tensor, history: int, call: int) -> None:
        mark.numpy()[:] = history, call

    def compare(self, marks: Tensor) -> None:
        first, *others = marks.tolist()
        if any(other != first for other in others):
            raise _disagreement([len({mark[i] for mark in (first, *others)}) > 1 for i in range(_NUMBERS)])

    def raise_pending(self) -> None:
        pass  # `compare` has raised already


class DeviceMarkCheck:
    """Sets a flag on the device, so that no layer waits for the host; the flag is read in `raise_pending`. For GPUs.

    Args:
        device: of the marks.
    """

    def __init__(self, device: torch.device) -> None:
        self._differ = torch.zeros(_NUMBERS, dtype=torch.int32, device=device)
        self._used = False

    def write(self, mark: Tensor, history: int, call: int) -> None:
        for index, number in enumerate((history, call)):
            mark[index].fill_(number)  # the number is a kernel argument: nothing is copied from the host

    def compare(self, marks: Tensor) -> None:
        self._differ |= (marks != marks[:1]).any(dim=0)
        self._used = True

    def raise_pending(self) -> None:
        if not self._used:
            return
        # `_used` stays set: a captured CUDA graph compares again without calling `compare`.
        differ = [bool(each) for each in self._differ.tolist()]
        if any(differ):
            self._differ.zero_()
            raise _disagreement(differ)


def mark_check_on(device: torch.device) -> MarkCheck:
    """Returns the check for marks on a device."""
    return HostMarkCheck() if device.type == "cpu" else DeviceMarkCheck(device)


def _disagreement(differ: list[bool]) -> DisagreementError:
    history, call = differ
    names = [
        *(["the earlier calls on the cache (new, extend, fork, truncate, evict, free, add_to_history)"] * history),
        *(["this call: the operation, layer, sequences, new tokens, heads, mask, scale or softcap"] * call),
    ]
    return DisagreementError(f"the ranks of the group disagree on {', and on '.join(names)}")
