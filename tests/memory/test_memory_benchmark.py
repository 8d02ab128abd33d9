"""The memory benchmark measures what the manual says."""

from __future__ import annotations

import torch

from benchmarks.memory import ModuleCase, measure_modules

CPU = torch.device("cpu")


def test_chunks_and_tiles_take_less_memory() -> None:
    for module, inner, parts in (("loss", 1024, 32), ("mlp", 256, 16)):
        cases = [ModuleCase(module, 512, 16, inner, "float32", part) for part in (None, parts)]
        (whole, same), (in_parts, slower) = measure_modules(cases, 1, CPU)
        assert in_parts < whole / 4
        assert same == 1.0
        assert slower > 0.0
