"""A run of which a rank is killed starts again by itself, and ends with the weights of one that was not killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ringattn.parallel.checkpoint import latest
from tests.harness.compare import assert_close
from tests.parallel.restart_program import EVERY, MIX
from tests.parallel.training import train_alone

UNTIL = 5


def run(folder: Path, how: str) -> dict[str, Any]:
    """Trains under torchrun, and returns what it ended with."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["-m", "tests.parallel.restart_program", str(folder), str(UNTIL), how]
    # Ranks that start again are not to meet where the old ones left their addresses.
    apart = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    environment, root = os.environ | apart, Path(__file__).parents[2]
    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert (folder / "killed").exists() == (how != "never")
    found: dict[str, Any] = torch.load(folder / "end.pt")
    return found


def test_a_killed_run_ends_as_one_process(tmp_path: Path) -> None:
    found = run(tmp_path / "run", "after-step")
    assert found["steps_of_the_last_run"] == UNTIL - EVERY  # it went on from the checkpoint, and not from the start
    expected = train_alone(MIX.mask, MIX.length, MIX.config, UNTIL)
    for name, weight in found["weights"].items():
        assert_close(weight, expected.weights[name], atol=1e-10, name=name)
    assert latest(tmp_path / "run" / "checkpoints") == tmp_path / "run" / "checkpoints" / f"step-{UNTIL:08d}"


@pytest.mark.long
@pytest.mark.parametrize("how", ["after-step", "while-saving"])
def test_a_killed_run_ends_as_one_that_was_not_killed(tmp_path: Path, how: str) -> None:
    killed, spared = run(tmp_path / "killed", how), run(tmp_path / "spared", "never")
    assert killed["weights"].keys() == spared["weights"].keys()
    for name, weight in killed["weights"].items():
        assert torch.equal(weight, spared["weights"][name]), name
