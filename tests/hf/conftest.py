"""transformers takes long to import: the ranks do so before a test's time runs."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from tests.harness.ranks import RankPool


def _import(group: dist.ProcessGroup) -> None:
    pass


@pytest.fixture(scope="session", autouse=True)
def _imported(pool: RankPool) -> None:
    pool.run(_import, 4, timeout_s=600.0)
