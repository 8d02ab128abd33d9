"""Uninitialised memory that shows: NaN, which spreads, or an integer that no index can be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within it, whatever PyTorch calls empty holds NaN, or the largest integer of its dtype.

    This is PyTorch's own switch, so it reaches `torch.empty`, `empty_like`, `new_empty`, `empty_strided`, and
    what C++ code makes with `at::empty`, on every thread.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # Filling is part of PyTorch's deterministic mode. Warnings suffice: determinism is not the aim here.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
