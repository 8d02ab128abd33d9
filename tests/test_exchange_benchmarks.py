"""The benchmark of exchanges, and the harness that puts ranks on a network of namespaces."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import exchanges, network
from benchmarks.exchanges import counted_messages
from benchmarks.namespaces import PREFIX, Link, Network
from benchmarks.registry import find, main, parse
from ringattn.comm.topology import rank_mesh
from tests.harness.launch import launch
from tests.harness.ranks import RankPool
from tests.test_benchmarks import PNG, ROOT, lines

FLAT = Network(f"{PREFIX}0-test", 3, 1, Link(200.0), Link())
TWO_LEVELS = Network(f"{PREFIX}0-test", 2, 2, Link(80.0), Link(800.0))
TINY = ["--layouts", "zigzag", "--masks", "causal", "--seq-len", "256", "--heads", "2", "--rounds", "1"]


def check_records(records: list[dict[str, Any]], ranks: int, names: set[str]) -> None:
    assert {(r["exchange"], r["direction"]) for r in records} == set(product(names, ("fwd", "bwd")))
    for r in records:
        assert r["ranks"] == ranks
        assert r["posted_bytes"] == r["planned_bytes"] > 0
        assert r["neither_s"] > 0.0
        assert 0.0 < r["copies_s"] < r["whole_s"]
        assert r["whole_s"] > 0.0
        assert r["exposed_s"] == pytest.approx(r["whole_s"] - r["compute_s"])  # of one round
        assert r["over_ideal"] == pytest.approx(r["whole_s"] / max(r["compute_s"], r["transfer_s"]))
        assert r["peak_bytes"] > 0


def test_exchanges(tmp_path: Path) -> None:
    names = ["ring", "gather-2", "ulysses", "hybrid"]
    told = launch("benchmarks", "exchanges", "--exchanges", *names, *TINY, "--warmup", "0", "--out", str(tmp_path))
    assert "hybrid is left out: 2 ranks make no mesh" in told
    check_records(lines(tmp_path / "exchanges.jsonl"), 2, {"ring", "gather-2", "ulysses"})
    assert (tmp_path / "exchanges.png").read_bytes().startswith(PNG)


def seconds_of_parts(group: dist.ProcessGroup) -> dict[str, float]:
    """How long the parts of a ring take whose kernels pretend to need a fifth of a second."""
    case = exchanges.Case(1, 1, 8, "float32", "contiguous", "full", "fwd", "ring", 64)
    flop = 4 * 8 * (64 // group.size()) * 64
    bench = exchanges.Bench(case, rank_mesh(group), torch.device("cpu"), gflops=flop / 0.2 / 1e9)
    seconds = {}
    for part, once in bench.parts.items():
        with counted_messages() as sent:
            start = time.perf_counter()
            once()
            seconds[part] = time.perf_counter() - start
        assert sum(sent) == (bench.planned if part in ("whole", "transfer") else 0)
    return seconds


def test_parts_leave_out_what_they_say(pool: RankPool) -> None:
    for seconds in pool.run(seconds_of_parts, 2):
        assert min(seconds["whole"], seconds["compute"]) > 0.2
        assert max(seconds["transfer"], seconds["neither"]) < 0.2


def test_names_of_exchanges() -> None:
    assert exchanges.exchange_spec("gather-12") == exchanges.ExchangeSpec("gather", 12)
    assert exchanges.exchange_spec("double-ring").axes == ("outer", "inner")
    for name in ("gather-0", "ring-2", "double-ring-2", "star", ""):
        with pytest.raises(ValueError, match="must be one of ring, double-ring"):
            exchanges.exchange_spec(name)


def shaped(net: Network) -> dict[str, str]:
    """The rate of what leaves through each device, by namespace and device."""
    found = {}
    for command in net.build():
        if "tbf" in command:
            namespace, device = command[2].rpartition("-")[2], command[command.index("dev") + 1]
            found[f"{namespace} {device}"] = command[command.index("rate") + 1]
    return found


def test_flat_network_is_shaped_at_both_ends_of_each_link() -> None:
    ends = [f"rank{r} eth0" for r in range(3)] + [f"switch rank{r}" for r in range(3)]
    assert shaped(FLAT) == dict.fromkeys(ends, "200.0mbit")


def test_two_levels_share_the_slow_links() -> None:
    inner = [f"rank{r} eth0" for r in range(4)] + [f"switch rank{r}" for r in range(4)]
    outer = [f"switch {end}{host}" for end in ("up", "down") for host in range(2)]
    assert shaped(TWO_LEVELS) == {**dict.fromkeys(inner, "800.0mbit"), **dict.fromkeys(outer, "80.0mbit")}
    plugged = {c[c.index("master") - 1]: c[c.index("master") + 1] for c in TWO_LEVELS.build() if "master" in c}
    assert [plugged[f"rank{r}"] for r in range(4)] == ["host0", "host0", "host1", "host1"]
    assert [plugged[f"{end}{host}"] for host in range(2) for end in ("up", "down")] == [
        "host0", "core", "host1", "core",
    ]  # fmt: skip


def test_nothing_is_done_outside_of_the_networks_own_namespaces() -> None:
    for net in (FLAT, TWO_LEVELS):
        for command in (*net.build(), *net.remove()):
            if command[:2] == ["ip", "netns"]:
                assert command[3] in net.namespaces
            else:
                assert command[1] == "-n"
                assert command[2] in net.namespaces
            for device in (word for word in command if word.startswith(("rank", "up", "down", "host"))):
                assert len(device) < 16  # the kernel's limit
        assert {c[3] for c in net.build() if c[:3] == ["ip", "netns", "add"]} == {c[3] for c in net.remove()}


def test_delay_stands_behind_the_rate() -> None:
    rate, delay = (c for c in Link(10.0, 2.5).shape("n", "d") if c[0] == "tc")
    assert rate[7:11] == ["root", "handle", "1:", "tbf"]
    assert delay[7:] == ["parent", "1:1", "handle", "2:", "netem", "delay", "2.5ms", "limit", "100000"]
    (delay,) = Link(None, 1.0).shape("n", "d")
    assert delay[7] == "root"


def test_ranks_are_told_what_torchrun_would_tell_them() -> None:
    told = TWO_LEVELS.environment(3)
    assert (told["RANK"], told["WORLD_SIZE"], told["LOCAL_RANK"], told["LOCAL_WORLD_SIZE"]) == ("3", "4", "1", "2")
    assert told["MASTER_ADDR"] == TWO_LEVELS.address(0) == "10.77.0.1"
    assert TWO_LEVELS.enter(3, ["x"]) == ["ip", "netns", "exec", f"{PREFIX}0-test-rank3", "x"]
    assert len({TWO_LEVELS.address(rank) for rank in range(600)}) == 600


def test_flags_of_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--hosts", "4", "--rate-mbit", "800", "--", "-m", "x", "--", "y"]
    _, given = parse(find("network"), flags)
    assert (given["hosts"], given["ranks_per_host"], given["rate_mbit"], given["inner_mbit"]) == (4, 1, 800.0, None)
    assert given["program"] == ["-m", "x", "--", "y"]
    for flags, told in (
        (["--hosts", "2"], "say what to run"),
        (["--inner-mbit", "5", "--", "x"], "for several ranks on a host"),
        (["--hosts", "0", "--", "x"], "from 1 to 64"),
        (["--rate-mbit", "-1", "--", "x"], "must be more than 0"),
        (["--delay-ms", "-1", "--", "x"], "must be 0 or more"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["network", *flags])
        assert told in capsys.readouterr().err + str(ended.value)


def test_only_namespaces_of_the_dead_are_abandoned() -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert network.is_abandoned(f"{PREFIX}{done.pid}-ab-rank0")
    assert not network.is_abandoned(f"{PREFIX}{os.getpid()}-ab-rank0")
    assert not network.is_abandoned("other-1-rank0")
    assert network.first_failure([None, 0, 3, 4]) == 3
    assert network.first_failure([0, 0]) == network.first_failure([None]) == 0


def test_a_signal_between_two_starts_leaves_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start_and_stop(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))
        signal.raise_signal(signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(Network, "enter", lambda self, rank, program: program)
    monkeypatch.setattr(subprocess, "Popen", start_and_stop)
    before = signal.signal(signal.SIGTERM, network.stop)
    try:
        with pytest.raises(SystemExit), network.running(FLAT, ["-c", "import time; time.sleep(60)"]):
            pass
        assert started
        assert [process.returncode for process in started] == [-signal.SIGKILL] * len(started)
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in started:
            process.kill()


@pytest.fixture(scope="module")
def _networks() -> None:
    reasons = network.missing()
    if reasons:
        pytest.skip("; ".join(reasons))


def own_namespaces(pid: int) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split() if name.startswith(f"{PREFIX}{pid}-")]


def start(*flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks", "network", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.usefixtures("_networks")
def test_devices_of_a_network_count_what_the_plan_says(tmp_path: Path) -> None:
    flags = ["--exchanges", "ring", "ulysses", *TINY, "--seq-len", "1024", "--warmup", "0", "--out", str(tmp_path)]
    harness = start(
        "--hosts", "2", "--rate-mbit", "500", "--timeout-s", "60", "--", "-m", "benchmarks", "exchanges", *flags
    )
    _, errors = harness.communicate(timeout=100)
    assert harness.returncode == 0, errors[-4000:]
    assert own_namespaces(harness.pid) == []
    records = lines(tmp_path / "exchanges.jsonl")
    check_records(records, 2, {"ring", "ulysses"})
    for r in records:
        assert 1.0 < r["device_bytes"] / r["planned_bytes"] < 1.15


@pytest.mark.usefixtures("_networks")
@pytest.mark.parametrize("ends_by", ["failure", "time", "interrupt", "termination"])
def test_nothing_is_left_of_a_network(ends_by: str) -> None:
    dies = "import os, sys, time; print('up', flush=True); time.sleep(0.2); sys.exit(7 * int(os.environ['RANK']))"
    stays = "import time; print('up', flush=True); time.sleep(60)"
    limit = "0.5" if ends_by == "time" else "50"
    harness = start("--hosts", "2", "--timeout-s", limit, "--", "-c", dies if ends_by == "failure" else stays)
    if ends_by in ("interrupt", "termination"):
        assert harness.stdout is not None
        assert harness.stdout.readline() == "up\n"
        assert len(own_namespaces(harness.pid)) == 3
        harness.send_signal(signal.SIGINT if ends_by == "interrupt" else signal.SIGTERM)
    _, errors = harness.communicate(timeout=30)
    assert own_namespaces(harness.pid) == []
    expected = {"failure": 7, "time": 124, "interrupt": 130, "termination": 128 + signal.SIGTERM}
    assert harness.returncode == expected[ends_by], errors


@pytest.mark.usefixtures("_networks")
def test_a_delay_without_netem_is_refused_in_words() -> None:
    harness = start("--hosts", "2", "--delay-ms", "1", "--timeout-s", "20", "--", "-c", "print('ran')")
    told, errors = harness.communicate(timeout=30)
    assert own_namespaces(harness.pid) == []
    if harness.returncode:
        assert "no delay without netem" in errors
    else:
        assert told == "ran\n"
