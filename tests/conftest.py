"""Fixtures of the whole suite, and its markers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.harness import ranks

# The part of the suite that `make quick` runs: what breaks first, in under a minute.
QUICK = (
    "tests/geometry/",
    "tests/plan/",
    "tests/comm/test_packet.py",
    "tests/comm/test_messages.py",
    "tests/comm/test_agreement.py",
    "tests/comm/test_topology.py",
    "tests/kernels/test_softmax.py",
    "tests/kernels/test_select_kernel.py",
    "tests/attention/test_exact.py",
)


@pytest.fixture(scope="session")
def pool() -> Iterator[ranks.RankPool]:
    """Four rank processes that live through the session."""
    yield from ranks.pool(4)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests by what they need, as far as their place and their names tell it."""
    for item in items:
        path = item.nodeid.partition("::")[0]
        names = {
            "ranks": "pool" in getattr(item, "fixturenames", ()),
            "hf": path.startswith("tests/hf/"),
            "compile": path.endswith("test_compile.py"),
            "native": "native" in item.nodeid,
            "quick": path.startswith(QUICK) or ("test_contract.py" in path and "reference" in item.name),
        }
        for name, applies in names.items():
            if applies:
                item.add_marker(name)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
