"""Each form of the instructions of AVX512_BF16, to be executed one at a time, and what it should find by numpy."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]  # (16,): a vector of 512 bits

NAMES = ("vdpbf16ps", "vcvtneps2bf16", "vcvtne2ps2bf16")
_REGISTERS = {4: "xmm", 8: "ymm", 16: "zmm"}
_SIZES = {4: "xmmword", 8: "ymmword", 16: "zmmword"}
SAME = (5, 5, 5)  # one register for all operands
_HALF = {4: "xmm", 8: "xmm", 16: "ymm"}


@dataclass(frozen=True)
class Operand:
    """Where the last operand lies: what comes before the instruction, its address, and what comes after.

    It was given at [r8]; {n} is its size.
    """

    address: str = ""  # "": in a register
    begin: str = ""
    end: str = ""


REGISTER = Operand()
MEMORY = {
    "no offset": Operand("r8"),
    "offset of a byte": Operand("rax + 3 * {n}", "lea rax, [r8 - 3 * {n}]"),
    "negative offset of a byte": Operand("r9 - 128 * {n}", "lea r9, [r8 + 128 * {n}]"),
    "offset of four bytes": Operand("r10 + 1001", "lea r10, [r8 - 1001]"),
    "index": Operand("rcx + r11 * 8 + 2 * {n}", "mov r11d, 5; lea rcx, [r8 - 40 - 2 * {n}]"),
    "index far": Operand("r9 + rax * 4 - 4000", "mov rax, -7; lea r9, [r8 + 4028]"),
    "index, no base": Operand("r9 * 2 + 78", "lea r9, [r8 - 78]; shr r9"),
    "rsp": Operand("rsp + 64", "vmovups zmm0, [r8]; sub rsp, 128; vmovups [rsp + 64], zmm0", "add rsp, 128"),
    "rbp": Operand("rbp", "push rbp; mov rbp, r8", "pop rbp"),
    "r12": Operand("r12", "push r12; mov r12, r8", "pop r12"),
    "r13": Operand("r13", "push r13; mov r13, r8", "pop r13"),
    "rip": Operand("rip + kept + 1", "vmovups zmm0, [r8]; vmovups [rip + kept + 1], zmm0"),
}
# With MXCSR rounding up, and subnormals as they are, it should make no difference.
_ROUNDING_UP = Operand("r8", "mov dword ptr [rsp - 8], 0x5f80; ldmxcsr [rsp - 8]", "ldmxcsr [rip + area + 24]")


@dataclass(frozen=True)
class Form:
    """One way to write an instruction."""

    name: str
    lanes: int  # of 32 bits
    about: str
    operand: Operand = REGISTER
    broadcast: bool = False
    masking: str = ""  # or "merging", "zeroing"
    registers: tuple[int, int, int] = (2, 3, 4)
    mask: int = 1
    fresh: bool = False  # all registers as after a reset

    def __str__(self) -> str:
        return f"{self.name}, {self.lanes} lanes, {self.about}"

    def assembly(self, label: str) -> str:
        """A function (target, first, second, mask) of pointers to vectors, of which the target is read and written."""
        target, first, second = self.registers
        size = 4 if self.broadcast else 4 * self.lanes
        last = f"{_REGISTERS[self.lanes]}{second}"
        if self.operand.address:
            word = "dword" if self.broadcast else _SIZES[self.lanes]
            last = f"{word} ptr [{self.operand.address}]" + f"{{1to{self.lanes}}}" * self.broadcast
        kinds = _HALF if self.name == "vcvtneps2bf16" else _REGISTERS
        written = f"{kinds[self.lanes]}{target}"
        if self.masking:
            written += f"{{k{self.mask}}}" + "{z}" * (self.masking == "zeroing")
        middle = "" if self.name == "vcvtneps2bf16" else f"{_REGISTERS[self.lanes]}{first}, "
        loads = (f"vmovups zmm{target}, [rdi]", f"vmovups zmm{first}, [rsi]", f"vmovups zmm{second}, [r8]")
        lines = [
            f".globl {label}",
            f"{label}:",
            "mov r8, rdx",
            *(("mov eax, 0xe6; xor edx, edx; xrstor [rip + area]",) if self.fresh else loads),
            "" if self.fresh else f"kmovd k{self.mask}, ecx",
            self.operand.begin,
            f"{self.name} {written}, {middle}{last}",
            self.operand.end,
            f"vmovups [rdi], zmm{target}; vzeroupper; ret",
        ]
        return "\n".join(line.replace("{n}", str(size)) for line in lines)

    def expected(self, target: Words, first: Words, second: Words, mask: int) -> Words:
        """What the target should hold then."""
        if self.fresh:
            target, first = np.zeros_like(target), np.zeros_like(first)
        if self.registers == SAME and not self.operand.address:
            target = first = second  # which was loaded last
        second = np.full_like(second, second[0]) if self.broadcast else second
        target, n = target.copy(), self.lanes
        before: NDArray[np.uint32] | NDArray[np.uint16]
        found: NDArray[np.uint32] | NDArray[np.uint16]
        if self.name == "vdpbf16ps":
            before, found = target[:n], dot(target[:n], first[:n], second[:n])
        else:
            halves = second[:n] if self.name == "vcvtneps2bf16" else np.concatenate([second[:n], first[:n]])
            found = rounded(halves)
            before = target.view(np.uint16)[: len(found)]
        if self.masking:
            kept = np.zeros_like(before) if self.masking == "zeroing" else before
            found = np.where([mask >> i & 1 for i in range(len(found))], found, kept)
        result = np.zeros(64, np.uint8)
        result[: found.nbytes] = found.view(np.uint8)
        return result.view(np.uint32)


def _flushed(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def dot(total: Words, a: Words, b: Words) -> Words:
    """Adds the products of the high halves, then those of the low ones: each rounded once, subnormals being zero."""
    with np.errstate(all="ignore"):
        x = _flushed(total.view(np.float32))
        for one, two in ((a & 0xFFFF0000, b & 0xFFFF0000), (a << 16, b << 16)):
            factors = [_flushed(y.view(np.float32)).astype(np.float64) for y in (one, two)]
            x = _flushed((factors[0] * factors[1] + x).astype(np.float32))
    return x.view(np.uint32)


def rounded(x: Words) -> NDArray[np.uint16]:
    """To the nearest bfloat16, of two as near the even one; subnormals become zero, and each NaN quiet."""
    low = x & 0xFFFF0000
    with np.errstate(invalid="ignore"):
        size, near, far = (np.abs(y.view(np.float32).astype(np.float64)) for y in (x, low, low + 0x10000))
        far = np.where(np.isinf(far), 2.0**128, far)
        up = (far - size < size - near) | ((far - size == size - near) & ((x >> 16 & 1) == 1))
    found = np.where(up & np.isfinite(size), low + 0x10000, low)
    found = np.where(size < np.finfo(np.float32).tiny, x & 0x80000000, found)
    return (np.where(np.isnan(size), low | 0x400000, found) >> 16).astype(np.uint16)


def forms() -> Iterator[Form]:
    """Every instruction with each length, operand and mask, in low and high registers."""
    for name, lanes in itertools.product(NAMES, (4, 8, 16)):
        plain = Form(name, lanes, "registers")
        yield plain
        for registers in ((30, 17, 25), (9, 31, 14), (16, 8, 7), SAME):
            yield replace(plain, registers=registers, about=f"registers {registers}")
        for about, operand in {**MEMORY, "rounding up": _ROUNDING_UP}.items():
            yield replace(plain, operand=operand, about=about)
            yield replace(plain, operand=operand, broadcast=True, about=f"{about}, broadcast")
        for masking, mask in itertools.product(("merging", "zeroing"), (1, 3, 7)):
            masked = replace(plain, masking=masking, mask=mask, registers=(21, 12, 28), about=f"{masking} by k{mask}")
            yield masked
            yield replace(masked, operand=MEMORY["index"], about=f"{masked.about}, memory")
            yield replace(masked, operand=MEMORY["rbp"], broadcast=True, about=f"{masked.about}, broadcast")
        for target in (6, 20):
            fresh = replace(plain, fresh=True, operand=MEMORY["no offset"], registers=(target, target + 1, 0))
            yield replace(fresh, about=f"fresh registers, {target}")


def build(forms: Sequence[Form], compiler: Sequence[str], folder: Path) -> list[Callable[[int, int, int, int], None]]:
    """Assembles each form to a function."""
    lines = [".intel_syntax noprefix", ".text"]
    lines += [form.assembly(f"form_{i}") for i, form in enumerate(forms)]
    # An XSAVE area that says that everything is as after a reset.
    lines += [".data", ".balign 64", "area: .zero 24", ".long 0x1f80", ".zero 548", "kept: .zero 128"]
    lines += ['.section .note.GNU-stack, "", @progbits', ""]
    source, made = folder / "forms.s", folder / "forms.so"
    source.write_text("\n".join(lines))
    subprocess.run([*compiler, "-shared", str(source), "-o", str(made)], check=True)
    library = ctypes.CDLL(str(made))
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, ctypes.c_uint32)
    return [kind((f"form_{i}", library)) for i in range(len(forms))]
