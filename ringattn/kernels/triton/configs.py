"""Block sizes, warps and pipeline stages for each architecture, in one table. No triton is needed to read it."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch

Pass = Literal["forward", "dq", "dkdv"]

PASSES: tuple[Pass, ...] = ("forward", "dq", "dkdv")
MIN_WIDTH, MAX_DIM = 16, 256
# Query rows per program of the paged kernel, at least: the rows of a matrix instruction.
MIN_ROWS = 16


class Config(NamedTuple):
    """The configuration of a kernel.

    block_m: query rows per step.
    block_n: key rows per step.
    edge_step: rows of the other side per masked step, which needs more registers.
    """

    block_m: int
    block_n: int
    edge_step: int
    num_warps: int
    num_stages: int


class PagedConfig(NamedTuple):
    """The configuration of the paged kernel.

    max_rows: query rows per program, over all new tokens and all query heads that share a kv head.
    block_n: keys per step.
    programs: per multiprocessor, within its registers and shared memory.
    """

    max_rows: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int

    def rows(self, num_rows: int) -> int:
        """Returns the query rows per program, a power of two, for `num_rows` query rows in all."""
        return min(max(MIN_ROWS, 1 << (num_rows - 1).bit_length()), self.max_rows)


class Target(NamedTuple):
    """The compilation target of an architecture."""

    backend: str
    arch: int | str
    warp_size: int


TARGETS: dict[str, Target] = {
    "sm_80": Target("cuda", 80, 32),
    "sm_90": Target("cuda", 90, 32),
    "sm_100": Target("cuda", 100, 32),
    "gfx942": Target("hip", "gfx942", 64),
}

# By architecture, bytes of an element, and pass: for padded head dims up to 64, 128 and 256.
# No entry spills registers; a test compiles them all. Exact products of wide float32 rows fit only if the stages of a
# pipeline keep these rows in shared memory.
_WIDTHS = (64, 128, 256)
_TABLE: dict[tuple[str, int, Pass], tuple[Config, Config, Config]] = {
    ("sm_80", 2, "forward"): (Config(128, 64, 32, 8, 3), Config(128, 64, 32, 8, 3), Config(64, 64, 32, 8, 2)),
    ("sm_80", 2, "dq"): (Config(128, 64, 32, 8, 3), Config(64, 64, 32, 8, 2), Config(64, 32, 16, 8, 2)),
    ("sm_80", 2, "dkdv"): (Config(32, 64, 32, 4, 2), Config(64, 64, 32, 8, 2), Config(32, 64, 16, 8, 2)),
    ("sm_80", 4, "forward"): (Config(64, 32, 16, 8, 2), Config(32, 32, 16, 8, 2), Config(32, 32, 16, 8, 2)),
    ("sm_80", 4, "dq"): (Config(64, 32, 16, 8, 2), Config(32, 32, 16, 8, 2), Config(32, 32, 16, 8, 2)),
    ("sm_80", 4, "dkdv"): (Config(32, 32, 16, 4, 2), Config(16, 32, 16, 8, 2), Config(16, 32, 16, 8, 2)),
    ("sm_90", 2, "forward"): (Config(128, 128, 64, 8, 3), Config(128, 128, 64, 8, 3), Config(64, 64, 32, 8, 2)),
    ("sm_90", 2, "dq"): (Config(128, 128, 64, 8, 2), Config(128, 128, 64, 8, 2), Config(64, 64, 16, 8, 2)),
    ("sm_90", 2, "dkdv"): (Config(64, 128, 32, 8, 3), Config(32, 128, 32, 8, 3), Config(32, 64, 16, 8, 2)),
    ("sm_90", 4, "forward"): (Config(64, 32, 16, 8, 2), Config(32, 32, 16, 8, 2), Config(16, 64, 32, 8, 2)),
    ("sm_90", 4, "dq"): (Config(64, 32, 16, 8, 2), Config(32, 32, 16, 8, 2), Config(32, 16, 16, 8, 1)),
    ("sm_90", 4, "dkdv"): (Config(32, 64, 16, 8, 2), Config(32, 32, 16, 8, 2), Config(32, 16, 16, 8, 2)),
    ("sm_100", 2, "forward"): (Config(128, 128, 64, 8, 3), Config(128, 128, 64, 8, 2), Config(64, 64, 32, 8, 2)),
    ("sm_100", 2, "dq"): (Config(128, 128, 64, 8, 2), Config(128, 64, 32, 8, 2), Config(64, 32, 16, 8, 1)),
    ("sm_100", 2, "dkdv"): (Config(64, 128, 32, 8, 2), Config(64, 64, 32, 8, 2), Config(32, 32, 16, 8, 1)),
    ("sm_100", 4, "forward"): (Config(64, 32, 16, 8, 2), Config(32, 32, 16, 8, 2), Config(16, 64, 32, 8, 2)),
    ("sm_100", 4, "dq"): (Config(64, 32, 16, 8, 2), Config(32, 32, 16, 8, 2), Config(32, 16, 16, 8, 1)),
    ("sm_100", 4, "dkdv"): (Config(32, 64, 16, 8, 2), Config(32, 32, 16, 8, 2), Config(16, 32, 16, 8, 2)),
    ("gfx942", 2, "forward"): (Config(128, 64, 32, 4, 1), Config(128, 64, 32, 8, 1), Config(64, 32, 16, 4, 1)),
    ("gfx942", 2, "dq"): (Config(64, 64, 32, 4, 1), Config(64, 32, 32, 4, 1), Config(32, 32, 16, 4, 1)),
    ("gfx942", 2, "dkdv"): (Config(64, 64, 32, 4, 1), Config(32, 64, 16, 4, 1), Config(32, 32, 16, 4, 1)),
    ("gfx942", 4, "forward"): (Config(32, 32, 16, 4, 1), Config(32, 32, 16, 8, 1), Config(16, 16, 16, 4, 1)),
    ("gfx942", 4, "dq"): (Config(32, 32, 16, 4, 1), Config(16, 16, 16, 4, 1), Config(16, 16, 16, 4, 1)),
    ("gfx942", 4, "dkdv"): (Config(32, 32, 16, 4, 1), Config(16, 16, 16, 4, 1), Config(16, 16, 16, 4, 1)),
}
# With softcapping, where the registers of its tanh would make the entries above spill: by padded head dim.
_CAPPED: dict[tuple[str, int, Pass], dict[int, Config]] = {
    ("sm_80", 2, "forward"): {256: Config(64, 32, 32, 8, 2)},
    ("sm_80", 2, "dkdv"): {64: Config(32, 64, 16, 4, 2), 256: Config(32, 32, 16, 8, 2)},
    ("sm_80", 4, "dkdv"): {64: Config(32, 32, 16, 8, 2)},
    ("sm_90", 2, "dq"): {128: Config(128, 64, 64, 8, 2)},
    ("sm_90", 2, "dkdv"): {128: Config(32, 128, 16, 8, 3), 256: Config(16, 64, 16, 8, 3)},
    ("sm_90", 4, "dkdv"): {256: Config(16, 16, 16, 8, 2)},
    ("sm_100", 4, "dq"): {128: Config(32, 16, 16, 8, 2)},
    ("sm_100", 4, "dkdv"): {64: Config(32, 32, 16, 8, 2), 128: Config(16, 32, 16, 8, 2)},
    ("gfx942", 2, "dkdv"): {256: Config(16, 32, 16, 4, 1)},
    ("gfx942", 4, "forward"): {128: Config(16, 32, 16, 8, 1)},
}
# The paged kernel. Where the address of a load is the result of another, triton gives each half of the stages:
# with 5, a step of keys and values is in flight while the one before is computed.
_PAGED: dict[tuple[str, int], tuple[PagedConfig, PagedConfig, PagedConfig]] = {
    ("sm_80", 2): (PagedConfig(64, 128, 8, 5, 1), PagedConfig(64, 64, 8, 5, 1), PagedConfig(32, 32, 8, 5, 1)),
    ("sm_80", 4): (PagedConfig(32, 32, 8, 5, 2), PagedConfig(16, 16, 8, 7, 2), PagedConfig(32, 16, 8, 5, 1)),
    ("sm_90", 2): (PagedConfig(64, 128, 8, 5, 1), PagedConfig(64, 64, 8, 5, 1), PagedConfig(32, 32, 8, 5, 1)),
    ("sm_90", 4): (PagedConfig(32, 32, 8, 5, 2), PagedConfig(16, 16, 8, 7, 2), PagedConfig(32, 16, 8, 5, 2)),
    ("sm_100", 2): (PagedConfig(64, 128, 8, 5, 1), PagedConfig(64, 64, 8, 5, 1), PagedConfig(32, 32, 8, 5, 1)),
    ("sm_100", 4): (PagedConfig(32, 32, 8, 5, 2), PagedConfig(16, 16, 8, 7, 2), PagedConfig(32, 16, 8, 5, 2)),
    ("gfx942", 2): (PagedConfig(64, 64, 8, 2, 2), PagedConfig(64, 32, 8, 2, 2), PagedConfig(32, 32, 8, 2, 1)),
    ("gfx942", 4): (PagedConfig(32, 32, 8, 2, 2), PagedConfig(16, 16, 8, 2, 2), PagedConfig(32, 16, 8, 2, 1)),
}
INTERPRETER = "interpreter"

# Where tensor descriptors pay: hardware with asynchronous block copies (TMA) that feed the matrix units.
_WITH_DESCRIPTORS = {("sm_90", 2), ("sm_100", 2), (INTERPRETER, 2), (INTERPRETER, 4)}
# Small, so that small tests have several blocks.
_INTERPRETED = Config(64, 64, 32, 1, 1)
_INTERPRETED_PAGED = PagedConfig(64, 64, 1, 1, 8)


def padded_dim(dim: int) -> int:
    """Returns the width in which a head dim is computed: the next power of two, at least 16."""
    return max(MIN_WIDTH, 1 << (dim - 1).bit_length())


def config(arch: str, itemsize: int, width: int, v_width: int, which: Pass, *, capped: bool) -> Config:
    """Returns the configuration of a pass, for an element size in bytes and padded head dims."""
    if arch == INTERPRETER:
        return _INTERPRETED
    wider = max(width, v_width, _WIDTHS[0])
    plain = _TABLE[arch, itemsize, which][_WIDTHS.index(wider)]
    return _CAPPED.get((arch, itemsize, which), {}).get(wider, plain) if capped else plain


def paged_config(arch: str, itemsize: int, width: int, v_width: int) -> PagedConfig:
    """Returns the configuration of the paged kernel."""
    if arch == INTERPRETER:
        return _INTERPRETED_PAGED
    return _PAGED[arch, itemsize][_WIDTHS.index(max(width, v_width, _WIDTHS[0]))]


def uses_descriptors(arch: str, itemsize: int) -> bool:
    """Returns whether kernels load whole blocks through tensor descriptors, where strides allow it."""
    return (arch, itemsize) in _WITH_DESCRIPTORS


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> str | None:
    """Returns the key in TARGETS of a GPU's family, or None where there is none."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        name = str(properties.gcnArchName).split(":")[0]
    else:
        name = f"sm_{properties.major}0"
        # Other GPUs of a family have less shared memory than its configurations need.
        if (properties.major, properties.minor) not in ((8, 0), (9, 0), (10, 0), (10, 3)):
            return None
    return name if name in TARGETS else None
