"""Runs the ranks of a program on a network of given speed, made of Linux network namespaces on this machine.

    python -m benchmarks.network --hosts 4 --rate-mbit 200 -- -m benchmarks.exchanges --exchanges ring
    python -m benchmarks.network --hosts 2 --ranks-per-host 2 --inner-mbit 1000 --outer-mbit 100 -- \\
        -m benchmarks.exchanges --exchanges ring double-ring
    python -m benchmarks.network --clean

What follows -- is given to Python in each rank's namespace, with the environment that torchrun would give it. Needs
root (CAP_NET_ADMIN and CAP_SYS_ADMIN), and `ip` and `tc` of iproute2. Namespaces are removed whatever happens;
--clean removes those of harnesses that were killed. A delay needs a kernel with netem.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from benchmarks.namespaces import PREFIX, Link, Network

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE_S = 5.0  # for the other ranks to fail by themselves, with a message, after one has


def missing() -> list[str]:
    """Returns every reason why there can be no namespaces here; empty if there can."""
    reasons = []
    if sys.platform != "linux":
        return [f"network namespaces are Linux', and this is {sys.platform}"]
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if absent:
        reasons.append(f"{' and '.join(absent)} not found: install iproute2 (Debian: apt-get install iproute2)")
    if os.geteuid() != 0:
        reasons.append("making namespaces needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN)")
    if reasons:
        return reasons
    probe = f"{_unique()}-probe"
    made = _told(["ip", "netns", "add", probe])
    if made:
        return [f"this machine lets nobody make a network namespace: {made}"]
    try:
        limits = ("rate", "1mbit", "burst", "32768", "limit", "65536")
        shaped = _told(["tc", "-n", probe, "qdisc", "add", "dev", "lo", "root", "tbf", *limits])
        return [f"this kernel cannot shape links (tbf): {shaped}"] if shaped else []
    finally:
        _told(["ip", "netns", "delete", probe])


@contextmanager
def standing(network: Network) -> Iterator[None]:
    """Builds a network, and removes it afterwards, whatever happened.

    Raises:
        SystemExit: when a command fails, with what it said.
    """
    try:
        for command in network.build():
            said = _told(command)
            if said and "netem" in command:
                raise SystemExit(f"no delay without netem (sch_netem), which this kernel does not have: {said}")
            if said:
                raise SystemExit(f"`{' '.join(command)}` failed: {said}")
        yield
    finally:
        for command in network.remove():
            _told(command)


def run(network: Network, program: list[str], timeout_s: float) -> int:
    """Runs a program on every rank and returns the exit status: of the first that failed, 124 if time ran out.

    Rank 0 writes to this program's output; of the others only errors are shown.
    """
    with standing(network), running(network, program) as ranks:
        deadline = time.monotonic() + timeout_s
        while any(rank.poll() is None for rank in ranks):
            if time.monotonic() > deadline:
                print(f"stopped: the ranks took longer than {timeout_s:.0f} s", file=sys.stderr)
                return 124
            if failed(rank.poll() for rank in ranks):
                deadline = min(deadline, time.monotonic() + _GRACE_S)
                timeout_s = _GRACE_S
            time.sleep(0.05)
        return failed(rank.poll() for rank in ranks)


def failed(statuses: Iterable[int | None]) -> int:
    """Returns the first exit status that is neither success nor missing, 0 if none is."""
    return next((status for status in statuses if status), 0)


@contextmanager
def running(network: Network, program: list[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Starts a program on every rank; all are gone afterwards, whatever happened."""
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        with _signals_wait():
            for rank in range(network.num_ranks):
                command = network.enter(rank, [sys.executable, *program])
                environment = {**os.environ, **network.environment(rank)}
                # Sessions of their own: an interrupt comes here only, and what a rank started goes with it.
                out = None if rank == 0 else subprocess.DEVNULL
                ranks.append(subprocess.Popen(command, env=environment, stdout=out, start_new_session=True))
        yield ranks
    finally:
        for process in ranks:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals come at the end: a rank that has started, and is not in the list of them yet, would outlive us."""
    came: list[int] = []
    before = {kind: signal.signal(kind, lambda kind, _: came.append(kind)) for kind in _ENDING}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    for number in came:
        signal.raise_signal(number)


def clean() -> list[str]:
    """Removes the namespaces of harnesses that are no more, and returns their names."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    left = [name for name in (line.split()[0] for line in listed.splitlines() if line) if abandoned(name)]
    for name in left:
        _told(["ip", "netns", "delete", name])
    return left


def abandoned(namespace: str) -> bool:
    """Whether a namespace was made by a harness that does not run any more."""
    pid = namespace.removeprefix(PREFIX).split("-")[0]
    return namespace.startswith(PREFIX) and pid.isdigit() and not os.path.exists(f"/proc/{pid}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the flags; `program` is what follows --."""
    flags = list(arguments)
    at = flags.index("--") if "--" in flags else len(flags)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=_count, default=2)
    parser.add_argument("--ranks-per-host", type=_count, default=1)
    parser.add_argument("--outer-mbit", "--rate-mbit", type=_rate, help="of each host's link; as it comes if not given")
    parser.add_argument("--inner-mbit", type=_rate, help="of each rank's link to its host, with several ranks on one")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="at each end of an outer link; needs netem")
    parser.add_argument("--timeout-s", type=float, default=600.0)
    parser.add_argument("--clean", action="store_true", help="remove what killed harnesses left behind, and end")
    found = parser.parse_args(flags[:at])
    found.program = flags[at + 1 :]
    if not found.clean and not found.program:
        parser.error("say what to run, after --: for example -- -m benchmarks.exchanges")
    if found.inner_mbit is not None and found.ranks_per_host == 1:
        parser.error("--inner-mbit is for several ranks on a host: pass --ranks-per-host, or --rate-mbit instead")
    if found.delay_ms < 0:
        parser.error(f"--delay-ms={found.delay_ms}: must be 0 or more")
    return found


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number from 1 to 64")
    return int(text)


def _rate(text: str) -> float:
    rate = float(text)
    if not rate > 0:
        raise argparse.ArgumentTypeError(f"{text}: must be more than 0")
    return rate


def _unique() -> str:
    return f"{PREFIX}{os.getpid()}-{secrets.token_hex(2)}"


def _told(command: list[str]) -> str:
    """Runs a command and returns what it said if it failed, else nothing."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return (done.stderr.strip() or f"exit status {done.returncode}") if done.returncode else ""


def stop(number: int, _: object) -> None:
    """Ends this program, as a signal asks."""
    raise SystemExit(128 + number)


def main() -> None:
    """Runs by flags."""
    args = parse(sys.argv[1:])
    reasons = missing()
    if reasons:
        raise SystemExit("cannot make a network here: " + "; ".join(reasons))
    if args.clean:
        print(f"removed: {', '.join(clean()) or 'nothing'}")
        return
    # Whatever ends this program ends it by an exception, so that the namespaces go.
    for number in _ENDING:
        signal.signal(number, stop)
    outer, inner = Link(args.outer_mbit, args.delay_ms), Link(args.inner_mbit)
    network = Network(_unique(), args.hosts, args.ranks_per_host, outer, inner)
    try:
        raise SystemExit(run(network, args.program, args.timeout_s))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
