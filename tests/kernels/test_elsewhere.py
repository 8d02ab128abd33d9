"""The native kernels on Arm, in an emulator of it: the contracts, on a processor whose arithmetic is another one's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ringattn.kernels import BACKENDS
from tests.kernels.contract_suite import CASES, Case, check, tile
from tests.kernels.elsewhere.machine import ARM, Elsewhere, Machine, PagedElsewhere
from tests.kernels.test_native import run
from tests.kernels.test_paged import SHAPES, Problem

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(ARM.missing()), reason=f"there is no {' and no '.join(ARM.missing())}"),
]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """An Arm processor."""
    made = Machine(ARM, tmp_path_factory.mktemp("elsewhere"))
    yield made
    made.close()


@pytest.mark.parametrize("isa", ARM.isas)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_contract(case: Case, isa: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "native", Elsewhere(isa, machine=machine))
    run(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dim", "v_dim"), [(17, 40), (64, 72), (128, 128), (256, 253)])
def test_dims(dim: int, v_dim: int, dtype: torch.dtype, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "native", Elsewhere("portable", machine=machine))
    blocks = ((tile(range(117), range(131), hi=3),), (tile(range(5, 117), range(2, 130), lo=-70, hi=1),))
    check("native", "cpu", Case("dims", blocks, 117, 131, 1, 2, 1, dim, v_dim, dtype, dim**-0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("poison", ["nan", "live"])
@pytest.mark.parametrize("shape", SHAPES)
def test_pages(shape: str, poison: str, dtype: torch.dtype, machine: Machine) -> None:
    problem = Problem(SHAPES[shape], dtype, live=poison == "live")
    problem.check(*problem.attended(PagedElsewhere("portable", machine=machine), "cpu"), "Arm")
