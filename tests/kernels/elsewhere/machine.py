"""The native kernels as another processor computes them: compiled for it, without torch, in an emulator of it."""

from __future__ import annotations

import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.cpp_extension import get_cxx_compiler

from ringattn.geometry.tiles import Tiles
from ringattn.kernels.build import FLAGS, sources
from ringattn.kernels.contract import BackwardQueries, Gradients, Keys, ProblemSpec, Queries, State
from ringattn.kernels.native import NativeKernel, instruction_sets
from ringattn.kernels.paged.native_paged import NativePaged
from ringattn.kernels.paged.paged_contract import PageTables, Pools, VisibleKeys
from ringattn.score import Score
from ringattn.softmax import merge_

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FORWARD, _BACKWARD, _DECODE = range(3)


@dataclass(frozen=True)
class Processor:
    """How programs for it are made and run.

    Args:
        compiler: and its flags.
        isas: the instruction sets that are compiled.
        emulator: what runs a program; () is this processor.
        interpreter: a source file whose program interprets instructions that this processor lacks, and counts them.
    """

    compiler: tuple[str, ...]
    isas: tuple[str, ...]
    emulator: tuple[str, ...] = ()
    interpreter: str | None = None

    def missing(self) -> list[str]:
        """The tools that are not here."""
        return [tool for tool in (*self.compiler[:1], *self.emulator) if shutil.which(tool) is None]


ARM = Processor(
    ("aarch64-linux-gnu-g++", "-static", "-Wall", "-Werror"), ("portable", "emulated_bf16"), ("qemu-aarch64",)
)
_named: str = get_cxx_compiler()  # type: ignore[no-untyped-call]
WITH_BF16 = Processor(tuple(shlex.split(_named)), ("avx512_bf16",), interpreter="bf16.cpp")


def not_to_be_emulated() -> str | None:
    """Why WITH_BF16 is of no use here; None if it is."""
    assert not NativeKernel().available()
    here = instruction_sets(torch.bfloat16)
    if "avx512_bf16" in here:
        return "this processor has the instructions: test_native.py runs them"
    if "avx512" not in here or sys.platform != "linux":
        return "this is no processor with AVX-512, or not under Linux"
    return None


class Machine:
    """A processor that answers calls until it is closed.

    `interpreted` counts the instructions that the processor's interpreter had to do so far.
    """

    def __init__(self, processor: Processor, folder: Path) -> None:
        cpu, here = sources() / "cpu", Path(__file__).parent
        files = [cpu / f"{isa}.cpp" for isa in processor.isas] + [cpu / "task_schedule.cpp", here / "driver.cpp"]
        if processor.interpreter is not None:
            files.append(here / processor.interpreter)
        flags = [flag for flag in FLAGS if flag != "-fPIC"]
        flags += [f"-I{cpu}", f"-DRINGATTN_SETS={','.join(processor.isas).upper()}"]
        program = folder / "driver"
        subprocess.run([*processor.compiler, *flags, *map(str, files), "-o", str(program)], check=True)
        self.processor, self.interpreted = processor, 0
        self.process = subprocess.Popen(
            [*processor.emulator, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def number(self, isa: str) -> int:
        """An instruction set as the driver knows it."""
        return self.processor.isas.index(isa)

    def call(self, header: bytes, given: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Sends a call, and writes what comes back into fp32 tensors."""
        there, back = self.process.stdin, self.process.stdout
        assert there is not None
        assert back is not None
        there.write(header + b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in given))
        there.flush()
        for x in results:
            data = bytearray(back.read(4 * x.numel()))
            assert len(data) == 4 * x.numel(), "the driver has ended"
            if data:
                x.copy_(torch.frombuffer(data, dtype=torch.float32).view(x.shape))
        (self.interpreted,) = struct.unpack("=q", back.read(8))

    def close(self) -> None:
        """Ends the processor; it must not have failed before."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(60) == 0


def header(operation: int, q: Tensor, kv: Tensor, v_dim: int, keys: int, tiles: int, score: Score, isa: int) -> bytes:
    """The header of driver.cpp; `kv` are keys, or a pool of them, and `isa` is one of the processor's, by number."""
    batch, rows, heads, dim = q.shape
    sizes = (batch, rows, keys, heads, kv.shape[2], dim, v_dim, kv.shape[0], kv.shape[1])
    numbers = (operation, _DTYPES.index(q.dtype), isa, tiles, *sizes)
    return struct.pack("=13q2d", *numbers, score.factor, score.softcap or 0.0)


@dataclass(frozen=True)
class Elsewhere(NativeKernel):
    """A `NativeKernel` that computes on the machine."""

    machine: Machine = field(kw_only=True)

    def unsupported(self, problem: ProblemSpec) -> list[str]:
        reasons = NativeKernel().unsupported(problem)
        if self.isa.endswith("bf16") and problem.dtype is not torch.bfloat16:
            reasons.append(f"has isa={self.isa!r}, which takes bfloat16 only")
        return reasons

    def forward(self, queries: Queries, keys: Keys, tiles: Tiles, score: Score, state: State) -> None:
        if tiles:
            (q, _), (k, v, _) = queries, keys
            start = header(_FORWARD, q, k, v.shape[3], k.shape[1], len(tiles), score, self.machine.number(self.isa))
            self.machine.call(start, [torch.from_numpy(tiles.table.copy()), q, k, v, *state], state)

    def backward(self, queries: BackwardQueries, keys: Keys, tiles: Tiles, score: Score, gradients: Gradients) -> None:
        if tiles:
            (q, dout, lse, delta), (k, v, _) = queries[:4], keys
            start = header(_BACKWARD, q, k, v.shape[3], k.shape[1], len(tiles), score, self.machine.number(self.isa))
            table = torch.from_numpy(tiles.table.copy())
            self.machine.call(start, [table, dout, q, k, v, lse, delta, *gradients], gradients)


@dataclass(frozen=True)
class PagedElsewhere(NativePaged):
    """A `NativePaged` that computes on the machine; the result is merged into the state here."""

    machine: Machine = field(kw_only=True)

    def forward(
        self, queries: Queries, pools: Pools, tables: PageTables, visible: VisibleKeys, score: Score, state: State
    ) -> None:
        (q, _), (k, v), (out, lse) = queries, pools, state
        start = header(_DECODE, q, k, v.shape[3], tables.pages.numel(), 0, score, self.machine.number(self.isa))
        batch, tokens, heads, v_dim = out.shape
        rows = (batch, k.shape[2], tokens, heads // k.shape[2])
        part, part_lse = torch.empty(*rows, v_dim), torch.empty(rows)
        self.machine.call(start, [q, k, v, *tables, *visible], [part, part_lse])
        merge_(out, lse, part.transpose(1, 2).reshape(out.shape), part_lse.transpose(2, 3).reshape(lse.shape))
