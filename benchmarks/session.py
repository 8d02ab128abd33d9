"""One rank's part in a torchrun program: its process group and its device, on CPUs and on GPUs alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Session:
    """What a program needs to know of where it runs."""

    rank: int
    world_size: int
    device: torch.device


@contextmanager
def session() -> Iterator[Session]:
    """Joins the ranks that torchrun started: NCCL with a GPU each, gloo with a thread each otherwise."""
    if torch.cuda.is_available():
        dist.init_process_group("nccl")
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    else:
        dist.init_process_group("gloo")
        device = torch.device("cpu")
        torch.set_num_threads(1)
    try:
        yield Session(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
