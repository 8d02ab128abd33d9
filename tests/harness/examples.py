"""Runs programs one after the other in the ranks that torchrun started: importing torch takes longer than they do.

torchrun --standalone --nproc-per-node=2 -m tests.harness.examples first.py second.py
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Sequence
from unittest import mock

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore


def meeting(place: Store, rank: int, world_size: int) -> Callable[..., None]:
    """Returns what makes the default group there, whatever else it is told of where."""
    meet = dist.init_process_group

    def meet_there(backend: str, **_: object) -> None:
        meet(backend, store=place, rank=rank, world_size=world_size)

    return meet_there


def main(programs: Sequence[str]) -> None:
    """Runs each as if it were alone, and tells of each that came to its end."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    for number, program in enumerate(programs):
        # Where ranks met before, they would find each other's old addresses.
        place = PrefixStore(f"program {number}", store)
        with mock.patch.object(dist, "init_process_group", meeting(place, rank, world_size)):
            runpy.run_path(program, run_name="__main__")
        print(f"\nended {rank} {program}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
