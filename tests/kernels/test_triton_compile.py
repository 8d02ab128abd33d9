"""What is shipped compiles for each GPU, spills nothing, and uses its matrix units. No GPU is needed."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="triton is made for Linux")

from benchmarks.triton_report import DIMS, Build, builds, compiled, report
from ringattn.kernels.triton.configs import PASSES, TARGETS, Pass

# Per block, in bytes: what is left to a kernel by CUDA's and ROCm's own tables of compute capabilities.
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}

QUICK = [Build(which, arch, "bf16", 128, 128) for arch in ("sm_90", "gfx942") for which in PASSES]
REST = [build for build in builds(list(TARGETS), ["bf16", "fp16", "fp32"], DIMS) if build not in QUICK]
CAPPED = [replace(build, capped=True) for build in builds(list(TARGETS), ["bf16", "fp32"], DIMS)]


def matrix_of(build: Build) -> str:
    """The matrix instruction that a build in 16 bits is to use."""
    if (build.arch, build.which) == ("sm_100", "dkdv") and max(build.dim, build.v_dim) > 128:
        return "mma.sync"  # two gradients of 64 keys, the least that tensor memory takes, would spill
    return MATRIX[build.arch]


def check(build: Build) -> None:
    found = report(build)
    assert found.spill_bytes == 0, f"{build} with {build.config} spills {found.spill_bytes} bytes"
    assert found.shared_bytes <= SHARED_BYTES[build.arch]
    assert found.tensor_columns <= 512
    if build.dtype != "fp32":
        assert matrix_of(build) in found.matrix


@pytest.mark.parametrize("build", QUICK, ids=str)
def test_quick_builds(build: Build) -> None:
    check(build)


@pytest.mark.long
@pytest.mark.parametrize("build", REST, ids=str)
def test_every_build(build: Build) -> None:
    check(build)


@pytest.mark.long
@pytest.mark.parametrize("build", CAPPED, ids=str)
def test_softcaps(build: Build) -> None:
    check(build)


@pytest.mark.parametrize("which", PASSES)
def test_arguments_of_1_are_constants(which: Pass) -> None:
    """One head, one row, heads without groups: triton compiles these anew, with numbers in the place of arguments."""
    build = Build(which, "sm_80", "fp32", 16, 16)
    assert compiled(build, size=1, stride=1).asm["cubin"]


def test_spills_are_seen() -> None:
    """The check itself can fail: a configuration that asks for too much of each thread."""
    build = Build("dkdv", "sm_90", "bf16", 128, 128)
    assert report(build, build.config._replace(block_m=64, block_n=128, num_warps=4)).spill_bytes > 0
