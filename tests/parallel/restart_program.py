r"""A training program for 2 ranks under torchrun, one of which kills itself once.

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nproc-per-node=2 --max-restarts=1 \
        -m tests.parallel.restart_program FOLDER UNTIL HOW

HOW is "never", "after-step", or "while-saving". Rank 0 writes the weights at the end.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tests.parallel.pipeline_training import ResumableTraining
from tests.parallel.training import TrainingSetup

SETUP = TrainingSetup({"ring": 2}, "packed", length=32)
CHECKPOINT_EVERY = 2  # steps
KILLED_STEP = 3  # between two checkpoints


def die(once: Path) -> None:
    """Kills this process by SIGKILL, the first time only."""
    if not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def die_when_there(path: Path, once: Path) -> None:
    """Waits until a file exists, then kills this process."""
    while not path.exists():
        time.sleep(1e-4)
    die(once)


def main() -> None:
    """Trains from the latest checkpoint."""
    folder, until, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    once = folder / "killed"
    chosen = dist.get_rank() == 1
    if how == "while-saving" and chosen:
        saving = folder / "checkpoints" / f"step-{2 * CHECKPOINT_EVERY:08d}.partial"
        threading.Thread(target=die_when_there, args=(saving, once), daemon=True).start()

    def after_step(step: int) -> None:
        if how == "after-step" and chosen and step == KILLED_STEP:
            die(once)

    trained = ResumableTraining(SETUP).train(
        until, folder / "checkpoints", every=CHECKPOINT_EVERY, after_step=after_step
    )
    if dist.get_rank() == 0:
        torch.save({"weights": trained.weights, "steps_of_the_last_run": len(trained.losses)}, folder / "end.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
