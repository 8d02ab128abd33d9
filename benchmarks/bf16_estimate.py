"""Estimates the speed of the native kernel `avx512_bf16` on a processor that lacks AVX512_BF16.

The native kernel is compiled again. In the compiler's assembly, each AVX512_BF16 instruction is replaced by one that
this processor has, with the same operands and, in LLVM's model of Cooper Lake, the same ports. The results are wrong,
but the time, memory and softmax included, is an estimate. It is shown as a share of the instruction's peak, beside the
share that the fp32 kernel reaches of its own peak. Needs a processor with AVX-512 VNNI.
"""

from __future__ import annotations

import ctypes
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from torch.utils.cpp_extension import get_cxx_compiler

from benchmarks.kernel_cases import Problem
from benchmarks.kernels import backend_work
from benchmarks.registry import benchmark
from benchmarks.runner import Contender, Session
from ringattn.kernels import build
from ringattn.kernels.native import NativeKernel

ISAS = {"float32": "avx512", "bfloat16": "avx512_bf16"}

# A product and sum on either of two ports; conversions in two parts, mostly on one port.
REPLACEMENTS = {"vdpbf16ps": "vpdpwssd", "vcvtneps2bf16": "vpmovdw", "vcvtne2ps2bf16": "vpermw"}

# As many independent sums as the kernels have, all zero; a round is one product for each of them.
PEAKS = r"""
#include <cstdint>
#define SUMS "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23"
#define RUN(instruction) \
  asm volatile(".irp i,30,31," SUMS "\n vpxord %%zmm\\i, %%zmm\\i, %%zmm\\i\n.endr\n" \
               "1: .irp i," SUMS "\n" instruction " %%zmm30, %%zmm31, %%zmm\\i\n.endr\n dec %0\n jnz 1b" \
               : "+r"(rounds))
extern "C" {
__attribute__((visibility("default"))) void peak_float32(int64_t rounds) { RUN("vfmadd231ps"); }
__attribute__((visibility("default"))) void peak_bfloat16(int64_t rounds) { RUN("vpdpwssd"); }
}
"""
OPERATIONS = {"float32": 24 * 16 * 2, "bfloat16": 24 * 16 * 4}  # of a round
ROUNDS = 1_000_000
MATRIX_SIZE = 1024  # of a plain product


def _build(folder: Path) -> ctypes.CDLL:
    """Compiles the sources with replaced instructions, and makes this process use them as the native kernel."""
    (folder / "cpu").mkdir()
    for file in (build.sources() / "cpu").iterdir():
        (folder / "cpu" / file.name).write_text(file.read_text())
    changed = folder / "cpu" / "avx512_bf16.cpp"
    compiler: str = get_cxx_compiler()  # type: ignore[no-untyped-call]
    command = [*shlex.split(compiler), *build.FLAGS, "-S", str(changed), "-o", "-"]
    assembly = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for original, replacement in REPLACEMENTS.items():
        assembly = re.sub(rf"\b{original}\b", replacement, assembly)
    changed.write_text(f'asm(R"assembly({assembly})assembly");')
    (folder / "cpu" / "peaks.cpp").write_text(PEAKS)
    # Report every instruction set as present.
    flags = (*build.FLAGS, "-D__builtin_cpu_supports(name)=true")
    with mock.patch.object(build, "sources", return_value=folder):
        made = build.library("cpu", flags, folder)
    with mock.patch("ringattn.kernels.native.library", return_value=made):
        if reasons := NativeKernel().available():
            raise SystemExit(reasons[0])
    return ctypes.CDLL(str(made))


def _works(library: ctypes.CDLL, problem: Problem) -> dict[str, tuple[Callable[[], object], float]]:
    """Returns the kernel of each dtype and its peak, with the number of their operations."""
    found: dict[str, tuple[Callable[[], object], float]] = {}
    for dtype, isa in ISAS.items():
        typed = replace(problem, dtype=dtype)
        # Zeros, because they are not subnormal in any format: subnormal numbers would be slow.
        tensors = [torch.zeros_like(x) for x in typed.random(typed.seq_len, torch.device("cpu"))]
        found[dtype] = backend_work(NativeKernel(isa), typed, tensors), typed.flops
        peak = ctypes.CFUNCTYPE(None, ctypes.c_int64)((f"peak_{dtype}", library))
        found[f"peak of {dtype}"] = partial(peak, ROUNDS), float(OPERATIONS[dtype] * ROUNDS)
    square = torch.zeros(MATRIX_SIZE, MATRIX_SIZE)
    found["matmul of float32"] = partial(torch.mm, square, square), 2.0 * MATRIX_SIZE**3
    return found


@benchmark("bf16-estimate", help="estimated speed of avx512_bf16 on a processor without AVX512_BF16")
def bf16_estimate(here: Session, seq_len: int = 4096, head_dims: Sequence[int] = (64, 128), rounds: int = 7) -> None:
    """Measures every head dim and pass; rates are from the fastest round, since other load can only slow a round."""
    if "avx512_vnni" not in Path("/proc/cpuinfo").read_text().split():
        raise SystemExit("this processor has no AVX-512 VNNI, whose instructions are needed")
    records = here.records("bf16_estimate")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        library = _build(Path(folder))
        for dim, backward in product(head_dims, (False, True)):
            problem = Problem(2, 2, dim, "float32", "causal", seq_len, backward, 1)
            works = _works(library, problem)
            contenders = [Contender(name, work) for name, (work, _) in works.items()]
            seconds = here.time(f"D {dim}", contenders, rounds)
            speed = {name: operations / min(seconds[name]) for name, (_, operations) in works.items()}
            for name in (*ISAS, "matmul of float32"):
                peak = speed[f"peak of {name.split()[-1]}"]
                rates = {"flop_per_s": speed[name], "peak_per_s": peak, "of_peak": speed[name] / peak}
                records.add(asdict(problem), {"contender": name}, rates)
    records.show("bfloat16 is an estimate", "head_dim backward contender flop_per_s peak_per_s of_peak")
