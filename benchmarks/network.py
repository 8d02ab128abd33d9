"""Runs a program's ranks on a network of given speed, made of Linux network namespaces on this machine.

    python -m benchmarks network --hosts 4 --rate-mbit 200 -- -m benchmarks exchanges --exchanges ring
    python -m benchmarks network --hosts 2 --ranks-per-host 2 --inner-mbit 1000 --rate-mbit 100 -- \\
        -m benchmarks exchanges --exchanges ring double-ring
    python -m benchmarks network --clean

The arguments after -- go to Python in each rank's namespace, with the environment that torchrun would set. Needs root
(CAP_NET_ADMIN and CAP_SYS_ADMIN), and `ip` and `tc` of iproute2; a delay needs a kernel with netem. The namespaces are
removed in any case; --clean removes the namespaces of a killed program.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

from benchmarks.namespaces import PREFIX, Link, Network
from benchmarks.registry import benchmark
from benchmarks.runner import Session

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE_S = 5.0  # after one rank has failed, for the others to fail with their own messages


def missing() -> list[str]:
    """Returns every reason why no namespace can be made here; empty if there is none."""
    if sys.platform != "linux":
        return [f"network namespaces need Linux, and this is {sys.platform}"]
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    reasons = []
    if absent:
        reasons.append(f"{' and '.join(absent)} not found: install iproute2 (Debian: apt-get install iproute2)")
    if os.geteuid() != 0:
        reasons.append("making namespaces needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN)")
    if reasons:
        return reasons
    probe = f"{_unique_name()}-probe"
    if error := _run(["ip", "netns", "add", probe]):
        return [f"network namespaces are forbidden on this machine: {error}"]
    try:
        limits = ("rate", "1mbit", "burst", "32768", "limit", "65536")
        error = _run(["tc", "-n", probe, "qdisc", "add", "dev", "lo", "root", "tbf", *limits])
        return [f"this kernel cannot shape links (tbf): {error}"] if error else []
    finally:
        _run(["ip", "netns", "delete", probe])


@contextmanager
def built(network: Network) -> Iterator[None]:
    """Builds a network, and removes it afterwards in any case.

    Raises:
        SystemExit: when a command fails, with its error.
    """
    try:
        for command in network.build():
            error = _run(command)
            if error and "netem" in command:
                raise SystemExit(f"no delay without netem (sch_netem), which this kernel does not have: {error}")
            if error:
                raise SystemExit(f"`{' '.join(command)}` failed: {error}")
        yield
    finally:
        for command in network.remove():
            _run(command)


def run(network: Network, program: Sequence[str], timeout_s: float) -> int:
    """Runs a program on every rank; returns the exit status of the first that failed, 124 after the timeout.

    Only rank 0 writes to stdout; all ranks write to stderr.
    """
    with built(network), running(network, program) as ranks:
        deadline = time.monotonic() + timeout_s
        while any(rank.poll() is None for rank in ranks):
            if time.monotonic() > deadline:
                print(f"stopped: the ranks took longer than {timeout_s:.0f} s", file=sys.stderr)
                return 124
            if first_failure(rank.poll() for rank in ranks):
                deadline = min(deadline, time.monotonic() + _GRACE_S)
                timeout_s = _GRACE_S
            time.sleep(0.05)
        return first_failure(rank.poll() for rank in ranks)


def first_failure(statuses: Iterable[int | None]) -> int:
    """Returns the first exit status that is neither 0 nor None, 0 if there is none."""
    return next((status for status in statuses if status), 0)


@contextmanager
def running(network: Network, program: Sequence[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Starts a program on every rank, and kills all of them afterwards in any case."""
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        with _deferred_signals():
            for rank in range(network.num_ranks):
                command = network.enter(rank, [sys.executable, *program])
                environment = {**os.environ, **network.environment(rank)}
                # A session for each: only this process gets an interrupt, and children of a rank are killed with it.
                out = None if rank == 0 else subprocess.DEVNULL
                ranks.append(subprocess.Popen(command, env=environment, stdout=out, start_new_session=True))
        yield ranks
    finally:
        for process in ranks:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """Raises signals at the end: a rank that was started but not yet listed would outlive this process."""
    received: list[int] = []
    before = {kind: signal.signal(kind, lambda kind, _: received.append(kind)) for kind in _ENDING}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    for number in received:
        signal.raise_signal(number)


def remove_abandoned() -> list[str]:
    """Removes the namespaces of processes that have ended, and returns their names."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    left = [name for name in (line.split()[0] for line in listed.splitlines() if line) if is_abandoned(name)]
    for name in left:
        _run(["ip", "netns", "delete", name])
    return left


def is_abandoned(namespace: str) -> bool:
    """Returns whether the process that made a namespace has ended."""
    pid = namespace.removeprefix(PREFIX).split("-")[0]
    return namespace.startswith(PREFIX) and pid.isdigit() and not os.path.exists(f"/proc/{pid}")


def _unique_name() -> str:
    return f"{PREFIX}{os.getpid()}-{secrets.token_hex(2)}"


def _run(command: list[str]) -> str:
    """Runs a command; returns its error if it failed, else an empty string."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return (done.stderr.strip() or f"exit status {done.returncode}") if done.returncode else ""


def stop(number: int, _: object) -> None:
    """Turns a signal into an exception, so that the namespaces are removed."""
    raise SystemExit(128 + number)


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 64:
        raise ValueError(f"{text}: must be a whole number from 1 to 64")
    return int(text)


def _rate(text: str) -> float:
    if not (rate := float(text)) > 0:
        raise ValueError(f"{text}: must be more than 0")
    return rate


def _delay(text: str) -> float:
    if (delay := float(text)) < 0:
        raise ValueError(f"{text}: must be 0 or more")
    return delay


@benchmark("network", help="runs a benchmark on network links of a given rate; needs root and iproute2")
def network(
    here: Session,
    program: Annotated[Sequence[str], "after --: arguments of Python, such as -m benchmarks exchanges"],
    hosts: Annotated[int, _count] = 2,
    ranks_per_host: Annotated[int, _count] = 1,
    rate_mbit: Annotated[float | None, _rate, "of each host's link; unlimited by default"] = None,
    inner_mbit: Annotated[float | None, _rate, "of each rank's link to its host, if a host has several ranks"] = None,
    delay_ms: Annotated[float, _delay, "at each end of a host's link; needs netem"] = 0.0,
    timeout_s: float = 600.0,
    clean: Annotated[bool, "remove the namespaces of killed programs, and end"] = False,
) -> None:
    """Runs a program."""
    if not clean and not program:
        raise SystemExit("say what to run, after --: for example -- -m benchmarks exchanges")
    if inner_mbit is not None and ranks_per_host == 1:
        raise SystemExit("--inner-mbit is for several ranks on a host: pass --ranks-per-host, or --rate-mbit instead")
    if reasons := missing():
        raise SystemExit("cannot make a network here: " + "; ".join(reasons))
    if clean:
        print(f"removed: {', '.join(remove_abandoned()) or 'nothing'}")
        return
    for number in _ENDING:
        signal.signal(number, stop)
    made = Network(_unique_name(), hosts, ranks_per_host, Link(rate_mbit, delay_ms), Link(inner_mbit))
    try:
        raise SystemExit(run(made, program, timeout_s))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
