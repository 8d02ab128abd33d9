"""How fast `avx512_bf16` should be, on a processor that lacks its instructions: by others that cost as much.

    python -m benchmarks.stand_in --out results/stand-in

Compiles the native kernel anew. In what the compiler made of it, an instruction that is here stands for each of
AVX512_BF16: with the same operands, and the ports that LLVM's model of Cooper Lake gives to that. What comes out is
nonsense. How long it takes, memory and softmax included, is a prediction: a share of the instruction's peak, beside the
share that the kernel for fp32 truly reaches of its own. Needs a processor with AVX-512 VNNI.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch.utils.cpp_extension import get_cxx_compiler

from benchmarks.kernel_cases import Problem
from benchmarks.kernels import backend_work
from benchmarks.measure import Contender, Lines, OneDevice, race
from ringattn.kernels import build
from ringattn.kernels.native import NativeKernel

ISAS = {"float32": "avx512", "bfloat16": "avx512_bf16"}

# A product and sum on either of two ports; conversions of two parts, mostly on one port.
STAND_INS = {"vdpbf16ps": "vpdpwssd", "vcvtneps2bf16": "vpmovdw", "vcvtne2ps2bf16": "vpermw"}

# As many sums at once as the kernels have, all zero; a round is one product for each of them.
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
SIZE = 1024  # of the matrices of a plain product


def built(folder: Path) -> ctypes.CDLL:
    """Compiles the sources with stand-ins, and has them taken for the native kernel in this process."""
    (folder / "cpu").mkdir()
    for file in (build.sources() / "cpu").iterdir():
        (folder / "cpu" / file.name).write_text(file.read_text())
    changed = folder / "cpu" / "avx512_bf16.cpp"
    compiler: str = get_cxx_compiler()  # type: ignore[no-untyped-call]
    command = [*shlex.split(compiler), *build.FLAGS, "-S", str(changed), "-o", "-"]
    assembly = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for lacking, instead in STAND_INS.items():
        assembly = re.sub(rf"\b{lacking}\b", instead, assembly)
    changed.write_text(f'asm(R"assembly({assembly})assembly");')
    (folder / "cpu" / "peaks.cpp").write_text(PEAKS)
    # All sets count as there: this is for processors that have AVX-512.
    flags = (*build.FLAGS, "-D__builtin_cpu_supports(name)=true")
    with mock.patch.object(build, "sources", return_value=folder):
        made = build.library("cpu", flags, folder)
    with mock.patch("ringattn.kernels.native.library", return_value=made):
        if reasons := NativeKernel().available():
            raise SystemExit(reasons[0])
    return ctypes.CDLL(str(made))


def contenders(library: ctypes.CDLL, problem: Problem) -> dict[str, tuple[Callable[[], object], float]]:
    """Each dtype's kernel and its peak, and how many operations they do."""
    found: dict[str, tuple[Callable[[], object], float]] = {}
    for dtype, isa in ISAS.items():
        given = replace(problem, dtype=dtype)
        # Zero is no subnormal number, whatever it is read as: these would be slow.
        tensors = [torch.zeros_like(x) for x in given.tensors(torch.device("cpu"))]
        found[dtype] = backend_work(NativeKernel(isa), given, tensors), given.flops
        peak = ctypes.CFUNCTYPE(None, ctypes.c_int64)((f"peak_{dtype}", library))
        found[f"peak of {dtype}"] = partial(peak, ROUNDS), float(OPERATIONS[dtype] * ROUNDS)
    square = torch.zeros(SIZE, SIZE)
    found["matmul of float32"] = partial(torch.mm, square, square), 2.0 * SIZE**3
    return found


def main() -> None:
    """Prints the table and writes the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/stand-in"))
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if "avx512_vnni" not in Path("/proc/cpuinfo").read_text().split():
        raise SystemExit("this processor has no AVX-512 VNNI, by whose instructions this measures")
    lines = Lines(options.out / "stand-in.jsonl")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        library = built(Path(folder))
        print("{:>4} {:9} {:18} {:>8} {:>8} {:>8}".format("D", "pass", "who", "GFLOP/s", "peak", "share"))
        for dim in options.head_dims:
            for backward in (False, True):
                problem = Problem("causal", options.seq_len, "float32", 2, 2, dim, backward, 1)
                given = contenders(library, problem)
                everyone = [Contender(name, work, 1) for name, (work, _) in given.items()]
                seconds = race(everyone, options.rounds, 1, lambda: None, OneDevice(torch.device("cpu")))
                # Whatever else runs here only ever makes it slower.
                rates = {name: operations / min(seconds[name]) for name, (_, operations) in given.items()}
                for name in (*ISAS, "matmul of float32"):
                    rate, peak = rates[name], rates[f"peak of {name.split()[-1]}"]
                    lines.add({**asdict(problem), "contender": name, "flop_per_s": rate, "peak": peak})
                    direction = "backward" if backward else "forward"
                    row = "{:4} {:9} {:18} {:8.1f} {:8.1f} {:8.2f}"
                    print(row.format(dim, direction, name, rate / 1e9, peak / 1e9, rate / peak), flush=True)


if __name__ == "__main__":
    main()
