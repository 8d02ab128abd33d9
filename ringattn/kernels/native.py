"""Our own kernel for the CPU: csrc/cpu, compiled on first use, behind the contract."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ringattn.geometry.tiles import Tiles
from ringattn.kernels.build import BuildError, library
from ringattn.kernels.contract import (
    BackwardQueries,
    Gradients,
    Keys,
    ProblemSpec,
    Queries,
    State,
    unsupported_terms,
)
from ringattn.score import Score

_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class NativeKernel:
    """A `BlockKernel` in C++ for the CPU, for fp32, fp16 and bf16.

    One call computes all tiles, and updates (out, lse) while they are in cache. See csrc/cpu/forward.h.

    Args:
        isa: one of `instruction_sets`; "" selects the widest that this processor has.
    """

    isa: str = ""
    name: str = "native"
    score_terms = frozenset({"softcap"})

    @property
    def about(self) -> str:
        """One line for people: what it is, and which instructions it takes for which dtype."""
        about = "our own C++ for the CPU, compiled on first use; every option"
        return f"{about}; fp32, bf16, fp16" if self.available() else f"{about}; {self._instructions()}"

    def _instructions(self) -> str:
        taken = {dtype: self.isa or instruction_sets(dtype)[0] for dtype in _DTYPES}
        dtypes = {isa: [name for dtype, name in _DTYPES.items() if taken[dtype] == isa] for isa in taken.values()}
        return ", ".join(f"{isa} ({', '.join(names)})" for isa, names in dtypes.items())

    def available(self) -> list[str]:
        """Compiles and loads the library, once per process. Returns the reason if that fails."""
        reason = _load()
        return [reason] if reason else []

    def unsupported(self, problem: ProblemSpec) -> list[str]:
        if problem.device_type != "cpu":
            return [f"runs on cpu, not on {problem.device_type}"]
        reasons = unsupported_terms(problem, self.score_terms)
        if problem.dtype not in _DTYPES:
            reasons.append(f"takes {', '.join(map(str, _DTYPES))}, not {problem.dtype}")
        elif self.isa and self.isa not in instruction_sets(problem.dtype):
            reasons.append(
                f"has isa={self.isa!r}, which does not run on this processor, or does not take {problem.dtype}"
            )
        return reasons

    def forward(self, queries: Queries, keys: Keys, tiles: Tiles, score: Score, state: State) -> None:
        if tiles:
            softcap = score.softcap or 0.0
            torch.ops.ringattn_native.forward(
                queries.q, keys.k, keys.v, _tile_table(tiles), score.factor, softcap, state.out, state.lse, self.isa
            )

    def backward(self, queries: BackwardQueries, keys: Keys, tiles: Tiles, score: Score, gradients: Gradients) -> None:
        if tiles:
            softcap = score.softcap or 0.0
            torch.ops.ringattn_native.backward(
                queries.dout, queries.q, keys.k, keys.v, queries.lse, queries.delta,
                _tile_table(tiles), score.factor, softcap, *gradients, self.isa,
            )  # fmt: skip


def instruction_sets(dtype: torch.dtype) -> list[str]:
    """Returns the instruction sets that this processor has and that take the dtype. The first one is the default.

    The library must be loaded: call `NativeKernel().available()` first.

        >>> instruction_sets(torch.float32)  # on a processor with AVX-512
        ['avx512', 'avx2', 'portable']
    """
    names: str = torch.ops.ringattn_native.instruction_sets(dtype is torch.bfloat16)
    return names.split(",")


def _tile_table(tiles: Tiles) -> Tensor:
    """Returns the table as a tensor, made once for each list of tiles."""
    found: Tensor | None = tiles.kernel_data.get("native")
    if found is None:
        found = tiles.kernel_data["native"] = torch.from_numpy(tiles.table.copy())
    return found


@lru_cache(maxsize=1)
def _load() -> str:
    """Loads the library's ops into torch.ops, for the rest of the process. Returns the reason if that fails, or ""."""
    try:
        torch.ops.load_library(library("cpu"))  # type: ignore[no-untyped-call]
    except (BuildError, OSError) as error:
        warnings.warn(f"ringattn works without its own CPU kernel, but more slowly: {error}", stacklevel=2)
        return str(error)
    for op in ("forward", "backward", "decode", "merge"):
        torch.library.register_fake(f"ringattn_native::{op}", _fake)
    return ""


def _fake(*_: object) -> None:
    """The ops' fake implementation for torch.compile: they return nothing, since they write into their arguments."""
