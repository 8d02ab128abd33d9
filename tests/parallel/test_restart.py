"""A run with a killed rank restarts by itself, and ends with the weights of an uninterrupted run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ringattn.parallel import latest_checkpoint
from tests.harness.compare import assert_close
from tests.parallel.restart_program import CHECKPOINT_EVERY, SETUP
from tests.parallel.training import train_single_process

UNTIL = 5


def run(folder: Path, how: str) -> dict[str, Any]:
    """Trains under torchrun, and returns the saved weights and number of steps."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["-m", "tests.parallel.restart_program", str(folder), str(UNTIL), how]
    # Restarted ranks must not find the addresses of killed ranks in the old store.
    apart = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    environment, root = os.environ | apart, Path(__file__).parents[2]
    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert (folder / "killed").exists() == (how != "never")
    found: dict[str, Any] = torch.load(folder / "end.pt")
    return found


def test_killed_run_matches_single_process(tmp_path: Path) -> None:
    found = run(tmp_path / "run", "after-step")
    assert found["steps_of_the_last_run"] == UNTIL - CHECKPOINT_EVERY  # resumed from the checkpoint
    expected = train_single_process(SETUP.mask, SETUP.length, SETUP.config, UNTIL)
    for name, weight in found["weights"].items():
        assert_close(weight, expected.weights[name], atol=1e-10, name=name)
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") == tmp_path / "run" / "checkpoints" / f"step-{UNTIL:08d}"


@pytest.mark.long
@pytest.mark.parametrize("how", ["after-step", "while-saving"])
def test_killed_run_equals_uninterrupted_run(tmp_path: Path, how: str) -> None:
    killed, spared = run(tmp_path / "killed", how), run(tmp_path / "spared", "never")
    assert killed["weights"].keys() == spared["weights"].keys()
    for name, weight in killed["weights"].items():
        assert torch.equal(weight, spared["weights"][name]), name
