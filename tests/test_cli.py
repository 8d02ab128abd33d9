"""The command line."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata

import pytest
import torch

import ringattn
import ringattn.kernels as kernels
from ringattn import cli
from ringattn.kernels import BACKENDS, ProblemSpec, select
from ringattn.kernels.native import instruction_sets
from ringattn.kernels.paged import PAGED_BACKENDS
from ringattn.score import Score


@dataclass(frozen=True)
class Unavailable:
    """A kernel that cannot run here, for two reasons."""

    name: str = "broken"
    about: str = "made for this test"

    def available(self) -> list[str]:
        return ["no such device", "too old a driver"]

    def unsupported(self, call: ProblemSpec) -> list[str]:
        return ["not asked, as it cannot run at all"]


def table(patch: pytest.MonkeyPatch, backends: dict[str, object]) -> None:
    """Puts other backends in the place of those that there are, in this order."""
    for module in (cli, kernels):
        patch.setattr(module, "BACKENDS", backends)


def info(capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["info"]) == 0
    return capsys.readouterr().out


def test_info_lists_backends_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    listed = re.findall(r"^  (\d+)\. (\S+) +(available|unavailable: .+)$", info(capsys), re.MULTILINE)
    expected = [(str(i), name, kernel.available()) for i, (name, kernel) in enumerate(BACKENDS.items(), 1)]
    expected += [(str(i), name, paged.available()) for i, (name, paged) in enumerate(PAGED_BACKENDS.items(), 1)]
    assert listed == [(n, name, "unavailable: " + "; ".join(r) if r else "available") for n, name, r in expected]


def test_info_tells_which_transformers_there_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "requires", lambda name: ["torch>=2.11", 'transformers>=5.18; extra == "hf"'])
    assert f"hf        transformers {metadata.version('transformers')}; supported: >=5.18\n" in info(capsys)

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cli, "version", absent)
    assert "transformers is not installed: pip install 'ringattn[hf]'" in info(capsys)


def test_info_tells_every_reason(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    table(monkeypatch, {"broken": Unavailable(), **BACKENDS})
    told = info(capsys)
    assert re.search(r"^  1\. broken +unavailable: no such device; too old a driver$", told, re.MULTILINE)
    assert re.search(rf"^  2\. {next(iter(BACKENDS))} ", told, re.MULTILINE)
    assert "made for this test" in told


def test_info_tells_which_instructions_take_which_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    told = info(capsys)
    (line,) = re.findall(r"^ +our own C\+\+ for the CPU.*; (.*)$", told, re.MULTILINE)
    listed = {name: isa for isa, names in re.findall(r"(\w+) \(([\w, ]+)\)", line) for name in names.split(", ")}
    assert listed == {
        "fp32": instruction_sets(torch.float32)[0],
        "fp16": instruction_sets(torch.float16)[0],
        "bf16": instruction_sets(torch.bfloat16)[0],
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuDNN may be available here")
def test_info_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    told = info(capsys)
    assert re.search(r"^  \d\. cudnn +unavailable: torch sees no CUDA device$", told, re.MULTILINE)
    assert re.search(r"^cuda +no device$", told, re.MULTILINE)


def test_info_tells_versions_and_exchanges(capsys: pytest.CaptureFixture[str]) -> None:
    told = info(capsys)
    assert torch.__version__ in told
    assert ringattn.__version__ in told
    assert re.search(r"^exchange +.*gloo", told, re.MULTILINE)


def which(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    status = cli.main(["which", *flags])
    return status, capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_which_agrees_with_select(dtype: str, softcap: float | None, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--dtype", dtype, "--head-dim", "64", "--heads", "6", "--kv-heads", "2"]
    status, told = which(capsys, *flags, *(["--softcap", str(softcap)] if softcap else []))
    call = ProblemSpec("cpu", getattr(torch, dtype), 6, 2, 64, 64, True, Score(0.125, softcap))
    chosen = select(None, call).name
    assert status == 0
    assert told.startswith(f"backend=None takes '{chosen}':\n")
    assert re.search(rf"^  \d+\. {chosen} +runs it$", told, re.MULTILINE)
    assert told.count(" runs it") == 1
    listed = re.findall(r"^  (\d+)\. (\S+) ", told, re.MULTILINE)
    assert listed == [(str(i), name) for i, name in enumerate(BACKENDS, 1)]


def test_which_tells_every_reason(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    table(monkeypatch, {"broken": Unavailable(), **BACKENDS})
    status, told = which(capsys, "--device", "cpu")
    assert status == 0
    assert re.search(r"^  \d+\. broken +refuses: no such device; too old a driver$", told, re.MULTILINE)
    status, told = which(capsys, "--device", "cuda", "--dtype", "float64", "--head-dim", "512", "--softcap", "3")
    assert status == 0
    if not torch.cuda.is_available():
        assert re.search(r"^  \d+\. cudnn +refuses: torch sees no CUDA device$", told, re.MULTILINE)
    assert re.search(r"^  \d+\. sdpa +refuses: .*float64; has no softcap; .*512$", told, re.MULTILINE)


def test_which_fails_where_nobody_can(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    table(monkeypatch, {"broken": Unavailable()})
    status, told = which(capsys)
    assert status == 1
    assert told.startswith("no backend runs this call:\n  1. broken ")


WRONG_CALLS = [
    ["--heads", "6", "--kv-heads", "4"],
    ["--kv-heads", "0"],
    ["--dtype", "int8"],
    ["--head-dim", "x"],
    ["--softcap", "0"],
]


@pytest.mark.parametrize("flags", WRONG_CALLS)
def test_which_refuses_what_is_no_call(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["which", *flags])
    assert caught.value.code == 2
    told = capsys.readouterr()
    assert flags[0] in told.err
    assert told.out == ""


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["info", "more"], ["--nothing"], ["info", "--nothing"]])
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    told = capsys.readouterr()
    assert told.err.startswith("usage: ringattn")
    assert told.out == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == f"ringattn {ringattn.__version__}"


@pytest.mark.parametrize("arguments", [["--version"], ["which", "--device", "cpu"], ["which", "--dtype", "int8"]])
def test_python_m(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "ringattn", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    with pytest.raises(SystemExit) as caught:
        sys.exit(cli.main(arguments))
    printed = capsys.readouterr()
    assert (done.returncode, done.stdout, done.stderr) == (caught.value.code, printed.out, printed.err)
