"""Fixtures of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.harness import ranks


@pytest.fixture(scope="session")
def pool() -> Iterator[ranks.RankPool]:
    """Four rank processes that live through the session."""
    yield from ranks.pool(4)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
