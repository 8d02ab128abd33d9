"""A program whose gloo worker still holds tensors when it ends does not abort."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# The main thread never gives up the GIL by itself, so the worker is left waiting for it at the end of the program.
PROGRAM = """
import sys
import torch, torch.distributed as dist
{handler}
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
group = dist.group.WORLD  # as torch's caches do, keeps the group alive
heard = [torch.empty(1000) for _ in range(2)]
dist.all_gather(heard, torch.ones(1000))
sys.setswitchinterval(1000.0)
for _ in range({rounds}):
    group._allgather_base(torch.empty(2000), torch.ones(1000)).wait()
dist.destroy_process_group()
"""


def exit_codes(folder: Path, handler: str) -> list[int]:
    """Runs the program on two ranks, and returns how they ended."""
    program = folder / "program.py"
    program.write_text(PROGRAM.format(handler=handler, rounds=20))
    store = folder / "store"
    command = [sys.executable, str(program)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), str(store)], env=environment, stderr=subprocess.DEVNULL)
        for rank in range(2)
    ]
    return [rank.wait(60) for rank in ranks]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_program_waits_for_gloo_before_it_ends(tmp_path: Path) -> None:
    for attempt in range(2):
        (tmp_path / str(attempt)).mkdir()
        assert exit_codes(tmp_path / str(attempt), "import ringattn.comm.gloo_exit") == [0, 0]


@pytest.mark.long
def test_without_the_handler_it_aborts(tmp_path: Path) -> None:
    """Shows that the test above can fail."""
    found = set()
    for attempt in range(20):
        (tmp_path / str(attempt)).mkdir()
        found |= set(exit_codes(tmp_path / str(attempt), ""))
    assert -signal.SIGABRT in found
