"""The interpreter of the instructions of AVX512_BF16, which test_emulated.py runs the kernels in: each one alone."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.elsewhere.instructions import NAMES, Words, build, forms
from tests.kernels.elsewhere.machine import WITH_BF16, not_to_be_emulated


@pytest.fixture(scope="module", autouse=True)
def _lacking() -> None:
    if reason := not_to_be_emulated():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter as a library."""
    made = tmp_path_factory.mktemp("interpreter") / "library.so"
    source = Path(__file__).parent / "elsewhere" / "bf16.cpp"
    flags = ("-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror")
    subprocess.run([*WITH_BF16.compiler, *flags, str(source), "-o", str(made)], check=True)
    return made


EDGES = (0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F7F8000, 0x7F800000, 0x7F800001, 0x7FC12345, 0x3F800000, 0x8000)


def operand(rng: np.random.Generator) -> Words:
    """A vector of every kind of number: the ends of each kind among them, and factors whose product is next to none."""
    some = rng.integers(0, 1 << 32, (3, 16), dtype=np.uint32)
    kinds = (
        some[0],
        rng.standard_normal(16, np.float32).view(np.uint32),
        some[1] & 0xFFFF0000 | 0x8000,  # as far from one bfloat16 as from the next
        rng.choice(np.array(EDGES, np.uint32), 16) | some[1] & 0x80000000,
        some[2] & 0x83FF83FF | 0x1C001C00,  # both halves between 2^-71 and 2^-63
    )
    return np.choose(rng.choice(5, 16, p=[0.15, 0.35, 0.1, 0.2, 0.2]), kinds).astype(np.uint32)


@pytest.mark.parametrize("name", NAMES)
def test_instruction(name: str, interpreter: Path, tmp_path: Path) -> None:
    """Each operand, length and mask: the bits of the whole register, and nothing but these bits."""
    library, rng = ctypes.CDLL(str(interpreter)), np.random.default_rng(7)
    library.interpreted.restype = ctypes.c_int64
    listed = [form for form in forms() if form.name == name]
    for form, execute in zip(listed, build(listed, WITH_BF16.compiler, tmp_path), strict=True):
        for _ in range(3):
            target, first, second = (operand(rng) for _ in range(3))
            mask, before = int(rng.integers(1 << 32)), library.interpreted()
            wanted = form.expected(target, first, second, mask)
            execute(target.ctypes.data, first.ctypes.data, second.ctypes.data, mask)
            assert library.interpreted() == before + 1
            # Which NaN comes of several is told nowhere else than in a table of Intel's.
            both_nan = (name == "vdpbf16ps") & np.isnan(wanted.view(np.float32)) & np.isnan(target.view(np.float32))
            assert ((target == wanted) | both_nan).all(), f"{form}: {target}, expected {wanted}"


OTHERS = {
    "ud2": "0f0b",
    "W = 1": "62f2e60852d4",
    "another map": "62f1660852d4",
    "another opcode": "62f2660853d4",
    "another prefix": "62f2640852d4",
    "no such length": "62f2666852d4",
    "zeroing without a mask": "62f2668852d4",
    "rounding of registers": "62f2661852d4",
    "an operand too many": "62f2660872d4",
}


@pytest.mark.parametrize("code", OTHERS.values(), ids=OTHERS)
def test_other_instructions_stay_illegal(code: str, interpreter: Path) -> None:
    """The handler that was there before gets them."""
    program = f"""
import ctypes, faulthandler, mmap
faulthandler.enable()
ctypes.CDLL({str(interpreter)!r})
memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
memory.write(bytes.fromhex({code!r}) + b"\\xc3")
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGILL
    assert "Illegal instruction" in done.stderr
