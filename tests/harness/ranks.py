"""A pool of rank processes that lives through a test session and outlives any test that breaks it.

Importing torch costs seconds, so processes are kept between tests. A test that fails, dies or hangs may leave
messages in flight, so after one the processes are killed and the next call starts fresh ones. These are forks of one
process that imports, and does nothing else: no thread runs in it, and no gradient is computed.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

import ringattn
from ringattn.comm.messages import PendingMessage

T = TypeVar("T")

GROUP_TIMEOUT_S = 60.0  # a deadlock inside a collective raises after this long
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0
GRACE_S = 0.3  # after a first failure: how long an earlier one may still take to reach the parent
# What `import ringattn` leaves for its first use.
_IMPORTED = ["pytest", __name__, *ringattn._LAZY_MODULES]


@dataclass(frozen=True)
class RankError:
    """What one rank raised, as plain data: the exception itself may not survive pickling."""

    rank: int
    type_name: str
    mro_names: tuple[str, ...]
    message: str
    traceback: str
    time_s: float  # monotonic clock, which all processes of a machine share


@dataclass(frozen=True)
class _Returned(Generic[T]):
    value: T


@dataclass(frozen=True)
class _Died:
    exit_code: int | None


class RankFailure(Exception):
    """A rank raised (or did not, where it should), died or hung; `rank` is the first that did."""

    def __init__(self, rank: int, report: str) -> None:
        super().__init__(report)
        self.rank = rank


class RankPool:
    """Up to `size` ranks on demand; processes start at the first call."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, fn: Callable[..., T], world_size: int, *args: object, timeout_s: float = 120.0) -> list[T]:
        """Return what `fn(group, *args)` gives on each of the ranks 0..world_size-1.

        `fn` must be a module-level function; arguments and results travel by value.

        Raises:
            RankFailure: when a rank raises, dies, or does not answer in time.
        """
        replies = self._call(fn, world_size, args, timeout_s, fatal=(RankError, _Died))
        results = [reply.value for reply in replies.values() if isinstance(reply, _Returned)]
        if len(results) < world_size:
            raise self._failure(fn, world_size, replies, timeout_s)
        return results

    def expect_error(
        self, fn: Callable[..., object], world_size: int, *args: object, timeout_s: float = 30.0
    ) -> list[RankError]:
        """Return what every rank raised, after checking that their group still works.

        The time allowed is below the group's own timeout, so that a rank left waiting for one that raised
        alone counts as hanging, not as raising.

        Raises:
            RankFailure: when a rank returns, dies or hangs instead, or the group is unusable afterwards.
        """
        replies = self._call(fn, world_size, args, timeout_s, fatal=(_Returned, _Died))
        errors = [reply for reply in replies.values() if isinstance(reply, RankError)]
        if len(errors) < world_size:
            raise self._failure(fn, world_size, replies, timeout_s, error_expected=True)
        try:
            self.run(_gather_ranks, world_size, timeout_s=timeout_s)
        except RankFailure as failure:
            report = f"every rank raised, as expected, but their group is unusable afterwards\n{failure}"
            raise RankFailure(failure.rank, report) from None
        return errors

    def close(self) -> None:
        """End the processes; a later call starts new ones."""
        for connection in self._connections:
            connection.close()
        # A rank that is idle leaves by itself, which lets coverage and sanitizers write their reports.
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        for process in self._processes:
            process.join(max(0.0, deadline_s - time.monotonic()))
        self._kill()

    def _start(self) -> None:
        context = starting()
        self._folder = tempfile.TemporaryDirectory(prefix="ringattn-ranks-")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.size, self._folder.name, theirs)
            process = context.Process(target=_serve, args=arguments, name=f"rank-{rank}", daemon=True)
            process.start()
            theirs.close()  # so that the death of the process ends the pipe
            self._processes.append(process)
            self._connections.append(ours)
        replies: dict[int, _Returned[None] | RankError | _Died]
        replies = self._collect(self.size, START_TIMEOUT_S, fatal=(_Died,))
        if any(not isinstance(replies.get(rank), _Returned) for rank in range(self.size)):
            raise self._failure(_join_groups, self.size, replies, START_TIMEOUT_S)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._connections, self._folder = [], [], None

    def _call(
        self,
        fn: Callable[..., T],
        world_size: int,
        args: tuple[object, ...],
        timeout_s: float,
        *,
        fatal: tuple[type, ...],
    ) -> dict[int, _Returned[T] | RankError | _Died]:
        if not 1 <= world_size <= self.size:
            raise ValueError(f"world_size must be in 1..{self.size}, the pool's size; got {world_size}")
        request = pickle.dumps((fn, world_size, args))
        try:
            if not self._processes:
                self._start()
            for connection in self._connections[:world_size]:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died: told below
                    connection.send_bytes(request)
            return self._collect(world_size, timeout_s, fatal=fatal)
        except BaseException:  # an interrupted call leaves ranks at work: nobody may meet them again
            self._kill()
            raise

    def _collect(
        self, world_size: int, timeout_s: float, *, fatal: tuple[type, ...]
    ) -> dict[int, _Returned[T] | RankError | _Died]:
        """Wait for every rank's reply, in rank order; hardly longer once one is of a fatal kind."""
        replies: dict[int, _Returned[T] | RankError | _Died] = {}
        waiting = {connection: rank for rank, connection in enumerate(self._connections[:world_size])}
        deadline_s = time.monotonic() + timeout_s
        while waiting and (left_s := deadline_s - time.monotonic()) > 0:
            for connection in wait(list(waiting), left_s):
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                replies[rank] = self._receive(rank)
                if isinstance(replies[rank], fatal):
                    deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
        return dict(sorted(replies.items()))

    def _receive(self, rank: int) -> _Returned[T] | RankError | _Died:
        try:
            payload = self._connections[rank].recv_bytes()
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(STOP_TIMEOUT_S)
            return _Died(self._processes[rank].exitcode)
        reply: _Returned[T] | RankError = pickle.loads(payload)
        return reply

    def _failure(
        self,
        fn: Callable[..., object],
        world_size: int,
        replies: dict[int, _Returned[T] | RankError | _Died],
        timeout_s: float,
        *,
        error_expected: bool = False,
    ) -> RankFailure:
        """Kill the processes and tell what happened, first cause first."""
        causes: list[tuple[float, int, str]] = []
        context: list[str] = []
        silent = [rank for rank in range(world_size) if rank not in replies]
        for rank, reply in replies.items():
            if isinstance(reply, _Died):
                # Deaths sort first: peers raise because a rank died, and no rank dies because a peer raised.
                causes.append((-1.0, rank, f"rank {rank} died with exit code {reply.exit_code}"))
            elif isinstance(reply, RankError) and not error_expected:
                causes.append((reply.time_s, rank, f"rank {rank} raised\n{reply.traceback}"))
            elif isinstance(reply, RankError):
                context.append(f"rank {rank} raised {reply.type_name}: {reply.message}")
            elif error_expected:
                causes.append((0.0, rank, f"rank {rank} returned instead of raising"))
        if causes and silent:
            context.append(f"without an answer by then: ranks {silent}")
        elif silent:
            stacks = self._stacks(silent)
            causes = [(0.0, r, f"rank {r} gave no answer in {timeout_s:g} s\n{stacks[r]}") for r in silent]
        self._kill()
        causes.sort()
        first = causes[0][1]
        name = getattr(fn, "__qualname__", repr(fn))
        told = "\n".join([text for _, _, text in causes] + context)
        return RankFailure(first, f"{name} failed on {world_size} ranks, first on rank {first}\n{told}")

    def _stacks(self, ranks: list[int]) -> dict[int, str]:
        """Where each of these ranks stands now."""
        assert self._folder is not None
        for rank in ranks:
            pid = self._processes[rank].pid
            if pid is not None and self._processes[rank].is_alive():
                os.kill(pid, signal.SIGUSR1)
        time.sleep(GRACE_S)
        files = {rank: _stack_file(self._folder.name, rank) for rank in ranks}
        return {rank: file.read_text() if file.exists() else "" for rank, file in files.items()}


def starting() -> SpawnContext | ForkServerContext:
    """How rank processes start."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context


def import_early(module: str) -> None:
    """Has a module imported in what all ranks are forks of; of use until the first of them starts."""
    _IMPORTED.append(module)


def pool(size: int = 4) -> Iterator[RankPool]:
    """Yield a pool and close it: a session fixture, once `pytest.fixture(scope="session")` is put on it."""
    with RankPool(size) as ranks:
        yield ranks


def _stack_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"stacks-{rank}.txt"


def _join_groups(rank: int, size: int, folder: str) -> dict[int, dist.ProcessGroup]:
    """Join the default group and, in the same order on every rank, one group of the first w ranks per w."""
    timeout = datetime.timedelta(seconds=GROUP_TIMEOUT_S)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)
    return {w: dist.new_group(list(range(w)), timeout=timeout, backend="gloo") for w in range(1, size + 1)}


def _watch_pending_messages() -> list[str]:
    """Lists every message that is dropped while it is pending: gloo would hang over it, later and elsewhere."""
    dropped: list[str] = []

    def on_delete(pending: PendingMessage) -> None:
        if pending._work is not None:
            dropped.append(str(pending._message))

    PendingMessage.__del__ = on_delete  # type: ignore[attr-defined]
    return dropped


def _serve(rank: int, size: int, folder: str, connection: Connection) -> None:
    """Answer requests until the parent goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and decides
    torch.set_num_threads(1)
    with _stack_file(folder, rank).open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        groups, dropped = _join_groups(rank, size, folder), _watch_pending_messages()
        connection.send_bytes(pickle.dumps(_Returned(None)))
        with contextlib.suppress(EOFError):
            while True:
                connection.send_bytes(_answer(rank, groups, dropped, connection.recv_bytes()))
        faulthandler.unregister(signal.SIGUSR1)
    dist.destroy_process_group()


def _answer(rank: int, groups: dict[int, dist.ProcessGroup], dropped: list[str], request: bytes) -> bytes:
    """Run one request; the reply is bytes, so that a result that cannot be pickled is an error too."""
    try:
        fn, world_size, args = pickle.loads(request)
        num_groups = _world.group_count
        dropped.clear()
        value = fn(groups[world_size], *args)
        if world_size < len(groups) and _world.group_count != num_groups:
            # torch names groups by their number: the next one would be another here than on the ranks left out.
            raise RuntimeError("made a group that not all ranks of the pool know of: DeviceMesh.from_group makes none")
        if dropped:
            raise RuntimeError(f"let go of messages under way: {dropped}")
        return pickle.dumps(_Returned(value))
    except BaseException as error:  # pytest's own outcomes and SystemExit are not Exceptions
        mro_names = tuple(kind.__name__ for kind in type(error).__mro__)
        told = traceback.format_exc()
        return pickle.dumps(RankError(rank, type(error).__name__, mro_names, str(error), told, time.monotonic()))


def _gather_ranks(group: dist.ProcessGroup) -> None:
    """Check that every rank of the group hears every other."""
    mine = torch.tensor([group.rank()])
    heard = [torch.full_like(mine, -1) for _ in range(group.size())]
    dist.all_gather(heard, mine, group=group)
    assert [int(rank) for rank in heard] == list(range(group.size()))
