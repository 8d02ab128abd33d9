"""What triton makes of the paged kernel for each GPU, without one: as triton_report does for the others.

python -m benchmarks.paged_report --out results/triton
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Lines
from benchmarks.triton_report import DTYPES, Report, assembled, source, told_by
from ringattn.kernels.paged.paged_contract import PageTables, VisibleKeys
from ringattn.kernels.triton.args import PageArgs, PagedSizes, PartialArgs, ScoreArgs, StridedRows
from ringattn.kernels.triton.configs import TARGETS, PagedConfig, padded_dim, paged_config
from ringattn.kernels.triton.paged_kernels import combine_kernel, paged_kernel
from ringattn.kernels.triton.paged_launch import COMBINE_WARPS, COMBINED

# Head dims of keys, and of values.
DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
PAGE_SIZES = (1, 16, 24, 64, 256)
ROWS = (16, 32, 64)

# What the launches take beside tensors; see triton_report.source.
TABLES, VISIBLE = PageTables._make(["*i32:16"] * 3), VisibleKeys._make(["*i32:16"] * 2)
PARTS = PartialArgs("*fp32:16", "*fp32:16")
COUNTS = PagedSizes(*["i32"] * 5)


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
        return paged_config(self.arch, DTYPES[self.dtype], padded_dim(self.dim), padded_dim(self.v_dim))


def builds(archs: Sequence[str], dtypes: Sequence[str]) -> Iterator[PagedBuild]:
    """Lists what differs: all dims and rows by one page size, and the page sizes by one of them."""
    for arch in archs:
        for dtype in dtypes:
            for dim, v_dim in DIMS:
                for rows in ROWS:
                    build = PagedBuild(arch, dtype, dim, v_dim, 16, rows)
                    if rows <= build.config.max_rows:
                        yield build
            for page_size in PAGE_SIZES:
                if page_size != 16:
                    yield PagedBuild(arch, dtype, 128, 128, page_size)


def compiled(build: PagedBuild, chosen: PagedConfig | None = None) -> Any:
    """Returns triton's result for a build, as for aligned tensors, in its own or another configuration."""
    chosen = chosen or build.config
    tensor = (f"*{build.dtype}:16", "i32:16", "i32:16", "i32:16")
    made = source(
        paged_kernel, StridedRows(*tensor), PageArgs(*tensor), PageArgs(*tensor), TABLES, VISIBLE, PARTS, COUNTS,
        ScoreArgs("fp32" if build.capped else None, "fp32", "fp32"),
        build.dim, build.v_dim, build.page_size, build.tokens, build.rows, chosen.block_n,
    )  # fmt: skip
    return assembled(made, build.arch, chosen.num_warps, chosen.num_stages)


def combined(arch: str, v_dim: int) -> Any:
    """Returns triton's result for the merge of parts."""
    out, lse = StridedRows("*fp32:16", *["i32:16"] * 3), StridedRows("*fp32:16", "i32:16", 1, "i32:16")
    made = source(combine_kernel, PARTS, "*i32:16", out, lse, COUNTS, v_dim, COMBINED // padded_dim(v_dim))
    return assembled(made, arch, COMBINE_WARPS, 1)


def report(build: PagedBuild, chosen: PagedConfig | None = None) -> Report:
    """Returns what is known of a build without running it."""
    return told_by(compiled(build, chosen))


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
