"""What triton makes of our kernels for each GPU, without one: registers, spills, shared memory, matrix instructions.

    python -m benchmarks.triton_report --out results/triton

Compiles every configuration that is shipped, with triton's own assemblers, prints a table and writes JSON lines.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.measure import Lines
from ringattn.kernels.triton.args import QueryArgs, ScoreArgs, StridedRows, WorkArgs
from ringattn.kernels.triton.backward_kernels import dkdv_kernel, dq_kernel
from ringattn.kernels.triton.configs import PASSES, TARGETS, Config, Pass, config, padded_dim, uses_descriptors
from ringattn.kernels.triton.forward_kernel import forward_kernel

KERNELS = {"forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel}
# How triton names the dtypes of inputs, and bytes per element.
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Head dims of queries and keys, and of values.
DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))


@dataclass(frozen=True)
class Build:
    """One kernel for one target."""

    which: Pass
    arch: str
    dtype: str
    dim: int
    v_dim: int
    capped: bool = False

    @property
    def config(self) -> Config:
        """The configuration that is shipped."""
        widths = padded_dim(self.dim), padded_dim(self.v_dim)
        return config(self.arch, DTYPES[self.dtype], *widths, self.which, capped=self.capped)


@dataclass(frozen=True)
class Report:
    """What came of it.

    matrix: the matrix instructions found.
    spill_bytes: per thread.
    tensor_columns: of Blackwell's tensor memory, of which there are 512.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_columns: int
    matrix: tuple[str, ...]


def builds(archs: Sequence[str], dtypes: Sequence[str], dims: Sequence[tuple[int, int]] = DIMS) -> Iterator[Build]:
    """Lists the product."""
    for arch in archs:
        for dtype in dtypes:
            for dim, v_dim in dims:
                for which in PASSES:
                    yield Build(which, arch, dtype, dim, v_dim)


def compiled(build: Build, chosen: Config | None = None, size: str | int = "i32", stride: str | int = "i32:16") -> Any:
    """Returns triton's result for a build, as for aligned tensors, in its own or another configuration.

    `size` and `stride` are the numbers that a launch takes beside tensors; see source.
    """
    kernel, chosen = KERNELS[build.which], chosen or build.config
    q, k, v, dout, gradient = (
        StridedRows(f"*{dtype}:16", stride, stride, stride) for dtype in (*[build.dtype] * 4, "fp32")
    )
    # Rows of lse and delta are next to each other, which triton makes a constant.
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


def source(kernel: Any, *arguments: Any) -> ASTSource:
    """Returns what triton compiles for arguments of these kinds.

    A string is the type of a number or of a pointer, as triton writes it, with ":16" behind where 16 divides it;
    anything else is a constant. They may lie in tuples.
    """
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def type_of(argument: Any, *path: int) -> Any:
        if isinstance(argument, tuple):
            types = [type_of(x, *path, i) for i, x in enumerate(argument)]
            return type(argument)(*types)
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
    return triton.compile(
        made,
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )


def report(build: Build, chosen: Config | None = None) -> Report:
    """Returns what is known of a build without running it."""
    return told_by(compiled(build, chosen))


def told_by(result: Any) -> Report:
    """Reads triton's result."""
    text = result.asm["ptx"] if "ptx" in result.asm else result.asm["amdgcn"]
    found = re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma)", text)
    registers, spilled = _nvidia(result) if "cubin" in result.asm else _amd(text)
    columns = int(getattr(result.metadata, "tmem_size", None) or 0)
    return Report(registers, spilled, int(result.metadata.shared), columns, tuple(sorted(set(found))))


def _nvidia(result: Any) -> tuple[int, int]:
    """Registers per thread, and bytes of spills, from the cubin."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{tool} tells nothing of registers: {usage}")
    return int(found[1]), int(found[2]) + int(found[3])


def _amd(text: str) -> tuple[int, int]:
    """Vector registers per thread, and bytes of scratch memory, from the metadata of the code object."""
    registers, scratch = (
        re.search(rf"\.{name}:\s+(\d+)", text) for name in ("vgpr_count", "private_segment_fixed_size")
    )
    if registers is None or scratch is None:
        raise RuntimeError("the metadata tell nothing of registers")
    return int(registers[1]), int(scratch[1])


def main() -> None:
    """Prints the table and writes the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/triton"))
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    options = parser.parse_args()
    lines = Lines(options.out / "report.jsonl")
    row = "{:8} {:8} {:5} {:>9} {:>24} {:>5} {:>7} {:>9}  {}"
    print(
        row.format("arch", "kernel", "dtype", "head dims", "m, n, e, warps, stages", "regs", "spills", "shared", "by")
    )
    for build in builds(options.arch, options.dtype):
        found, chosen = report(build), build.config
        lines.add({**asdict(build), **chosen._asdict(), **asdict(found)})
        dims, sizes = f"{build.dim}/{build.v_dim}", ", ".join(map(str, chosen))
        print(
            row.format(
                build.arch, build.which, build.dtype, dims, sizes, found.registers, found.spill_bytes,
                found.shared_bytes, " ".join(found.matrix),
            ),
            flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
