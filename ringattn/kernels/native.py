"""Our own kernel for the CPU: csrc/cpu, compiled on first use, behind the contract."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ringattn.geometry.tiles import Tiles
from ringattn.kernels.build import BuildError, library
from ringattn.kernels.contract import ProblemSpec, ScoreOptions

_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class NativeKernel:
    """Tiles as they are, with the running state in cache: see csrc/cpu/forward.h. See contract.BlockKernel.

    Args:
        isa: the instruction set, one of `instruction_sets`; "" is the widest that this processor has.
    """

    isa: str = ""
    name: str = "native"

    @property
    def about(self) -> str:
        """One line for people: what it is, and which instructions it takes for which dtype."""
        told = "our own C++ for the CPU, compiled on first use; every option"
        return f"{told}; fp32, bf16, fp16" if self.available() else f"{told}; {self._instructions()}"

    def _instructions(self) -> str:
        taken = {dtype: self.isa or instruction_sets(dtype)[0] for dtype in _DTYPES}
        dtypes = {isa: [name for dtype, name in _DTYPES.items() if taken[dtype] == isa] for isa in taken.values()}
        return ", ".join(f"{isa} ({', '.join(names)})" for isa, names in dtypes.items())

    def available(self) -> list[str]:
        """Builds and loads the library, at most once in a process; a reason when that fails."""
        reason = _load()
        return [reason] if reason else []

    def unsupported(self, call: ProblemSpec) -> list[str]:
        """See contract.BlockKernel.unsupported."""
        if call.device_type != "cpu":
            return [f"runs on cpu, not on {call.device_type}"]
        if call.dtype not in _DTYPES:
            return [f"takes {', '.join(map(str, _DTYPES))}, not {call.dtype}"]
        if self.isa and self.isa not in instruction_sets(call.dtype):
            return [f"has isa={self.isa!r}, which this processor, or {call.dtype}, does not go with"]
        return []

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, spec: ScoreOptions, out: Tensor, lse: Tensor
    ) -> None:
        """See contract.BlockKernel.forward."""
        if tiles:
            softcap = spec.softcap or 0.0
            torch.ops.ringattn_native.forward(q, k, v, _table(tiles), spec.scale, softcap, out, lse, self.isa)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        tiles: Tiles,
        spec: ScoreOptions,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """See contract.BlockKernel.backward."""
        if tiles:
            softcap = spec.softcap or 0.0
            torch.ops.ringattn_native.backward(
                dout, q, k, v, lse, delta, _table(tiles), spec.scale, softcap, dq, dk, dv, self.isa
            )


def instruction_sets(dtype: torch.dtype) -> list[str]:
    """Returns the instruction sets that a dtype can be computed with here, the one that is taken first."""
    names: str = torch.ops.ringattn_native.instruction_sets(dtype is torch.bfloat16)
    return names.split(",")


def _table(tiles: Tiles) -> Tensor:
    return torch.from_numpy(tiles.table.copy())


@lru_cache(maxsize=1)
def _load() -> str:
    """Loads the library into torch, which is for good; returns why it cannot be, or ""."""
    try:
        torch.ops.load_library(library("cpu"))  # type: ignore[no-untyped-call]
    except (BuildError, OSError) as error:
        warnings.warn(f"ringattn works without its own CPU kernel, and slower: {error}", stacklevel=2)
        return str(error)
    for operation in ("forward", "backward", "decode", "merge"):
        torch.library.register_fake(f"ringattn_native::{operation}", _nothing)
    return ""


def _nothing(*_: object) -> None:
    """What the operations return: they work in place."""
