"""transformers takes long to import: once for all ranks where they are forks, and before a test's time runs."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch.distributed as dist

from tests.harness.ranks import RankPool, import_early

PROGRAMS = ("tests.hf.comparison", "tests.hf.training")
for program in PROGRAMS:
    import_early(program)


def _import(group: dist.ProcessGroup) -> None:
    for program in PROGRAMS:
        import_module(program)


@pytest.fixture(scope="session", autouse=True)
def _imported(pool: RankPool) -> None:
    pool.run(_import, 2, timeout_s=600.0)  # the least time is allowed to tests of two ranks, which raise
