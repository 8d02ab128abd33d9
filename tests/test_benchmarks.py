"""The programs in benchmarks/ run, as small as they can be, and write what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"


def torchrun(module: str, *flags: str) -> str:
    """Runs a module on two ranks and returns what it printed."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        module,
        *flags,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train(tmp_path: Path) -> None:
    flags = ["--context", "256", "--steps", "2", "--layers", "1", "--dim", "32", "--heads", "2", "--kv-heads", "1"]
    told = torchrun("benchmarks.train", *flags, "--out", str(tmp_path))
    for name in ("losses.png", "timeline.png"):
        picture = (tmp_path / name).read_bytes()
        assert picture.startswith(PNG)
        assert len(picture) > 2000
    together, alone = lines(tmp_path / "train.jsonl")
    assert (together["run"], alone["run"]) == ("2 ranks", "1 process")
    assert len(together["losses"]) == len(alone["losses"]) == 2
    for a, b in zip(together["losses"], alone["losses"], strict=True):
        assert 1.0 < b < 10.0
        assert abs(a - b) < 1e-4 * b
    assert "losses equal to" in told


@pytest.mark.parametrize("kv_heads", ["2", "1"])
def test_attention(tmp_path: Path, kv_heads: str) -> None:
    flags = ["--lengths", "256", "--rounds", "1", "--warmup", "0", "--heads", "2", "--kv-heads", kv_heads]
    torchrun("benchmarks.attention", *flags, "--dtypes", "float32", "--out", str(tmp_path))
    records = lines(tmp_path / "speed.jsonl")
    assert {record["contender"] for record in records} >= {
        "torch, one process",
        "ringattn, one process",
        "ringattn, ring",
    }
    assert {record["backward"] for record in records} == {False, True}
    for record in records:
        assert record["seq_len"] == 256
        assert record["ranks"] == 2
        assert record["median_s"] > 0
        assert len(record["rounds_s"]) == 1
        assert record["ratio"] == 1.0 or record["contender"] != "torch, one process"


def test_choice(tmp_path: Path) -> None:
    flags = ["--seq-len", "512", "--shortest", "8", "--longest", "128", "--heads", "2", "--kv-heads", "2"]
    flags += ["--seeds", "0", "--rounds", "1", "--warmup", "0", "--head-dim", "16", "--measure"]
    told = torchrun("benchmarks.choice", *flags, "--out", str(tmp_path))
    records = lines(tmp_path / "choice.jsonl")
    names = [record["exchange"] for record in records]
    assert names[0] == "zigzag ring, documents ignored"
    assert names[-1] == "auto"
    assert {"ring", "gather", "gather in 4 stages", "ulysses"} <= set(names)
    assert len({record["chosen"] for record in records}) == 1
    unpredicted = {names[0], "ulysses in 2 stages"}  # no rank has two heads here
    for record in records:
        assert record["median_s"] > 0
        assert record["exchange"] in unpredicted or record["predicted_s"] > 0
    assert "->" in told


def test_decode(tmp_path: Path) -> None:
    flags = ["--tokens", "600", "9000", "--torch-up-to", "600", "--heads", "4", "--kv-heads", "2", "--head-dim", "16"]
    told = torchrun("benchmarks.decode", *flags, "--rounds", "2", "--merge-rounds", "2", "--out", str(tmp_path))
    records = lines(tmp_path / "decode.jsonl")
    merging, capacity, length = ([r for r in records if r["kind"] == kind] for kind in ("merge", "capacity", "length"))
    assert {r["contender"] for r in merging} == {"packed all-gather", "packed all-to-all", "three all-reduces"}
    assert {r["contender"] for r in capacity} == {"just enough pages", "8 x the pages"}
    short = {r["contender"] for r in length if r["tokens"] == 600}
    assert short - {r["contender"] for r in length if r["tokens"] == 9000} == {
        "torch, one process",
        "torch, heads packed as rows",
    }
    kernel = [r for r in length if r["contender"] == "the kernel alone"]
    assert [r["bytes"] for r in kernel] == [
        19 * 16 * 128,
        282 * 16 * 128,
    ]  # whole pages of 16 tokens, on the first rank
    for record in records:
        assert record["ranks"] == 2
        assert 0 < record["min_s"] <= record["median_s"]
        assert record.get("error", 0.0) < 0.02
    assert "three all-reduces" in told
    assert (tmp_path / "decode.png").read_bytes().startswith(PNG)
