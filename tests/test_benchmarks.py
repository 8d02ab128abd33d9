"""Every benchmark runs at its smallest size, and its records and figures are right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import bubble, registry
from benchmarks.runner import Contender, DeviceClock, Session, cell, time_in_turns
from ringattn.parallel.pipeline_schedule import plan_pipeline
from tests.harness.launch import launch
from tests.harness.ranks import RankPool

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
PNG = b"\x89PNG\r\n\x1a\n"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Benchmarks whose records are checked by tests of their own, here and in the other modules of this kind.
TESTED = {"train", "mixes", "attention", "auto-exchange", "decode", "bubble", "exchanges", "network"}
TESTED |= {"kernels", "simulated-ring", "goals", "paged"}
# The others: flags, and the number of records in each file.
ON_RANKS = {
    "masks": ("--seq-len 300 --rounds 1 --warmup 0", {"masks": 10}),
    "memory": ("--rows 32", {"memory": 8}),
    "accuracy": ("--seq-len 64", {"accuracy": 9}),
    "regret": ("--calls 2 --rounds 1 --warmup 0", {"regret": 2}),
}
IN_ONE_PROCESS = {
    "memory-around": (
        "--rows 64 --dim 8 --vocabulary 32 --inner 16 --chunks 16 --tiles 2 --dtypes float32 --rounds 1",
        {"memory_around": 4},
    ),
    "triton-report": ("--arch sm_90 --dtype bf16 --kernels paged", {"paged": 14}),
    "bf16-estimate": ("--seq-len 64 --head-dims 64 --rounds 1", {"bf16_estimate": 6}),
}


def test_all_benchmarks_are_tested(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(registry.all_benchmarks()) == TESTED | ON_RANKS.keys() | IN_ONE_PROCESS.keys()
    registry.main(["--list"])
    listed = capsys.readouterr().out
    assert all(f"{name} " in listed for name in registry.all_benchmarks())
    with pytest.raises(SystemExit, match="no such benchmark"):
        registry.main(["nothing"])


def run_on_rank(group: dist.ProcessGroup, name: str, flags: list[str]) -> None:
    chosen = registry.find(name)
    common, given = registry.parse(chosen, flags)
    chosen.function(Session(group.rank(), group.size(), CPU, common.out), **given)


@pytest.mark.parametrize("name", ON_RANKS)
def test_on_ranks(pool: RankPool, name: str, tmp_path: Path) -> None:
    flags, files = ON_RANKS[name]
    pool.run(run_on_rank, 4, name, [*flags.split(), "--out", str(tmp_path)])
    assert {file: len(lines(tmp_path / f"{file}.jsonl")) for file in files} == files


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] if n != "memory-around" else []) for n in IN_ONE_PROCESS]
)
def test_in_one_process(name: str, tmp_path: Path) -> None:
    if name == "triton-report":
        pytest.importorskip("triton")
    if name == "bf16-estimate" and "avx512_vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs AVX-512 VNNI")
    flags, files = IN_ONE_PROCESS[name]
    registry.main([name, *flags.split(), "--out", str(tmp_path)])
    assert {file: len(lines(tmp_path / f"{file}.jsonl")) for file in files} == files


def test_flags_follow_the_signature() -> None:
    chosen = registry.find("kernels")
    common, given = registry.parse(chosen, ["--lengths", "64", "128", "--device", "cpu", "--passes", "bwd"])
    assert (given["lengths"], given["passes"], common.device) == ([64, 128], ["bwd"], "cpu")
    common, given = registry.parse(registry.find("train"), ["--ring", "2", "--zero", "2", "--compile"])
    assert (given["axes"].ring, given["recipe"].zero, given["recipe"].compile) == (2, 2, True)
    assert common.ranks == 2
    with pytest.raises(SystemExit):
        registry.parse(registry.find("mixes"), ["--mixes", "star=2"])


def test_contenders_take_turns_and_warm_up() -> None:
    log: list[str] = []

    def contender(name: str) -> Contender:
        return Contender(name, lambda: log.append(name))

    def clock(work: Callable[[], object] | None) -> float:
        assert work is not None
        work()
        return float(len(log))

    seconds = time_in_turns([contender("a"), contender("b")], 2, 1, clock)
    assert log == ["b", "a", "a", "b", "b", "a"]
    assert seconds == {"a": [3.0, 6.0], "b": [4.0, 5.0]}


def test_short_work_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    clock = DeviceClock(CPU)
    assert 0 < clock(lambda: calls.append(1)) < 0.01
    assert len(calls) == DeviceClock.MAX_RUNS
    monkeypatch.setattr(DeviceClock, "MIN_S", 0.0)
    clock(lambda: calls.append(1))
    assert len(calls) == DeviceClock.MAX_RUNS + 1
    with pytest.raises(ValueError, match="work=None"):
        clock(None)


def test_cells_show_units() -> None:
    shown = {"a_s": 0.0123, "flop_per_s": 1.2e11, "peak_bytes": 3 << 20, "ratio": 1.23456, "rows": 12345, "none": None}
    assert [cell(name, value) for name, value in shown.items()] == [
        "12.3 ms", "120 G", "3.00 MiB", "1.235", "12,345", "",
    ]  # fmt: skip


def test_tables_show_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = Session(0, 1, CPU, tmp_path).records("some")
    records.add({"name": "a"}, {"loss": 1.5, "sent_mib": {"ring": 2.0}})
    records.add({"name": "b", "left_out": "why"})
    records.show("losses", "name loss:.2f sent_mib")
    told = capsys.readouterr().out.split("\n")
    assert told[1:6] == [
        "losses",
        "",
        "| name | loss | sent_mib |",
        "|------|------|----------|",
        "| a    | 1.50 | ring 2   |",
    ]
    assert lines(tmp_path / "some.jsonl") == [
        {"name": "a", "loss": 1.5, "sent_mib": {"ring": 2.0}},
        {"name": "b", "left_out": "why"},
    ]
    elsewhere = Session(1, 2, CPU, tmp_path).records("some")
    elsewhere.add({"name": "c"})
    elsewhere.show("losses", "name")
    assert elsewhere == []
    assert len(lines(tmp_path / "some.jsonl")) == 2


def test_train(tmp_path: Path) -> None:
    flags = ["--context", "256", "--steps", "2", "--layers", "1", "--dim", "32", "--heads", "2", "--kv-heads", "1"]
    told = launch("benchmarks", "train", *flags, "--out", str(tmp_path))
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
    told = launch("benchmarks", "mixes", "--mixes", *mixes, *flags, "--out", str(tmp_path))
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
    launch("benchmarks", "attention", *flags, "--dtypes", "float32", "--out", str(tmp_path))
    assert (tmp_path / "speed.png").read_bytes().startswith(PNG)
    records = lines(tmp_path / "attention.jsonl")
    assert {record["contender"] for record in records} >= {
        "torch, one process",
        "ringattn, one process",
        "ringattn, ring",
    }
    assert {record["pass"] for record in records} == {"fwd", "fwd+bwd"}
    for record in records:
        assert record["seq_len"] == 256
        assert record["ranks"] == 2
        assert record["median_s"] > 0
        assert len(record["rounds_s"]) == 1
        assert record["times_torch"] == 1.0 or record["contender"] != "torch, one process"


def test_auto_exchange(tmp_path: Path) -> None:
    flags = ["--seq-len", "512", "--shortest", "8", "--longest", "128", "--heads", "2", "--kv-heads", "2"]
    flags += ["--seeds", "0", "--rounds", "1", "--warmup", "0", "--head-dim", "16", "--measure"]
    told = launch("benchmarks", "auto-exchange", *flags, "--out", str(tmp_path))
    records, (summary,) = lines(tmp_path / "auto_exchange.jsonl"), lines(tmp_path / "goals.jsonl")
    names = [record["exchange"] for record in records]
    assert names[0] == "zigzag ring without document masks"
    assert names[-1] == "auto"
    assert {"ring", "gather", "gather in 4 stages", "ulysses"} <= set(names)
    assert {record["chosen"] for record in records} == {summary["chosen"]}
    assert summary["auto_times_unmasked"] == records[-1]["times_unmasked"]
    assert summary["best"] in names
    assert summary["auto_over_best"] > 0
    unpredicted = {names[0], "ulysses in 2 stages"}  # no rank has two heads here
    for record in records:
        assert record["median_s"] > 0
        assert record["exchange"] in unpredicted or record["predicted_s"] > 0
    assert "->" in told


def waited(group: dist.ProcessGroup) -> dict[str, Any]:
    here = Session(group.rank(), group.size(), CPU)
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
    told = launch("benchmarks", "decode", *flags, "--rounds", "2", "--merge-rounds", "2", "--out", str(tmp_path))
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
    assert [r["read_bytes"] for r in kernel] == [
        19 * 16 * 128,
        282 * 16 * 128,
    ]  # whole pages of 16 tokens, on the first rank
    for record in records:
        assert record["ranks"] == 2
        assert 0 < record["min_s"] <= record["median_s"]
        assert record.get("error", 0.0) < 0.02
    assert "three all-reduces" in told
    assert (tmp_path / "decode.png").read_bytes().startswith(PNG)
