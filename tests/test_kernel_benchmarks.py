"""The benchmarks of the kernels count right, notice who computes something else, and say what they measured."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ringattn
from benchmarks import goals, kernel_baselines, kernels, paged, simulated_ring
from benchmarks.goals import Goal, judge
from benchmarks.kernel_baselines import FLASH_ATTN, dense_mask, square
from benchmarks.kernel_cases import (
    CASES,
    LONGEST,
    NARROW,
    RING_RANK,
    RING_RANKS,
    SHORTEST,
    Problem,
    document_lengths,
    flops,
)
from benchmarks.registry import main
from benchmarks.runner import DeviceClock
from ringattn.geometry.tiles import Tiles
from ringattn.kernels import BACKENDS
from ringattn.kernels.reference import ReferenceKernel
from tests.geometry.brute import tile_counts
from tests.test_benchmarks import PNG, ROOT, lines

CPU = torch.device("cpu")
LENGTHS = (1, 2, 8, 37, 96, 300)


@pytest.fixture
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs nothing twice for the sake of good figures."""
    monkeypatch.setattr(DeviceClock, "MIN_S", 0.0)


def _positions(rank: int, seq_len: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Of a zigzag rank, by its definition: runs r and 2W - 1 - r of 2W, the longer ones first."""
    runs = np.array_split(np.arange(seq_len * RING_RANKS), 2 * RING_RANKS)
    return np.concatenate([runs[rank], runs[2 * RING_RANKS - 1 - rank]])


def _allowed(case: str, n: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Each case's pairs by definition, without tiles, masks or plans."""
    i, j = np.arange(n)[:, None], np.arange(n)[None, :]
    if case == "full":
        return np.ones((n, n), dtype=bool)
    if case in ("window", "window-narrow"):
        return np.asarray((j <= i) & (j > i - (NARROW if case == "window-narrow" else max(1, n // 8))))
    if case == "packed-short":
        return np.asarray((j <= i) & (j // SHORTEST == i // SHORTEST))
    if case == "packed":
        document = np.repeat(np.arange(len(document_lengths(n))), document_lengths(n))
        return np.asarray((j <= i) & (document[:, None] == document))
    source = {"causal": None, "ring-own": 0, "ring-upper": -1, "ring-lower": 1}[case]
    if source is None:
        return np.asarray(j <= i)
    q, k = _positions(RING_RANK, n), _positions(RING_RANK + source, n)
    return np.asarray(k[None, :] <= q[:, None])


def _problem(case: str, seq_len: int, *, backward: bool = False) -> Problem:
    return Problem(4, 2, 16, "float32", case, seq_len, backward, 1)


@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize("case", CASES)
def test_cases_hold_the_pairs_that_they_are_named_after(case: str, seq_len: int) -> None:
    wanted = _allowed(case, seq_len)
    problem = _problem(case, seq_len)
    assert (tile_counts(problem.pattern.tiles, 1, seq_len, seq_len)[0] == wanted).all()
    assert problem.area == wanted.sum()
    if wanted.any():
        assert (dense_mask(problem.pattern.tiles, seq_len, CPU).numpy() == wanted).all()


def test_operations_are_counted_pair_by_pair() -> None:
    """Two products forward, q·k and p·v; five backward: q·k again, dout·v, dq, dk, dv. Each takes 2 D operations."""
    area = int(_allowed("window", 37).sum())
    problem = _problem("window", 37)
    assert problem.flops == flops(area, 4, 16, backward=False) == sum(2 * 2 * 16 for _ in range(4 * area))
    assert _problem("window", 37, backward=True).flops == sum(5 * 2 * 16 for _ in range(4 * area))


@pytest.mark.parametrize("seq_len", [1, 2, 7, 100, 2048, 8192, 65536, 100_003])
def test_documents_fill_the_sequence(seq_len: int) -> None:
    lengths = document_lengths(seq_len)
    assert sum(lengths) == seq_len
    assert min(lengths) >= 1
    assert max(lengths) <= max(1, seq_len // 4)
    assert lengths == document_lengths(seq_len)


def test_documents_have_a_long_tail() -> None:
    lengths = sorted(document_lengths(65536))
    assert (lengths[0], lengths[-1]) == (SHORTEST, LONGEST)
    assert lengths[len(lengths) // 2] < sum(lengths) / len(lengths) < LONGEST / 4


def test_square() -> None:
    expected = {"causal": True, "full": False, "ring-own": True, "ring-upper": False, "ring-lower": False}
    for case in CASES:
        assert square(_problem(case, 300).pattern.tiles) is expected.get(case)


TINY = ["--device", "cpu", "--lengths", "96", "--heads", "2", "--kv-heads", "1", "--head-dims", "16", "--warmup", "0"]
TINY += ["--rounds", "2", "--threads", "1", "--dtypes", "float32"]


@pytest.mark.usefixtures("_hasty")
def test_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["kernels", *TINY, "--out", str(tmp_path), "--backends", *BACKENDS])
    told = capsys.readouterr().out
    records = lines(tmp_path / "kernels.jsonl")
    measured = [r for r in records if "left_out" not in r]
    assert (tmp_path / "kernels.png").read_bytes().startswith(PNG)
    for case in CASES:
        for backward in (False, True):
            here = [r for r in measured if (r["case"], r["backward"]) == (case, backward)]
            names = {r["contender"] for r in here}
            torch_ways = {
                "packed": {"torch, dense mask", "torch, padded", "torch, a call for each document"},
                "window": {"torch, dense mask"},
            }.get(case, {"torch"})
            assert names >= {"matmul", "sdpa", "reference", *torch_ways}, (case, backward)
            assert case in told
            best = min((r for r in here if r["kind"] == "torch"), key=lambda r: r["median_s"])["contender"]
            for record in here:
                _check_record(record, case, best)
    for record in records:
        if "left_out" in record:
            assert record["left_out"]
            assert record["contender"] in told


def _check_record(record: dict[str, Any], case: str, best: str) -> None:
    assert len(record["rounds_s"]) == 2
    assert record["flop_per_s"] == pytest.approx(record["flops"] / record["median_s"])
    assert record["baseline"] == best
    if record["contender"] == "matmul":
        assert record["of_matmul"] == 1.0
        assert record["times_torch"] is None
        assert record["of_dense"] is None
        return
    area = int(_allowed(case, 96).sum())
    assert record["area"] == area
    assert record["flops"] == 4 * area * 2 * 16 * (2.5 if record["backward"] else 1)
    assert record["of_matmul"] > 0
    assert record["times_torch"] == 1.0 or record["contender"] != best
    if case == "causal":
        assert record["of_dense"] == 1.0
    elif record["kind"] == "backend":
        assert record["of_dense"] > 0


def test_who_computes_something_else_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(ReferenceKernel):
        name = "forgetful"

        def forward(self, *args: Any, **kwargs: Any) -> None:
            args = tuple(Tiles(x.table[1:]) if isinstance(x, Tiles) else x for x in args)
            super().forward(*args, **kwargs)

    class Broken(ReferenceKernel):
        name = "broken"

        def forward(self, *args: Any, **kwargs: Any) -> None:
            raise KeyError("no such\nthing")

    for kernel in (Forgetful(), Broken()):
        monkeypatch.setitem(BACKENDS, kernel.name, kernel)
    for backward in (False, True):
        problem = _problem("packed", 96, backward=backward)
        found, refused = kernels.entries(problem, CPU, ["forgetful", "reference", "broken", "cudnn"])
        assert "computed something else" in refused["forgetful"]
        assert refused["broken"].startswith("KeyError")
        assert "reference" in {entry.contender.name for entry in found}
        if not torch.cuda.is_available():
            assert refused["cudnn"] == "torch sees no CUDA device"


def _packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, window: tuple[int, int]
) -> Tensor:
    """(S, H, D) by plain maths, told as flash-attn is told: aligned to the last key, -1 for no bound."""
    rows, cols = torch.arange(len(q))[:, None], torch.arange(len(k))
    shift = rows + len(k) - len(q)
    seen = torch.bucketize(rows, cu_seqlens, right=True) == torch.bucketize(cols, cu_seqlens, right=True)
    if len(q) != len(k):
        seen = torch.ones_like(seen)
    if causal or window[1] == 0:
        seen &= cols <= shift
    if window[0] >= 0:
        seen &= cols >= shift - window[0]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


class _FlashAttn:
    """Stands for flash-attn where there is none; release 2 returns out, later ones (out, lse)."""

    @staticmethod
    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, causal: bool = False, window_size: tuple[int, int] = (-1, -1)
    ) -> Tensor | tuple[Tensor, None]:
        whole = torch.tensor([0, max(q.shape[1], k.shape[1])])
        return _packed_attention(q[0], k[0], v[0], whole, causal, window_size)[None], None

    @staticmethod
    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: bool = False,
    ) -> Tensor:
        assert cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_k.diff().max())
        return _packed_attention(q, k, v, cu_seqlens_k, causal, (-1, -1))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_baselines_that_need_a_gpu_are_called_right(case: str, backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their place something plain with their signatures, on the CPU: it must agree with torch in every case."""
    varlen = importlib.import_module("torch.nn.attention.varlen")
    signature = inspect.signature(varlen.varlen_attn)

    def varlen_attn(*args: object, **options: object) -> Tensor:
        told = signature.bind(*args, **options).arguments
        return _packed_attention(
            told["query"], told["key"], told["value"], told["cu_seq_k"], False, told["window_size"]
        )

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    for name in FLASH_ATTN.values():
        monkeypatch.setitem(sys.modules, name, _FlashAttn)
    problem = _problem(case, 96, backward=backward)
    every = [*kernel_baselines.baselines(problem, CPU), *kernel_baselines.cuda_baselines(problem, CPU)]
    names = {baseline.name for baseline in every}
    assert names >= set(FLASH_ATTN)
    assert ("torch varlen" in names) == case.startswith(("window", "packed"))
    tensors = problem.random(problem.seq_len, CPU)
    results = [[one.unpack(x.detach()) for x in kernels.baseline_work(one, problem, tensors)()] for one in every]
    assert not any(x.requires_grad for x in tensors)
    for baseline, found in zip(every, results, strict=True):
        for actual, expected in zip(found, results[0], strict=True):
            assert (actual - expected).abs().max() < 1e-5, baseline.name


@pytest.mark.parametrize("backward", [False, True])
def test_simulated_ring_computes_what_the_dense_call_does(backward: bool) -> None:
    case = simulated_ring.Case(4, 2, 8, "float64", 4, 24, backward, "reference", 1)
    tensors, steps = case.random(24, CPU, batch=4), case.steps()
    ring, dense = simulated_ring.Attention(case, tensors, steps), simulated_ring.whole(case, tensors)
    layout = ringattn.zigzag(96, 4)
    some, whole = ring.run(), dense.run()
    for index, expected in enumerate(whole):
        for rank in range(4):
            shard = some[index * 4 + rank]
            assert (shard - expected[:, torch.from_numpy(layout.positions(rank))]).abs().max() < 1e-12
    assert sum(tiles.area() for one in steps for _, tiles in one) == 96 * 97 // 2
    for one in steps:
        for _, tiles in one:
            single = simulated_ring.single_key(tiles)
            assert single.bounding_box.q == tiles.bounding_box.q
            assert single.area() == tiles.bounding_box.q.stop - tiles.bounding_box.q.start


@pytest.mark.usefixtures("_hasty")
def test_simulated_ring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--rows", "32", "--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--rounds", "1"]
    main(["simulated-ring", *flags, "--threads", "1", "--backends", *BACKENDS, "--out", str(tmp_path)])
    told = capsys.readouterr().out
    records = lines(tmp_path / "simulated_ring.jsonl")
    for name in BACKENDS:
        here = [r for r in records if r["backend"] == name]
        assert name in told
        if "left_out" in here[0]:
            continue
        assert [(r["backward"], r["step"]) for r in here] == [(b, s) for b in (False, True) for s in (None, *range(4))]
        for record in here:
            assert record["calls"] == (16 if record["step"] is None else 4)
            assert record["kernel_s"] > 0
            assert record["fixed_s"] > 0
            assert record["loss"] > -1
        assert here[0]["area"] == sum(r["area"] for r in here[1:5]) == 128 * 129 // 2


def _record(contender: str, rounds_s: list[float], **others: object) -> dict[str, Any]:
    plain = {"case": "causal", "seq_len": 8192, "dtype": "float32", "backward": False, "kind": "backend"}
    return {**plain, "contender": contender, "rounds_s": rounds_s, "median_s": sorted(rounds_s)[1], **others}


def test_goals_take_the_worst_of_the_rounds_medians() -> None:
    race_a = [_record("ours", [1.0, 2.0, 4.0]), _record("theirs", [2.0, 3.0, 4.0]), _record("slow", [9.0, 9.0, 9.0])]
    race_b = [_record("ours", [1.0, 1.0, 1.0], seq_len=4096), _record("theirs", [1.1, 1.1, 1.1], seq_len=4096)]
    goal = Goal("", "ours", {"case": "causal"}, ("theirs", "slow"), 1.2)
    (verdict,) = judge([goal], race_a)
    assert (verdict.value, verdict.num_records, verdict.word) == (1.5, 1, "met")
    (verdict,) = judge([goal], race_a + race_b)
    assert verdict.value == pytest.approx(1.1)
    assert (verdict.num_records, verdict.word) == (2, "MISSED")
    elsewhere = Goal("", "ours", {"case": ("window", "packed")}, ("theirs",), 1.0)
    alone = Goal("", "ours", {}, ("nobody",), 1.0)
    left_out = _record("ours", [1.0, 1.0, 1.0], case="window", left_out="too wide")
    assert [v.word for v in judge([elsewhere, alone], [*race_a, left_out])] == ["not measured", "not measured"]


def test_goals_beside_the_ways_of_torch() -> None:
    goal = Goal("", "ours", {}, ("padded", "dense mask"), 1.5)
    ours = _record("ours", [1.0, 1.0, 1.0])
    race = [
        _record("torch, padded", [4.0, 4.0, 4.0], kind="torch"),
        _record("torch, dense mask", [1.4, 1.4, 1.4], kind="torch"),
        _record("torch varlen", [0.1, 0.1, 0.1], kind="torch"),
        _record("another, padded", [0.1, 0.1, 0.1]),
    ]
    (verdict,) = judge([goal], [ours, *race])
    assert (verdict.value, verdict.word) == (1.4, "MISSED")


@pytest.mark.parametrize(("speed", "status", "word"), [(1.1, 0, "met"), (0.9, 1, "MISSED")])
def test_goals_program(
    speed: float, status: int, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some.jsonl"
    race = [_record("native", [1.0] * 3, head_dim=64), _record("torch", [speed] * 3, head_dim=64, kind="torch")]
    path.write_text("".join(json.dumps(record) + "\n" for record in race))
    with pytest.raises(SystemExit, match="1") if status else nullcontext():
        main(["goals", str(path), "--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert f"1 {word}" in told
    assert f"{len(goals.GOALS) - 1} not measured" in told


def test_goals_program_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    path.write_text("")
    with pytest.raises(SystemExit, match="1"):
        main(["goals", str(path), "--out", str(tmp_path)])


def test_gpu_script_goes_on_and_sums_up(tmp_path: Path) -> None:
    """With a Python whose programs all fail, but for the last one: each stage is tried, and the summary tells."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\ncase "$2" in *"sys.exit(failed)"*) exec "{sys.executable}" "$@";; esac\nexit 3\n')
    fake.chmod(0o755)
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHON": str(fake)}
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", out], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1, done.stderr
    stages = lines(out / "stages.jsonl")
    wanted = ["versions", "info", "contract", "paged_contract", "paged", "dense", "packed", "simulated_ring", "others"]
    assert [stage["stage"] for stage in stages[: len(wanted)]] == wanted
    assert all(stage["status"] == 3 for stage in stages[: len(wanted)])
    assert (out / "summary.txt").read_text().count("FAILED: exit status 3") >= len(wanted)
    assert sum(stage.get("limit_s", 0) for stage in stages) <= 600  # seconds


@pytest.mark.parametrize("page_size", [1, 16, 24])
def test_paged_problems_are_attended_right(page_size: int) -> None:
    """The GPU's program, on the CPU: its own check sees a right result, and a wrong one."""
    case = paged.Case(4, 2, 16, "float32", 100, page_size, 2)
    assert case.num_bytes == 2 * 2 * 100 * 2 * 16 * 4
    problem = paged.Problem(case, CPU)
    problem.attend("reference")
    assert problem.error() < 1e-5
    problem.out[0, 0, 1, 3] += 0.5
    assert problem.error() > 0.1


def test_paged_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["paged", "--device", "cpu", "--out", str(tmp_path)])


def test_packed_lengths_are_those_of_the_mask() -> None:
    pattern = _problem("packed", 200).pattern
    assert pattern.cu_seqlens is not None
    assert [b - a for a, b in pairwise(pattern.cu_seqlens)] == document_lengths(200)
