"""The programs in benchmarks/ run, as small as they can be, and write what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import bubble
from benchmarks.session import Session
from ringattn.parallel import plan_pipeline
from tests.harness.launch import launch
from tests.harness.ranks import RankPool

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train(tmp_path: Path) -> None:
    flags = ["--context", "256", "--steps", "2", "--layers", "1", "--dim", "32", "--heads", "2", "--kv-heads", "1"]
    told = launch("benchmarks.train", *flags, "--out", str(tmp_path))
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
    numbers = 256 * 32 * 2 + 3 * 32 * 32 + 9 * 32 * 32 + 3 * 32  # of weights: ends, attention, feed-forward, norms
    fsdp, ring = together["sent"]["fsdp"], together["sent"]["ring"]
    # Half of each weight is gathered forward and backward, half of each gradient sent; fp32.
    assert fsdp["all-gather"] == [2 * numbers * 4 // 2] * 2
    assert fsdp["reduce-scatter"] == [numbers * 4 // 2] * 2
    assert ring["message"] == [3 * 128 * 2 * 16 * 4] * 2  # 128 rows of keys and values forward, back with gradients
    for memory in ("state_mib", "peak_mib"):
        assert all(0 < of_rank < alone[memory][0] for of_rank in together[memory])
    assert together["state_mib"][0] == pytest.approx(3 * numbers * 4 / 2 / 2**20, rel=1e-3)
    steps = lines(tmp_path / "steps.jsonl")
    assert [step["loss"] for step in steps] == together["losses"]
    assert all(step["tokens_per_s"] > 0 for step in steps)


def test_mixes(tmp_path: Path) -> None:
    """Stages with experts, on packed documents and windows; experts spread; what the axes send by formula."""
    mixes = ["pp=2,schedule=gpipe,experts=4", "dp_shard=2,ep=2,experts=4", "dp_replicate=2"]
    flags = ["--context", "48", "--sequences", "4", "--micro-batches", "2", "--steps", "2", "--layers", "2"]
    flags += ["--dim", "16", "--heads", "2", "--kv-heads", "1", "--documents", "12", "--window", "7"]
    told = launch("benchmarks.mixes", "--mixes", *mixes, *flags, "--out", str(tmp_path))
    staged, spread, copied = lines(tmp_path / "mixes.jsonl")
    for record in (staged, spread, copied):
        assert record["mix"] in told
        assert record["difference"] < 1e-4
    assert 0 < staged["bubble"] < 1
    assert staged["theory"] == pytest.approx(1 / 3)
    assert staged["sent"]["pp"]["message"] == [4 * 48 * 16 * 4] * 2  # hidden rows one way, their gradients the other
    rows = 2 * 48 * 2  # of a rank; each goes to two experts
    most = 2 * 2 * 2 * rows * 16 * 4  # two layers, there and back, and so in backward
    assert 0 < sum(spread["sent"]["ep"]["all-to-all"]) < 2 * most
    numbers = 256 * 16 * 2 + 2 * (3 * 16 * 16 + 9 * 16 * 16 + 2 * 16) + 16
    gradients = 2 * numbers * 4  # after each of two micro-batches
    assert copied["sent"]["dp_replicate"]["all-reduce"] == pytest.approx([gradients] * 2, abs=100)
    assert (tmp_path / "mixes.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("kv_heads", ["2", "1"])
def test_attention(tmp_path: Path, kv_heads: str) -> None:
    flags = ["--lengths", "256", "--rounds", "1", "--warmup", "0", "--heads", "2", "--kv-heads", kv_heads]
    launch("benchmarks.attention", *flags, "--dtypes", "float32", "--out", str(tmp_path))
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
    told = launch("benchmarks.choice", *flags, "--out", str(tmp_path))
    *records, summary = lines(tmp_path / "choice.jsonl")
    names = [record["exchange"] for record in records]
    assert names[0] == "zigzag ring, documents ignored"
    assert names[-1] == "auto"
    assert {"ring", "gather", "gather in 4 stages", "ulysses"} <= set(names)
    assert {record["chosen"] for record in records} == {summary["chosen"]}
    assert summary["auto_times_ignoring"] == records[-1]["times_ignoring"]
    assert summary["best"] in names
    assert summary["auto_over_best"] > 0
    unpredicted = {names[0], "ulysses in 2 stages"}  # no rank has two heads here
    for record in records:
        assert record["median_s"] > 0
        assert record["exchange"] in unpredicted or record["predicted_s"] > 0
    assert "->" in told


def waited(group: dist.ProcessGroup) -> dict[str, Any]:
    here = Session(group.rank(), group.size(), torch.device("cpu"))
    course = plan_pipeline("zbv-zero-bubble", 8, group.size(), 7)
    record, actions = bubble.measure(here, course, unit_s=2e-3, rounds=1)
    assert [len(moves) for moves in actions] == [2 * 3 * 7] * 4
    return record


@pytest.mark.long
def test_bubble(pool: RankPool) -> None:
    for record in pool.run(waited, 4):
        assert record["theory"] == pytest.approx(1 / 15)
        assert 0 < record["bubble"] < 1
        assert record["step_s"] > (2 * 3 * 7 + 3) * 1e-3


def test_bubbles_are_held_against_theory() -> None:
    theory = {"1f1b": 0.27, "interleaved-1f1b": 0.16, "zbv-zero-bubble": 0.06}
    good = [{"schedule": name, "micro_batches": 8, "bubble": idle, "theory": idle} for name, idle in theory.items()]
    bubble.check(good, 0.2)
    with pytest.raises(SystemExit, match=r"zbv-zero-bubble: 8.0% beside 6.0%$"):
        bubble.check([*good[:2], {**good[2], "bubble": 0.08}], 0.2)
    with pytest.raises(SystemExit, match=r"interleaved-1f1b idles 16.0%, 1f1b 13.0%$"):
        bubble.check([{**good[0], "bubble": 0.13}, *good[1:]], 0.6)


def test_decode(tmp_path: Path) -> None:
    flags = ["--tokens", "600", "9000", "--torch-up-to", "600", "--heads", "4", "--kv-heads", "2", "--head-dim", "16"]
    told = launch("benchmarks.decode", *flags, "--rounds", "2", "--merge-rounds", "2", "--out", str(tmp_path))
    records = lines(tmp_path / "decode.jsonl")
    merging, capacity, length = ([r for r in records if r["kind"] == kind] for kind in ("merge", "capacity", "length"))
    ways = {"packed all-gather", "packed all-to-all", "three all-reduces", "three all-reduces, two at once"}
    assert {r["contender"] for r in merging} == ways
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
