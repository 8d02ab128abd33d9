"""Triton kernels over tile lists: one launch for a forward, two for a backward, however many tiles.

README.md lists the modules. Triton itself is imported when a kernel first runs, so the package imports without it.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from ringattn.geometry.tiles import Tiles
from ringattn.kernels.contract import (
    BackwardQueries,
    Gradients,
    Keys,
    ProblemSpec,
    Queries,
    State,
    unsupported_terms,
)
from ringattn.kernels.triton.configs import MAX_DIM, TARGETS, architecture
from ringattn.score import Score

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonKernel:
    """A `BlockKernel` in Triton, for CUDA and ROCm: one launch per forward, two per backward."""

    name = "triton"
    about = "kernels of our own, in Triton, for CUDA and ROCm: every mask in one launch, softcap; no float64"
    score_terms = frozenset({"softcap"})

    def available(self) -> list[str]:
        """Needs triton, and a GPU with an entry in `configs`, or triton's interpreter."""
        if find_spec("triton") is None:
            return ["triton is not installed"]
        if _interpreting():
            return []
        if not torch.cuda.is_available():
            return ["torch sees no GPU, and triton's interpreter is off"]
        if architecture(torch.device("cuda", torch.cuda.current_device())) is None:
            return [f"has configurations for {', '.join(TARGETS)}, not for {torch.cuda.get_device_name()}"]
        return []

    def unsupported(self, problem: ProblemSpec) -> list[str]:
        reasons = []
        if problem.device_type != "cuda" and not (problem.device_type == "cpu" and _interpreting()):
            reasons.append(f"runs on cuda, not on {problem.device_type}")
        if problem.dtype not in DTYPES:
            reasons.append(f"takes {', '.join(map(str, DTYPES))}, not {problem.dtype}")
        reasons += unsupported_terms(problem, self.score_terms)
        if problem.score.factor <= 0:
            # The kernels take the maximum before they scale.
            reasons.append(f"takes a positive scale, not {problem.score.factor}")
        dim = max(problem.head_dim, problem.v_head_dim)
        if dim > MAX_DIM:
            reasons.append(f"takes head dims up to {MAX_DIM}, not {dim}")
        return reasons

    def forward(self, queries: Queries, keys: Keys, tiles: Tiles, score: Score, state: State) -> None:
        from ringattn.kernels.triton import launch

        if tiles and queries.q.shape[0]:
            launch.forward(queries, keys, tiles, score, state)

    def backward(self, queries: BackwardQueries, keys: Keys, tiles: Tiles, score: Score, gradients: Gradients) -> None:
        from ringattn.kernels.triton import launch

        if tiles and queries.q.shape[0]:
            launch.backward(queries, keys, tiles, score, gradients)


def _interpreting() -> bool:
    """Whether triton interprets kernels in Python, on the CPU (TRITON_INTERPRET=1)."""
    if find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)
