"""A mask of its own for every batch row."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import ringattn
from tests.attention.problem import Problem, check, documents_case, window_case
from tests.harness.cases import layout_case, mask_case
from tests.harness.ranks import RankPool

CAUSAL, FULL, WINDOW = mask_case("causal"), mask_case("full"), mask_case("window_both")


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped_1", "striped_3", "balanced"])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_a_mask_for_each_row(pool: RankPool, layout: str, backend: str) -> None:
    rows = (
        (CAUSAL, FULL, WINDOW),
        (CAUSAL, WINDOW, CAUSAL),
        (WINDOW, WINDOW),
        (FULL,),
    )
    problems = [
        Problem(masks, layout_case(layout), 23, batch=len(masks), heads=4, kv_heads=2, poison=True, backend=backend)
        for masks in rows
    ]
    check(pool, problems)


@pytest.mark.parametrize("layout", ["zigzag", "striped_3"])
def test_documents_of_each_row(pool: RankPool, layout: str) -> None:
    """Rows packed differently: ragged batches, padding on either side as a document of its own."""
    masks = (
        documents_case(23),
        documents_case(7, 16),
        documents_case(16, 7),
        documents_case(1, 0, 21, 1),
    )
    check(pool, [Problem(masks, layout_case(layout), 23, batch=4, sink=True)])


def test_strips_of_each_row(pool: RankPool) -> None:
    """Windows of different widths in one batch, at a length where bands become batched strips."""
    masks = (window_case(20, 0), window_case(3, 40), CAUSAL)
    check(pool, [Problem(masks, layout_case("zigzag"), 259, batch=3, heads=2, kv_heads=1, dim=8, v_dim=8)], (1, 2, 3))


def test_cross_attention_rows(pool: RankPool) -> None:
    problem = Problem((CAUSAL, WINDOW), layout_case("zigzag"), 17, k_len=9, kv_layout=layout_case("striped_1"), batch=2)
    check(pool, [problem])


def attend_with(group: dist.ProcessGroup, num_masks: int) -> None:
    q = torch.randn(3, 4, 2, 4)
    ringattn.ring_attention(q, q, q, group, mask=[ringattn.causal()] * num_masks)


@pytest.mark.parametrize("num_masks", [0, 1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_list_of_another_length_is_refused(pool: RankPool, num_masks: int, world_size: int) -> None:
    errors = pool.expect_error(attend_with, world_size, num_masks)
    assert {error.type_name for error in errors} == {"MaskError"}
    assert all(f"list of {num_masks} masks, but the batch has 3 rows" in error.message for error in errors)
