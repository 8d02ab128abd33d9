"""The command line: `ringattn info` tells what this machine offers."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence

import torch
import torch.distributed as dist

import ringattn
from ringattn.kernels import BACKENDS


def info() -> str:
    """Returns what this machine offers: versions, devices, and each backend in order, with why it is unavailable."""
    lines = [
        f"ringattn  {ringattn.__version__}",
        f"python    {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch     {torch.__version__}",
        f"cpu       {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        f"cuda      {_cuda()}",
        f"exchange  {', '.join(_exchanges()) or 'none: torch was built without torch.distributed'}",
        "backends, in the order in which backend=None tries them:",
    ]
    for number, (name, kernel) in enumerate(BACKENDS.items(), 1):
        reasons = kernel.available()
        lines.append(f"  {number}. {name:<10} {'available' if not reasons else 'unavailable: ' + '; '.join(reasons)}")
        lines.append(f"     {'':<10} {kernel.about}")
    return "\n".join(lines)


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no device"
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _exchanges() -> list[str]:
    if not dist.is_available():
        return []
    found = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    return [name for name, available in found.items() if available]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(prog="ringattn", description="Exact attention over sharded sequences.")
    parser.add_argument("--version", action="version", version=f"ringattn {ringattn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="tell what this machine offers: torch, devices, each backend and its refusals")
    parser.parse_args(argv)
    print(info())
    return 0
