"""Compiles the Triton kernels for each GPU, without one: registers, spills, shared memory, matrix instructions.

Every shipped configuration is compiled with triton's own assemblers.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Annotated, Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.registry import benchmark
from benchmarks.runner import Session
from ringattn.kernels.paged import PageTables, VisibleKeys
from ringattn.kernels.triton.args import PageArgs, PagedSizes, PartialArgs, QueryArgs, ScoreArgs, StridedRows, WorkArgs
from ringattn.kernels.triton.backward_kernels import dkdv_kernel, dq_kernel
from ringattn.kernels.triton.configs import (
    PASSES,
    TARGETS,
    Config,
    PagedConfig,
    Pass,
    config,
    padded_dim,
    paged_config,
    uses_descriptors,
)
from ringattn.kernels.triton.forward_kernel import forward_kernel
from ringattn.kernels.triton.paged_kernels import combine_kernel, paged_kernel
from ringattn.kernels.triton.paged_launch import COMBINE_WARPS, COMBINED

KERNELS = {"forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel}
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}  # triton's names, and bytes per element
# Head dims of queries and keys, and of values.
DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
PAGED_DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
PAGE_SIZES, PAGED_ROWS = (1, 24, 64, 256), (16, 32, 64)  # beside pages of 16


@dataclass(frozen=True)
class Build:
    """One kernel of attention over tiles for one target."""

    which: Pass
    arch: str
    dtype: str
    dim: int
    v_dim: int
    capped: bool = False

    @property
    def config(self) -> Config:
        """The shipped configuration."""
        widths = padded_dim(self.dim), padded_dim(self.v_dim)
        return config(self.arch, DTYPES[self.dtype], *widths, self.which, capped=self.capped)


@dataclass(frozen=True)
class PagedBuild:
    """The paged kernel for one target; `rows` counts the query rows of a program."""

    arch: str
    dtype: str
    dim: int
    v_dim: int
    page_size: int = 16
    rows: int = 16
    tokens: int = 1
    capped: bool = False

    @property
    def config(self) -> PagedConfig:
        """The shipped configuration."""
        return paged_config(self.arch, DTYPES[self.dtype], padded_dim(self.dim), padded_dim(self.v_dim))


@dataclass(frozen=True)
class Report:
    """The properties of a compiled kernel.

    Args:
        registers: per thread.
        spill_bytes: per thread.
        shared_bytes: per block.
        tensor_columns: of Blackwell's tensor memory, which has 512.
        matrix: the matrix instructions found.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_columns: int
    matrix: list[str]


def builds(archs: Sequence[str], dtypes: Sequence[str], dims: Sequence[tuple[int, int]] = DIMS) -> list[Build]:
    """Returns every combination."""
    return [Build(which, arch, dtype, *dim) for arch, dtype, dim, which in product(archs, dtypes, dims, PASSES)]


def paged_builds(archs: Sequence[str], dtypes: Sequence[str]) -> list[PagedBuild]:
    """Returns all head dims and rows with one page size, and the other page sizes with one of these."""
    every = [PagedBuild(a, t, *dim, 16, rows) for a, t, dim, rows in product(archs, dtypes, PAGED_DIMS, PAGED_ROWS)]
    others = [PagedBuild(a, t, 128, 128, size) for a, t, size in product(archs, dtypes, PAGE_SIZES)]
    return [build for build in every if build.rows <= build.config.max_rows] + others


def compiled(build: Build, chosen: Config | None = None, size: str | int = "i32", stride: str | int = "i32:16") -> Any:
    """Returns triton's result for a build, for aligned tensors.

    Args:
        build: the kernel and its target.
        chosen: a configuration; None is the shipped one.
        size: the type of the sizes that a launch passes; see `source`.
        stride: the type of the strides.
    """
    kernel, chosen = KERNELS[build.which], chosen or build.config
    q, k, v, dout, gradient = (
        StridedRows(f"*{dtype}:16", stride, stride, stride) for dtype in (*[build.dtype] * 4, "fp32")
    )
    # Rows of lse and delta are contiguous, which triton makes a constant.
    entries = StridedRows("*fp32:16", stride, 1, stride)
    work = WorkArgs("*i32:16", "*i32:16", size, size, size, size)
    scores = ScoreArgs("fp32" if build.capped else None, "fp32", "fp32")
    constants = (build.dim, build.v_dim, chosen.block_m, chosen.block_n, chosen.edge_step)
    steps = chosen.block_m if build.which == "dkdv" else chosen.block_n
    by_dim, by_v_dim = (
        f"tensordesc<{build.dtype}[1, {steps}, 1, {padded_dim(dim)}]>"
        if uses_descriptors(build.arch, DTYPES[build.dtype])
        else None
        for dim in (build.dim, build.v_dim)
    )
    queries = QueryArgs(q, dout, entries, entries)
    arguments: dict[Pass, tuple[Any, ...]] = {
        "forward": (q, k, v, by_dim, by_v_dim, gradient, entries, work, scores),
        "dq": (queries, k, v, by_dim, by_v_dim, gradient, work, scores),
        "dkdv": (queries, k, v, by_dim, by_v_dim, gradient, gradient, work, scores),
    }
    made = source(kernel, *arguments[build.which], *constants)
    return assembled(made, build.arch, chosen.num_warps, chosen.num_stages)


_PARTS, _COUNTS = PartialArgs("*fp32:16", "*fp32:16"), PagedSizes(*["i32"] * 5)


def compiled_paged(build: PagedBuild) -> Any:
    """Returns triton's result for a paged build, for aligned tensors."""
    chosen, tensor = build.config, (f"*{build.dtype}:16", "i32:16", "i32:16", "i32:16")
    tables, visible = PageTables._make(["*i32:16"] * 3), VisibleKeys._make(["*i32:16"] * 2)
    scores = ScoreArgs("fp32" if build.capped else None, "fp32", "fp32")
    made = source(
        paged_kernel, StridedRows(*tensor), PageArgs(*tensor), PageArgs(*tensor), tables, visible, _PARTS, _COUNTS,
        scores, build.dim, build.v_dim, build.page_size, build.tokens, build.rows, chosen.block_n,
    )  # fmt: skip
    return assembled(made, build.arch, chosen.num_warps, chosen.num_stages)


def combined(arch: str, v_dim: int) -> Any:
    """Returns triton's result for the kernel that merges the parts of the paged kernel."""
    out, lse = StridedRows("*fp32:16", *["i32:16"] * 3), StridedRows("*fp32:16", "i32:16", 1, "i32:16")
    made = source(combine_kernel, _PARTS, "*i32:16", out, lse, _COUNTS, v_dim, COMBINED // padded_dim(v_dim))
    return assembled(made, arch, COMBINE_WARPS, 1)


def source(kernel: Any, *arguments: Any) -> ASTSource:
    """Returns the source that triton compiles for arguments of these types.

    A string is triton's name of the type of a number or pointer, with ":16" behind it where 16 divides the value;
    anything else is a constant. Arguments may be nested in tuples.
    """
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def type_of(argument: Any, *path: int) -> Any:
        if isinstance(argument, tuple):
            return type(argument)(*[type_of(x, *path, i) for i, x in enumerate(argument)])
        if not isinstance(argument, str):
            constants[path] = argument
            return "constexpr"
        name, aligned, _ = argument.partition(":16")
        if aligned:
            attributes[path] = [["tt.divisibility", 16]]
        return name

    signature = {name: type_of(x, i) for i, (name, x) in enumerate(zip(kernel.arg_names, arguments, strict=True))}
    return ASTSource(kernel, signature, constants, attributes)


def assembled(made: ASTSource, arch: str, num_warps: int, num_stages: int) -> Any:
    """Returns triton's result for one architecture."""
    target = TARGETS[arch]
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(made, target=GPUTarget(target.backend, target.arch, target.warp_size), options=options)


def report(build: Build | PagedBuild, chosen: Config | None = None) -> Report:
    """Returns the properties of a build, without running it."""
    return read_report(compiled_paged(build) if isinstance(build, PagedBuild) else compiled(build, chosen))


def read_report(result: Any) -> Report:
    """Returns the properties of triton's result."""
    text = result.asm["ptx"] if "ptx" in result.asm else result.asm["amdgcn"]
    found = re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma)", text)
    registers, spilled = _nvidia(result) if "cubin" in result.asm else _amd(text)
    columns = int(getattr(result.metadata, "tmem_size", None) or 0)
    return Report(registers, spilled, int(result.metadata.shared), columns, sorted(set(found)))


def _nvidia(result: Any) -> tuple[int, int]:
    """Registers per thread, and bytes of spills, from the cubin."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{tool} reports no registers: {usage}")
    return int(found[1]), int(found[2]) + int(found[3])


def _amd(text: str) -> tuple[int, int]:
    """Vector registers per thread, and bytes of scratch memory, from the metadata of the code object."""
    registers, scratch = (
        re.search(rf"\.{name}:\s+(\d+)", text) for name in ("vgpr_count", "private_segment_fixed_size")
    )
    if registers is None or scratch is None:
        raise RuntimeError("the metadata of the code object have no registers")
    return int(registers[1]), int(scratch[1])


@benchmark("triton-report", help="registers, spills and matrix instructions of the Triton kernels; needs no GPU")
def triton_report(
    here: Session,
    arch: Annotated[Sequence[str], TARGETS] = tuple(TARGETS),
    dtype: Annotated[Sequence[str], DTYPES] = ("bf16", "fp32"),
    kernels: Annotated[Sequence[str], ("tiles", "paged")] = ("tiles", "paged"),
) -> None:
    """Compiles every configuration of the kernels over tiles, and of the paged kernel."""
    columns = {
        "tiles": "which arch dtype dim v_dim block_m block_n edge_step",
        "paged": "arch dtype dim v_dim page_size rows block_n programs",
    }
    for name in kernels:
        todo: Sequence[Build | PagedBuild] = builds(arch, dtype) if name == "tiles" else paged_builds(arch, dtype)
        records = here.records(name)
        with here.progress(name, len(todo)) as tick:
            for build in todo:
                records.add(asdict(build), build.config._asdict(), asdict(report(build)))
                tick()
        records.show(name, f"{columns[name]} num_warps num_stages registers spill_bytes shared_bytes matrix")
