"""The native kernels as another processor computes them: cross-compiled, without torch, in an emulator of it."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ringattn.geometry.tiles import Tiles
from ringattn.kernels.build import FLAGS, sources
from ringattn.kernels.contract import Spec
from ringattn.kernels.native import NativeKernel
from ringattn.kernels.paged.contract import PageTables, Sight
from ringattn.kernels.paged.native import NativePaged
from ringattn.softmax import merge_

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FORWARD, _BACKWARD, _DECODE = range(3)


class Machine:
    """A processor that answers calls until it is closed."""

    def __init__(self, folder: Path) -> None:
        cpu, driver = sources() / "cpu", Path(__file__).with_name("driver.cpp")
        files = [cpu / "portable.cpp", cpu / "portable_bf16.cpp", cpu / "schedule.cpp", driver]
        flags = [flag for flag in FLAGS if flag != "-fPIC"]
        program = folder / "driver"
        command = [COMPILER, *flags, "-Wall", "-Werror", "-static", f"-I{cpu}", *map(str, files), "-o", str(program)]
        subprocess.run(command, check=True)
        self.process = subprocess.Popen([EMULATOR, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

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

    def close(self) -> None:
        """Ends the processor; it must not have failed before."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(60) == 0


def header(operation: int, q: Tensor, kv: Tensor, v_dim: int, keys: int, tiles: int, spec: Spec, isa: str) -> bytes:
    """The header of driver.cpp; `kv` are keys, or a pool of them."""
    batch, rows, heads, dim = q.shape
    sizes = (batch, rows, keys, heads, kv.shape[2], dim, v_dim, kv.shape[0], kv.shape[1])
    dtype, in_pairs = _DTYPES.index(q.dtype), int(isa == "portable_bf16")
    return struct.pack("=13q2d", operation, dtype, in_pairs, tiles, *sizes, spec.scale, spec.softcap or 0.0)


@dataclass(frozen=True)
class Elsewhere(NativeKernel):
    """See NativeKernel; what it computes is computed there."""

    machine: Machine = field(kw_only=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, spec: Spec, out: Tensor, lse: Tensor) -> None:
        if tiles:
            told = header(_FORWARD, q, k, v.shape[3], k.shape[1], len(tiles), spec, self.isa)
            self.machine.call(told, [torch.from_numpy(tiles.table.copy()), q, k, v, out, lse], [out, lse])

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, tiles: Tiles, spec: Spec,
        dq: Tensor, dk: Tensor, dv: Tensor,
    ) -> None:  # fmt: skip
        if tiles:
            told = header(_BACKWARD, q, k, v.shape[3], k.shape[1], len(tiles), spec, self.isa)
            table = torch.from_numpy(tiles.table.copy())
            self.machine.call(told, [table, dout, q, k, v, lse, delta, dq, dk, dv], [dq, dk, dv])


@dataclass(frozen=True)
class PagedElsewhere(NativePaged):
    """See NativePaged; what is found there is merged into the state here."""

    machine: Machine = field(kw_only=True)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tables: PageTables, sight: Sight, spec: Spec, out: Tensor, lse: Tensor
    ) -> None:
        told = header(_DECODE, q, k, v.shape[3], tables.pages.numel(), 0, spec, self.isa)
        batch, tokens, heads, v_dim = out.shape
        rows = (batch, k.shape[2], tokens, heads // k.shape[2])
        part, part_lse = torch.empty(*rows, v_dim), torch.empty(rows)
        self.machine.call(told, [q, k, v, *tables, *sight], [part, part_lse])
        merge_(out, lse, part.transpose(1, 2).reshape(out.shape), part_lse.transpose(2, 3).reshape(lse.shape))
