"""ring_attention against the dense float64 oracle: outputs and every gradient, on every rank."""

from __future__ import annotations

import pytest

from tests.attention.problem import WORLDS, Problem, check
from tests.harness.cases import LAYOUT_CASES, MASK_CASES, LayoutCase, MaskCase, case_ids
from tests.harness.ranks import RankPool


@pytest.mark.parametrize("mask", MASK_CASES, ids=case_ids(MASK_CASES))
@pytest.mark.parametrize("layout", LAYOUT_CASES, ids=case_ids(LAYOUT_CASES))
def test_layouts_and_masks(pool: RankPool, layout: LayoutCase, mask: MaskCase) -> None:
    """The whole product, worlds 1 to 4, odd lengths down to none, GQA, Dv != D, poisoned buffers."""
    for world_size in WORLDS:
        for q_len in sorted({0, 1, max(1, world_size - 1), 23}):
            heads, kv_heads, v_dim = {0: (2, 2, 4), 1: (4, 2, 3), 2: (3, 1, 5)}[(q_len + world_size) % 3]
            problem = Problem(
                mask,
                layout,
                q_len,
                heads=heads,
                kv_heads=kv_heads,
                v_dim=v_dim,
                batch=1 + q_len % 2,
                poison=True,
            )
            check(pool, [problem], [world_size])
