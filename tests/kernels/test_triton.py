"""The Triton kernels without a GPU: the contract suite under triton's interpreter, in a process of its own.

The interpreter has to be on before triton is first imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from ringattn.kernels import BACKENDS, ProblemSpec
from ringattn.score import Score
from tests.kernels.contract_suite import CASES

pytest.importorskip("triton", reason="triton is made for Linux")

ROOT = Path(__file__).parents[2]
CONTRACT, INTERPRETED = "tests/kernels/test_contract.py", "tests/kernels/interpreted.py"
CALL = ProblemSpec("cpu", torch.float32, 2, 2, 16, 16, True, Score(0.3))
# Each line of the kernels is reached by these: the interpreter is slow.
QUICK = (
    "several tiles",
    "one row and one key",
    "grouped heads",
    "wide values",
    "strided with gradients of lse",
    "gradients held before",
    "large scale",
    "band of 300 rows, -250 to 250",
    "other values, bfloat16",
    "gradients of lse, float16",
    "softcap with gradients of lse",
    "softcap, bfloat16",
)


def interpret(report: Path, *arguments: str) -> ElementTree.Element:
    """Runs pytest under the interpreter; returns its report."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.kernels.interpreter", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"--junitxml={report}", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return ElementTree.parse(report).getroot()


def assert_all_ran(report: ElementTree.Element, count: int) -> None:
    """A suite of skips proves nothing: just so many ran, and passed."""
    totals = report.find("testsuite")
    assert totals is not None
    assert {name: totals.get(name) for name in ("tests", "skipped", "failures", "errors")} == {
        "tests": str(count), "skipped": "0", "failures": "0", "errors": "0",
    }  # fmt: skip


def node(name: str) -> str:
    return f"{CONTRACT}::test_case[{name}-triton-cpu]"


def test_quick_cases_and_beyond_the_contract(tmp_path: Path) -> None:
    assert_all_ran(interpret(tmp_path / "report.xml", INTERPRETED, *map(node, QUICK)), 7 + len(QUICK))


@pytest.mark.long
def test_every_other_case(tmp_path: Path) -> None:
    others = [case.name for case in CASES if case.name not in QUICK]
    assert_all_ran(interpret(tmp_path / "report.xml", *map(node, others)), len(others))


@pytest.mark.long
def test_random_tiles(tmp_path: Path) -> None:
    assert_all_ran(interpret(tmp_path / "report.xml", f"{CONTRACT}::test_random_tiles[triton]"), 1)


def test_never_runs_on_a_cpu_by_itself() -> None:
    kernel = BACKENDS["triton"]
    assert kernel.unsupported(CALL) == ["runs on cuda, not on cpu"]
    if not torch.cuda.is_available():
        assert kernel.available() == ["torch sees no GPU, and triton's interpreter is off"]


def test_is_told_what_it_refuses() -> None:
    call = replace(CALL, device_type="cuda", dtype=torch.float64, head_dim=257, score=Score(-1.0))
    reasons = BACKENDS["triton"].unsupported(call)
    assert len(reasons) == 3
    for words in ("float64", "257", "positive scale, not -1.0"):
        assert sum(words in reason for reason in reasons) == 1
    assert not BACKENDS["triton"].unsupported(replace(CALL, device_type="cuda", v_head_dim=256))


def test_the_package_does_without_triton() -> None:
    """Importing it imports no triton; and where there is none, it is said."""
    code = (
        "import sys; sys.modules['triton'] = None; import ringattn; from ringattn.kernels import BACKENDS; "
        "print(BACKENDS['triton'].available())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['triton is not installed']"
