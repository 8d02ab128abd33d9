"""Runs programs as torchrun would, without what takes seconds: an interpreter for each rank, and one for torchrun."""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch._C._distributed_c10d import TCPStore

from tests.harness.ranks import starting

TIMEOUT_S = 180.0
ROOT = Path(__file__).parents[2]


def launch(program: str | Path, *flags: str, ranks: int = 2, timeout_s: float = TIMEOUT_S) -> str:
    """Runs a module by its name, or a file, on so many ranks, and returns what all of them printed.

    Raises:
        AssertionError: when a rank fails or does not end in time.
    """
    meeting = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ringattn-launch-") as folder:
        said = [Path(folder) / f"rank-{rank}.txt" for rank in range(ranks)]
        processes = [
            starting().Process(target=_rank, args=(program, flags, said[rank], _told(rank, ranks, meeting.port)))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
        told = [file.read_text() for file in said]
        codes = [process.exitcode for process in processes]
    assert not any(codes), f"{program} ended with {codes}\n" + "\n".join(text[-4000:] for text in told)
    return "".join(told)


def _told(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun --standalone tells a rank."""
    return {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world_size)),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the one that started them holds the store, and not rank 0
    }


def _wait(processes: Sequence[BaseProcess], deadline_s: float) -> None:
    """Returns when all have ended well, one has failed, or it is too late."""
    waiting = list(processes)
    while waiting and (left_s := deadline_s - time.monotonic()) > 0:
        wait([process.sentinel for process in waiting], left_s)
        waiting = [process for process in waiting if process.is_alive()]
        if any(process.exitcode for process in processes):
            return


def _rank(program: str | Path, flags: tuple[str, ...], said: Path, environment: Mapping[str, str]) -> None:
    with said.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ |= environment
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = [str(program), *flags]
    if isinstance(program, Path):
        runpy.run_path(str(program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
