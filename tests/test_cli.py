"""The command line."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch

import ringattn
from ringattn import cli
from ringattn.kernels import BACKENDS
from ringattn.kernels.native import instruction_sets


@dataclass(frozen=True)
class Unavailable:
    """A kernel that cannot run here, for two reasons."""

    name: str = "broken"
    about: str = "made for this test"

    def available(self) -> list[str]:
        return ["no such device", "too old a driver"]


def info(capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["info"]) == 0
    return capsys.readouterr().out


def test_info_lists_backends_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    listed = re.findall(r"^  (\d+)\. (\S+) +(available|unavailable: .+)$", info(capsys), re.MULTILINE)
    assert [(number, name) for number, name, _ in listed] == [(str(i), name) for i, name in enumerate(BACKENDS, 1)]
    for _, name, state in listed:
        reasons = BACKENDS[name].available()
        assert state == ("unavailable: " + "; ".join(reasons) if reasons else "available")


def test_info_tells_every_reason(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "BACKENDS", {"broken": Unavailable(), **BACKENDS})
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
