"""The paged Triton kernel without a GPU: by the suite of all paged kernels, interpreted, and compiled for each GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is made for Linux")

from benchmarks.triton_report import PagedBuild, combined, paged_builds, read_report, report
from ringattn.kernels.contract import ProblemSpec
from ringattn.kernels.paged import PAGED_BACKENDS, select_paged
from ringattn.kernels.triton.configs import TARGETS
from ringattn.score import Score
from tests.kernels.test_paged import DTYPES, SHAPES
from tests.kernels.test_triton import assert_all_ran, interpret
from tests.kernels.test_triton_compile import MATRIX, SHARED_BYTES

SUITE, INTERPRETED = "tests/kernels/test_paged.py", "tests/kernels/interpreted_paged.py"
CALL = ProblemSpec("cuda", torch.bfloat16, 8, 2, 128, 128, False, Score(0.3))

# Each line of the kernels is reached by these: the interpreter is slow.
QUICK = [
    ("one token", "nan", "bfloat16"),
    ("pages of one", "nan", "float16"),
    ("many rows", "live", "bfloat16"),
]
REST = [
    (shape, poison, dtype)
    for shape in SHAPES
    for poison in ("nan", "live")
    for dtype in (str(dtype).removeprefix("torch.") for dtype in DTYPES if dtype != torch.float64)
    if (shape, poison, dtype) not in QUICK
]

QUICK_BUILDS = [PagedBuild("sm_90", "bf16", 128, 128), PagedBuild("gfx942", "bf16", 128, 128, 64)]
OTHER_BUILDS = [build for build in paged_builds(list(TARGETS), ["bf16", "fp16", "fp32"]) if build not in QUICK_BUILDS]
SEVERAL_TOKENS = [PagedBuild(arch, "bf16", 128, 128, 16, 32, 4, capped=True) for arch in TARGETS]


def node(shape: str, poison: str, dtype: str) -> str:
    return f"{SUITE}::test_contract[{shape}-{poison}-torch.{dtype}-triton-cpu]"


def test_quick_cases_and_beyond_the_contract(tmp_path: Path) -> None:
    report = interpret(tmp_path / "report.xml", INTERPRETED, *(node(*case) for case in QUICK))
    assert_all_ran(report, 5 + len(QUICK))


@pytest.mark.long
def test_every_other_case(tmp_path: Path) -> None:
    assert_all_ran(interpret(tmp_path / "report.xml", *(node(*case) for case in REST)), len(REST))


def check(build: PagedBuild) -> None:
    found = report(build)
    # Exact float32 products are no matrix instructions: the assembler gives up a few registers for more programs.
    most = 64 if build.dtype == "fp32" else 0
    assert found.spill_bytes <= most, f"{build} with {build.config} spills {found.spill_bytes} bytes"
    assert found.shared_bytes * build.config.programs <= SHARED_BYTES[build.arch]
    assert found.tensor_columns * build.config.programs <= 512
    if build.dtype != "fp32":
        assert MATRIX[build.arch] in found.matrix or "mma.sync" in found.matrix


@pytest.mark.parametrize("build", QUICK_BUILDS, ids=str)
def test_quick_builds(build: PagedBuild) -> None:
    check(build)


@pytest.mark.long
@pytest.mark.parametrize("build", [*OTHER_BUILDS, *SEVERAL_TOKENS], ids=str)
def test_every_build(build: PagedBuild) -> None:
    check(build)


@pytest.mark.long
@pytest.mark.parametrize("arch", TARGETS)
def test_the_merge_of_parts(arch: str) -> None:
    for v_dim in (20, 64, 128, 256):
        assert read_report(combined(arch, v_dim)).spill_bytes == 0


def test_takes_gpus_alone_and_says_what_it_refuses() -> None:
    kernel = PAGED_BACKENDS["triton"]
    assert not kernel.unsupported(CALL)
    assert kernel.unsupported(replace(CALL, device_type="cpu")) == ["runs on cuda, not on cpu"]
    (reason,) = kernel.unsupported(replace(CALL, head_dim=576))
    assert "up to 256, not 576" in reason
    if torch.cuda.is_available() and not kernel.available():
        assert select_paged(None, CALL) is kernel
