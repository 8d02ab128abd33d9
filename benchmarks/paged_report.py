"""What triton makes of the paged kernel for each GPU, without one: as triton_report does for the others.

python -m benchmarks.paged_report --out results/triton
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from triton.compiler import ASTSource

from benchmarks.measure import Lines
from benchmarks.triton_report import DTYPES, Report, assembled, told_by
from ringattn.kernels.triton.configs import TARGETS, PagedConfig, padded, paged_config
from ringattn.kernels.triton.paged import combine_kernel, paged_kernel
from ringattn.kernels.triton.paged_launch import COMBINE_WARPS, COMBINED

# Head dims of keys, and of values.
DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
PAGE_SIZES = (1, 16, 24, 64, 256)
ROWS = (16, 32, 64)

TABLES = ("pages", "slots", "starts", "first", "stop")
STRIDES = ("_batch", "_token", "_head", "_page", "_slot")


@dataclass(frozen=True)
class PagedBuild:
    """The paged kernel for one target.

    rows: query rows of a program.
    """

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
        """The configuration that is shipped."""
        return paged_config(self.arch, DTYPES[self.dtype], padded(self.dim), padded(self.v_dim))


def builds(archs: Sequence[str], dtypes: Sequence[str]) -> Iterator[PagedBuild]:
    """Lists what differs: all dims and rows by one page size, and the page sizes by one of them."""
    for arch in archs:
        for dtype in dtypes:
            for dim, v_dim in DIMS:
                for rows in ROWS:
                    build = PagedBuild(arch, dtype, dim, v_dim, 16, rows)
                    if rows <= build.config.most_rows:
                        yield build
            for page_size in PAGE_SIZES:
                if page_size != 16:
                    yield PagedBuild(arch, dtype, 128, 128, page_size)


def compiled(build: PagedBuild, chosen: PagedConfig | None = None) -> Any:
    """Returns triton's result for a build, as for aligned tensors, in its own or another configuration."""
    chosen = chosen or build.config
    constants = {
        "DIM": build.dim,
        "V_DIM": build.v_dim,
        "WIDTH": padded(build.dim),
        "V_WIDTH": padded(build.v_dim),
        "PAGE_SIZE": build.page_size,
        "TOKENS": build.tokens,
        "TOKENS_WIDTH": 1 << (build.tokens - 1).bit_length(),
        "BLOCK_M": build.rows,
        "BLOCK_N": chosen.block_n,
        "CAPPED": build.capped,
    }
    return assembled(_source(paged_kernel, constants, build.dtype), build.arch, chosen.num_warps, chosen.num_stages)


def combined(arch: str, v_dim: int) -> Any:
    """Returns triton's result for the merge of parts."""
    constants = {"V_DIM": v_dim, "V_WIDTH": padded(v_dim), "PARTS": COMBINED // padded(v_dim), "lse_token": 1}
    return assembled(_source(combine_kernel, constants, "fp32"), arch, COMBINE_WARPS, 1)


def report(build: PagedBuild, chosen: PagedConfig | None = None) -> Report:
    """Returns what is known of a build without running it."""
    return told_by(compiled(build, chosen))


def _source(kernel: Any, constants: dict[str, Any], dtype: str) -> ASTSource:
    signature = {name: "constexpr" if name in constants else _type(name, dtype) for name in kernel.arg_names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name.endswith(STRIDES) and name not in constants)
    }
    return ASTSource(kernel, signature, constants, attributes)


def _type(name: str, dtype: str) -> str:
    """The type of an argument, as triton writes it."""
    if name in ("q", "k", "v"):
        return f"*{dtype}"
    if name in TABLES:
        return "*i32"
    if name in ("part_out", "part_lse", "out", "lse"):
        return "*fp32"
    return "fp32" if name in ("inner", "factor") else "i32"


def main() -> None:
    """Prints the table and writes the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/triton"))
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    options = parser.parse_args()
    lines = Lines(options.out / "paged.jsonl")
    row = "{:8} {:5} {:>9} {:>4} {:>4} {:>32} {:>5} {:>7} {:>7}  {}"
    titles = (
        "arch",
        "dtype",
        "head dims",
        "page",
        "rows",
        "rows, n, warps, stages, programs",
        "regs",
        "spills",
        "shared",
    )
    print(row.format(*titles, "by"))
    for build in builds(options.arch, options.dtype):
        found = report(build)
        lines.add({**asdict(build), **build.config._asdict(), **asdict(found)})
        dims, sizes = f"{build.dim}/{build.v_dim}", ", ".join(map(str, build.config))
        print(
            row.format(
                build.arch, build.dtype, dims, build.page_size, build.rows, sizes, found.registers,
                found.spill_bytes, found.shared_bytes, " ".join(found.matrix),
            ),
            flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
