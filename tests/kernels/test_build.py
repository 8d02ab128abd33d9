"""Compiling on first use: once for all, whole or not at all, and with a reason where it cannot be."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from ringattn.kernels import build
from ringattn.kernels.build import BuildError, library
from ringattn.kernels.native import NativeKernel
from tests.harness.ranks import starting

ROOT = Path(__file__).parents[2]
FLAGS = ("-O0", "-fPIC")  # the sources here are tiny
COMPILER = shutil.which("c++") or "c++"


@pytest.fixture
def csrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of a library `tiny`, in place of the real ones."""
    folder = tmp_path / "csrc"
    (folder / "tiny").mkdir(parents=True)
    (folder / "tiny" / "one.h").write_text("constexpr int ONE = 1;\n")
    (folder / "tiny" / "one.cpp").write_text('#include "one.h"\nextern "C" int one() { return ONE; }\n')
    (folder / "tiny" / "two.cpp").write_text('extern "C" int two() { return 2; }\n')
    monkeypatch.setattr(build, "sources", lambda: folder)
    return folder


def compiler(folder: Path, script: str) -> Path:
    """A program that counts its calls, a byte each, and then does as the script says."""
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\nprintf x >> "{folder}/calls"\n{script}\n')
    path.chmod(0o755)
    return path


def left_over(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("*/*"))


def test_builds_once(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, f'exec {COMPILER} "$@"')))
    built = library("tiny", FLAGS, tmp_path / "root")
    assert built.is_file()
    assert (tmp_path / "calls").read_text() == "xxx", "two sources, and the linking of them"
    assert library("tiny", FLAGS, tmp_path / "root") == built
    assert (tmp_path / "calls").read_text() == "xxx"
    assert left_over(tmp_path / "root") == ["library.so", "lock"]


@pytest.mark.parametrize("what", ["a source", "a header", "the flags"])
def test_builds_anew_when_something_changed(csrc: Path, tmp_path: Path, what: str) -> None:
    before = library("tiny", FLAGS, tmp_path / "root")
    flags = (*FLAGS, "-O1") if what == "the flags" else FLAGS
    if what != "the flags":
        file = csrc / "tiny" / ("one.cpp" if what == "a source" else "one.h")
        file.write_text(file.read_text() + "\n")
    after = library("tiny", flags, tmp_path / "root")
    assert after != before
    assert before.is_file()
    assert after.is_file()


def test_a_compiler_may_be_several_words(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = compiler(tmp_path, 'exec "$@"')
    monkeypatch.setenv("CXX", f"{wrapper} {COMPILER}")
    assert library("tiny", FLAGS, tmp_path / "root").is_file()


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (None, "there is no C++ compiler"),
        ("not executable", "cannot be started: Permission denied"),
        (
            "echo 'one.cpp:3:1: note: well'>&2; echo 'one.cpp:3:1: error: it rains'>&2; exit 1",
            "failed: one.cpp:3:1: error",
        ),
        ("exit 7", "(it says nothing)"),
        ("kill -9 $$", "failed"),
    ],
)
def test_a_compiler_that_fails(
    csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, told: str
) -> None:
    path = tmp_path / "nowhere" if script is None else compiler(tmp_path, script)
    if script == "not executable":
        path.chmod(0o644)
    monkeypatch.setenv("CXX", str(path))
    with pytest.raises(BuildError, match=re.escape(told)) as caught:
        library("tiny", FLAGS, tmp_path / "root")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert left_over(tmp_path / "root") == ["lock"]
    monkeypatch.setenv("CXX", COMPILER)
    assert library("tiny", FLAGS, tmp_path / "root").is_file(), "a failure is not remembered"


def test_missing_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "__file__", str(tmp_path / "ringattn" / "kernels" / "build.py"))
    with pytest.raises(BuildError, match="sources are missing"):
        library("cpu", FLAGS, tmp_path / "root")


def test_a_folder_that_cannot_be_written(csrc: Path, tmp_path: Path) -> None:
    """A file stands where the folder should be: what root, who may write anywhere, cannot get round either."""
    (tmp_path / "root").write_text("")
    with pytest.raises(BuildError, match=r"cannot build in .*root"):
        library("tiny", FLAGS, tmp_path / "root")


def build_there(csrc: Path, root: Path, cxx: Path) -> None:
    """What another process does: it writes down where the library is, in a file that is named after itself."""
    os.environ["CXX"] = str(cxx)
    build.sources = lambda: csrc
    (csrc / str(os.getpid())).write_text(str(library("tiny", FLAGS, root)))


def start(csrc: Path, root: Path, cxx: Path) -> BaseProcess:
    process = starting().Process(target=build_there, args=(csrc, root, cxx))
    process.start()
    return process


def test_processes_at_once_build_once(csrc: Path, tmp_path: Path) -> None:
    slow = compiler(tmp_path, f'sleep 0.5; exec {COMPILER} "$@"')
    both = [start(csrc, tmp_path / "root", slow) for _ in range(2)]
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    told = [(csrc / str(process.pid)).read_text() for process in both]
    assert told[0] == told[1]
    assert Path(told[0]).is_file()
    assert (tmp_path / "calls").read_text() == "xxx"


def test_a_build_that_is_killed(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves no library, and no lock: the next one builds, and clears away what was left."""
    root = tmp_path / "root"
    hangs = compiler(tmp_path, 'while [ "$2" ]; do shift; done; printf half > "$1"; exec sleep 2')
    process = start(csrc, root, hangs)
    deadline = time.monotonic() + 60
    while not list(root.glob("*/work-*/*.o")):
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join(60)
    assert "library.so" not in left_over(root)
    monkeypatch.setenv("CXX", COMPILER)
    assert library("tiny", FLAGS, root).stat().st_size > len("half")
    assert left_over(root) == ["library.so", "lock"]


WITHOUT = """
import warnings
import torch
import torch.distributed as dist
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import ringattn
    from ringattn.cli import main
    from ringattn.kernels import BACKENDS
    reasons = [BACKENDS["native"].available() for _ in range(3)]
    main(["info"])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 65, 2, 16)
    out = ringattn.ring_attention(q, k, v, mask=ringattn.causal())
    try:
        ringattn.ring_attention(q, k, v, backend="native")
    except ringattn.BackendError as error:
        print("REFUSED", error)
q, k, v = (x.transpose(1, 2) for x in (q, k, v))
wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
torch.testing.assert_close(out, wanted)
assert reasons[0] == reasons[1] == reasons[2] and len(reasons[0]) == 1, reasons
print("WARNED", [str(w.message) for w in caught if "ringattn" in str(w.message)])
"""


def test_without_a_compiler_all_else_works(tmp_path: Path) -> None:
    """One warning, a reason in `ringattn info` and in an error, and torch's kernels instead."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    reason = "there is no C++ compiler 'no-such-compiler' (g++ or clang++ will do; CXX names another)"
    assert re.search(rf"^  1\. native +unavailable: {re.escape(reason)}$", done.stdout, re.M)
    assert re.search(rf"^REFUSED .*{re.escape(reason)}", done.stdout, re.M)
    (warned,) = re.findall(r"^WARNED (.*)$", done.stdout, re.M)
    assert warned.count("ringattn works without its own CPU kernel") == 1
    assert left_over(tmp_path / "torch_extensions") == ["lock"]


# What betrays AVX-512: its registers, masks, and embedded broadcasts.
WIDE = re.compile(r"%zmm|%k[0-7]\b|%[xy]mm(1[6-9]|2\d|3[01])\b|\{1to\d|vpternlog|vscalef|vreduce")
AVX = re.compile(r"\tv[a-z]|%ymm")


@pytest.mark.skipif(shutil.which("objdump") is None, reason="there is no objdump")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="instruction sets of x86-64")
def test_instructions_stay_with_their_set() -> None:
    """A processor meets only instructions that it has: each set's stand in its own functions, and nowhere else."""
    assert not NativeKernel().available()
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(library("cpu"))]
    found: dict[str, set[str]] = {}
    owner = ""
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if started := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            named = re.search(r"ringattn::(avx512_bf16|avx512|avx2|emulated_bf16|portable)::", started[1])
            owner = named[1] if named else "the rest"
        kinds = found.setdefault(owner, set())
        if "dpbf16ps" in line:
            kinds.add("pairs")
        if WIDE.search(line):
            kinds.add("wide")
        if AVX.search(line):
            kinds.add("avx")
    assert found == {
        "": set(),
        "the rest": set(),
        "portable": set(),
        "emulated_bf16": set(),
        "avx2": {"avx"},
        "avx512": {"avx", "wide"},
        "avx512_bf16": {"avx", "wide", "pairs"},
    }
