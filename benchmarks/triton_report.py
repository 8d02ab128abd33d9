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
from ringattn.kernels.triton.backward import dkdv_kernel, dq_kernel
from ringattn.kernels.triton.configs import PASSES, TARGETS, Config, Pass, config, described, padded
from ringattn.kernels.triton.forward import forward_kernel

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
        return config(self.arch, DTYPES[self.dtype], padded(self.dim), padded(self.v_dim), self.which)


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


def compiled(build: Build, chosen: Config | None = None, ones: Sequence[str] = ("lse_row", "delta_row")) -> Any:
    """Returns triton's result for a build, as for aligned tensors, in its own or another configuration.

    `ones` are the arguments that are 1, which triton makes constants: rows of lse and delta are next to each other.
    """
    kernel, chosen = KERNELS[build.which], chosen or build.config
    constants = {
        "DIM": build.dim,
        "V_DIM": build.v_dim,
        "WIDTH": padded(build.dim),
        "V_WIDTH": padded(build.v_dim),
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "EDGE_STEP": chosen.edge_step,
        "CAPPED": build.capped,
        "DESCRIBED": described(build.arch, DTYPES[build.dtype]),
        **{name: 1 for name in ones if name in kernel.arg_names},
    }
    signature = {name: "constexpr" if name in constants else _type(name, build.dtype) for name in kernel.arg_names}
    if constants["DESCRIBED"]:
        rows = chosen.block_m if build.which == "dkdv" else chosen.block_n
        dims = {"q": build.dim, "k": build.dim, "v": build.v_dim, "dout": build.v_dim}
        for name in signature:
            if name.endswith("_described"):
                width = padded(dims[name.removesuffix("_described")])
                signature[name] = f"tensordesc<{build.dtype}[1, {rows}, 1, {width}]>"
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (index,): aligned
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name.endswith(("_batch", "_row", "_head")) and name not in constants)
    }
    source = ASTSource(kernel, signature, constants, attributes)
    return assembled(source, build.arch, chosen.num_warps, chosen.num_stages)


def assembled(source: ASTSource, arch: str, num_warps: int, num_stages: int) -> Any:
    """Returns triton's result for one architecture."""
    target = TARGETS[arch]
    return triton.compile(
        source,
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


def _type(name: str, dtype: str) -> str:
    """The type of an argument, as triton writes it."""
    if name.removesuffix("_described") in ("q", "k", "v", "dout"):
        return f"*{dtype}"
    if name in ("out", "lse", "delta", "dq", "dk", "dv"):
        return "*fp32"
    if name in ("items", "runs"):
        return "*i32"
    return "fp32" if name in ("inner", "factor", "scale") else "i32"


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
