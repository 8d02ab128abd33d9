"""The passes around foreign kernels, which merge their results and hand delta over.

They exist as tensor operations, and as Triton kernels: interpreted here, and compiled for GPUs that need not be here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ringattn.kernels.merge import merge_part_
from ringattn.kernels.out_from_delta import out_for_delta
from tests.harness.compare import assert_close

Merge = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], None]
NOTHING = {"minus infinity": -torch.inf, "plus infinity": torch.inf}
BATCH, ROWS, HEADS = 2, 37, 3


def problem(
    dim: int, dtype: torch.dtype, part_dtype: torch.dtype, empty: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A state and a part, with rows where one side, the other, both, or no side is empty; very unequal ones, too."""
    generator = torch.Generator().manual_seed(dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    out, part = normal(BATCH, ROWS, HEADS, dim).to(dtype), normal(BATCH, ROWS, HEADS, dim).to(part_dtype)
    lse, part_lse = (20 * normal(BATCH, HEADS, ROWS).to(dtype) for _ in range(2))
    lse[:, :, 1:4], out[:, 1:4] = -torch.inf, 0
    part_lse[:, :, 3:6], part[:, 3:6] = empty, 0
    part_lse[0, 1, 9], part[0, 9, 1] = empty, 0
    part_lse[:, :, 11], part_lse[:, :, 12] = 300, -300
    return out, lse, part, part_lse


def by_definition(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """In float64, from weights alone."""
    nothing = part_lse.isinf()
    merged = torch.ones(BATCH * ROWS, dtype=torch.bool) if rows is None else torch.zeros(BATCH * ROWS, dtype=torch.bool)
    if rows is not None:
        merged[rows.long()] = True
    some = merged.view(BATCH, 1, ROWS) & ~nothing
    both = torch.stack([lse.double(), part_lse.double().masked_fill(~some, -torch.inf)])
    weights = both.softmax(0).nan_to_num(nan=0.0).transpose(2, 3)[..., None]
    found = weights[0] * out.double() + weights[1] * part.double()
    return torch.where(some.transpose(1, 2)[..., None], found, out.double()), both.logsumexp(0)


def check(merge: Merge, dim: int, dtype: torch.dtype, part_dtype: torch.dtype, empty: float, indexed: bool) -> None:
    out, lse, part, part_lse = problem(dim, dtype, part_dtype, empty)
    rows = torch.randperm(BATCH * ROWS, generator=torch.Generator().manual_seed(1))[:50].int() if indexed else None
    expected = by_definition(out, lse, part, part_lse, rows)
    if rows is not None:
        # What is not asked for must not be read: it may never have been written.
        unasked = torch.ones(BATCH * ROWS, dtype=torch.bool)
        unasked[rows.long()] = False
        part.view(-1, HEADS, dim)[unasked] = torch.nan
        part_lse.transpose(1, 2)[unasked.view(BATCH, ROWS)] = torch.nan
    # The state lies in the midst of more, heads before rows; the part as a packed call leaves it.
    wide = torch.full((BATCH, HEADS + 1, ROWS, dim + 8), 7.0, dtype=dtype)
    state, state_lse = wide.transpose(1, 2)[:, :, 1:, :dim], torch.full((BATCH, HEADS, 2 * ROWS), 7.0, dtype=dtype)
    state.copy_(out)
    state_lse[..., ::2] = lse
    packed_lse = part_lse.transpose(0, 1).contiguous().transpose(0, 1)
    merge(state, state_lse[..., ::2], part, packed_lse, rows)
    # fp32: a few roundings of numbers up to 4, and one of lse, up to 300.
    atol, lse_atol = (1e-12, 1e-12) if dtype is torch.float64 else (2e-6, 3e-5)
    assert_close(state.double(), expected[0], atol=atol, name="out")
    assert_close(state_lse[..., ::2].double(), expected[1], atol=lse_atol, name="lse")
    assert (wide[:, 0] == 7).all()
    assert (wide[..., dim:] == 7).all()
    assert (state_lse[..., 1::2] == 7).all()


@pytest.mark.parametrize("indexed", [False, True], ids=["all rows", "some rows"])
@pytest.mark.parametrize("empty", NOTHING)
@pytest.mark.parametrize(
    ("dtype", "part_dtype"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_tensor_operations(dtype: torch.dtype, part_dtype: torch.dtype, empty: str, indexed: bool) -> None:
    check(merge_part_, 20, dtype, part_dtype, NOTHING[empty], indexed)


def test_a_part_that_is_nan_shows() -> None:
    out, lse, part, part_lse = problem(8, torch.float64, torch.float64, -torch.inf)
    part_lse[0, 0, 7] = torch.nan
    merge_part_(out, lse, part, part_lse)
    assert lse[0, 0, 7].isnan()
    assert int(lse.isnan().sum()) == 1


def check_delta(dim: int, dtype: torch.dtype) -> None:
    """The Triton kernel against the definition, and against tensor operations."""
    from ringattn.kernels.triton.out_from_delta_kernel import out_for_rows

    generator = torch.Generator().manual_seed(dim)
    dout = torch.randn(BATCH, HEADS, ROWS, dim + 8, generator=generator).to(dtype).transpose(1, 2)[..., :dim]
    delta = torch.randn(BATCH, HEADS, ROWS, generator=generator).transpose(1, 2)
    dout[:, 3] = 0
    dout[:, 4] *= 2.0**-14
    delta[:, 4] *= 2.0**-14
    found, eager = out_for_rows(dout, delta), out_for_delta(dout, delta)
    assert found.dtype is dtype
    assert_close(found.float(), eager.float(), atol=2 * torch.finfo(dtype).eps * float(eager.abs().max()), name="out")
    assert (found[:, 3] == 0).all()
    some = torch.arange(ROWS) != 3
    products = (dout.double() * found.double())[:, some]
    # A rounding of each number of `out`, and those of its factor, in fp32.
    eps = torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps
    assert ((products.sum(-1) - delta[:, some]).abs() <= eps * products.abs().sum(-1)).all()


def interpreted() -> None:
    """The Triton kernels, in a process where Triton interprets."""
    for dim, dtype in ((64, torch.bfloat16), (80, torch.float16), (7, torch.float32)):
        check_delta(dim, dtype)
    check_merge()


def check_merge() -> None:
    from ringattn.kernels.triton.merge_kernel import merge_rows_

    cases = ((128, torch.bfloat16), (64, torch.float16), (80, torch.float32), (1, torch.float32))
    for indexed in (False, True):
        for empty in NOTHING.values():
            for dim, part_dtype in cases:
                check(merge_rows_, dim, torch.float32, part_dtype, empty, indexed)
    for nothing in (torch.inf, -torch.inf):
        out, lse, part, part_lse = problem(16, torch.float32, torch.float32, nothing)
        before = out.clone(), lse.clone()
        merge_rows_(out, lse, part * torch.nan, torch.full_like(part_lse, nothing))
        assert torch.equal(out, before[0])
        assert torch.equal(lse, before[1])
        merge_rows_(out, lse, part, part_lse)
        for row in (1, 2):
            # Merged into nothing, a part stays what it is, bit for bit.
            assert torch.equal(out[:, row], part[:, row])
            assert torch.equal(lse[:, :, row], part_lse[:, :, row])
    part_lse[0, 0, 7] = torch.nan
    merge_rows_(out, lse, part, part_lse)
    assert lse[0, 0, 7].isnan()
    assert out[0, 7, 0].isnan().all()
    assert int(lse.isnan().sum()) == 1
    merge_rows_(out[:, :0], lse[:, :, :0], part[:, :0], part_lse[:, :, :0])


def test_triton_kernels_interpreted() -> None:
    pytest.importorskip("triton")
    program = "import torch; torch.set_num_threads(1); from tests.kernels.test_merge import interpreted; interpreted()"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def source_of(name: str, part: str, dim: int, indexed: bool) -> Any:
    """What triton compiles, as if 16 divided every number: of usual head dims it divides every stride."""
    import triton

    from benchmarks.triton_report import source
    from ringattn.kernels.triton import merge_kernel as merge
    from ringattn.kernels.triton import out_from_delta_kernel as delta
    from ringattn.kernels.triton.args import StridedRows

    def rows(dtype: str, stride: str | int = "i32:16") -> StridedRows:
        return StridedRows(f"*{dtype}:16", "i32:16", stride, "i32:16")

    sizes, constants = ["i32:16"] * 3, (dim, merge.BLOCK_SIZE // triton.next_power_of_2(dim))
    if name == "delta":
        return source(delta.out_from_delta_kernel, rows(part), rows("fp32"), rows(part), *sizes, *constants)
    # Rows of an lse lie next to one another.
    states = rows("fp32"), rows("fp32", 1), rows(part), rows("fp32", 1)
    return source(merge.merge_kernel, *states, "*i32:16" if indexed else None, *sizes, *constants)


def compiled(name: str, backend: str, arch: int | str, warp: int, dim: int, indexed: bool = False) -> dict[str, Any]:
    """A kernel's code for a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget

    from ringattn.kernels.triton.merge_kernel import NUM_WARPS

    target = GPUTarget(backend, arch, warp)
    return dict(
        triton.compile(source_of(name, "bf16", dim, indexed), target=target, options={"num_warps": NUM_WARPS}).asm
    )


KERNELS = (("merge", False), ("merge", True), ("delta", False))


@pytest.mark.parametrize(("name", "indexed"), KERNELS)
@pytest.mark.parametrize(("arch", "dim"), [(80, 128), (90, 64), (90, 128), (90, 256), (100, 128)])
def test_compiles_for_nvidia(name: str, indexed: bool, arch: int, dim: int, tmp_path: Path) -> None:
    """Whole vectors of 16 bytes, and nothing spilled."""
    pytest.importorskip("triton")
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = str(compiled(name, "cuda", arch, 32, dim, indexed)["ptx"])
    assert "ld.global.v4" in ptx
    assert "st.global.v4" in ptx
    assert not re.search(r"(ld|st)\.global\.b16", ptx), "rows are read number by number"
    (tmp_path / "kernel.ptx").write_text(ptx)
    gpu = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    command = [get_ptxas(arch).path, "-v", f"--gpu-name={gpu}", str(tmp_path / "kernel.ptx"), "-o", str(tmp_path / "x")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert re.findall(r"(\d+) bytes spill", told) == ["0", "0"], told
    assert int(re.findall(r"Used (\d+) registers", told)[0]) <= 128, "fewer than four blocks of a multiprocessor"


@pytest.mark.parametrize(("name", "indexed"), KERNELS)
def test_compiles_for_amd(name: str, indexed: bool) -> None:
    pytest.importorskip("triton")
    code = str(compiled(name, "hip", "gfx942", 64, 128, indexed)["amdgcn"])
    assert "global_load_dwordx4" in code
    assert set(re.findall(r"(?:s|v)gpr_spill_count:\s*(\d+)", code)) == {"0"}
