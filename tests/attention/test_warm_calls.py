"""A warm call only runs: what a signature decides is decided once. Counted by the Python calls of this package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

import ringattn
from tests.harness.ranks import RankPool

PACKAGE = str(Path(ringattn.__file__).parent)
MOST_FORWARD, MOST_BACKWARD = 80, 200


def calls_of(run: Callable[[], object]) -> int:
    """The Python calls of this package that a function makes, on this thread."""
    count = 0

    def count_calls(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(count_calls)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def warm_calls(group: dist.ProcessGroup) -> tuple[int, int]:
    """The calls of a warm forward, and of a warm backward."""
    layout, mask = ringattn.zigzag(128, group.size()), ringattn.causal()
    q, k, v = (torch.randn(1, layout.num_tokens(group.rank()), 4, 16, requires_grad=True) for _ in range(3))

    def forward() -> torch.Tensor:
        return ringattn.ring_attention(q, k, v, group, mask=mask, layout=layout)

    for _ in range(2):
        torch.autograd.grad(forward().sum(), [q, k, v])
    out = forward()
    dout = torch.ones_like(out)
    return calls_of(forward), calls_of(lambda: torch.autograd.grad(out, [q, k, v], dout))


def test_a_warm_call_recomputes_nothing(pool: RankPool) -> None:
    for forward, backward in pool.run(warm_calls, 2):
        assert 0 < forward <= MOST_FORWARD
        assert 0 < backward <= MOST_BACKWARD
