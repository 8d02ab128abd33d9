"""`import ringattn` costs little more than `import torch`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MOST = 1.2
ROUNDS = 5
# Modules that take long to import, and that no program needs before it compiles, shards weights or builds a kernel.
SLOW = ("setuptools", "sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "transformers", "triton")
MEASURE = """
import resource
import {module}
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime)
"""


def output_of(program: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_cpu_seconds() -> None:
    """The fastest of several runs, taken in turn: other load can only slow a run down."""
    seconds: dict[str, list[float]] = {"torch": [], "torch, ringattn": []}
    for _ in range(ROUNDS):
        for module, runs in seconds.items():
            runs.append(float(output_of(MEASURE.format(module=module))))
    torch_s, ringattn_s = map(min, seconds.values())
    assert ringattn_s <= MOST * torch_s


def test_slow_modules_are_imported_when_they_are_needed() -> None:
    """Not even all public names of the package need them."""
    program = f"from ringattn import *; import torch, sys; print(*(set({SLOW}) & sys.modules.keys()) or ['none'])"
    assert output_of(program).split() == ["none"]


EXPORT = """
import sys, torch
from ringattn import causal, ring_attention
class Model(torch.nn.Module):
    def forward(self, q, k, v):
        return ring_attention(q, k, v, mask=causal())
torch.manual_seed(0)
inputs = tuple(torch.randn(3, 1, 7, 2, 8))
torch.export.save(torch.export.export(Model(), inputs), sys.argv[1])
torch.save((inputs, Model()(*inputs)), sys.argv[2])
"""
LOAD = """
import sys, torch
import ringattn
program = torch.export.load(sys.argv[1])
inputs, expected = torch.load(sys.argv[2])
assert torch.equal(program.module()(*inputs), expected)
"""


@pytest.mark.compile
def test_the_operators_of_an_exported_program_are_registered(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("program.pt2", "tensors.pt")]
    for program in (EXPORT, LOAD):
        output_of(program, *files)
