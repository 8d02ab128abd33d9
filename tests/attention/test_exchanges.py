"""Every exchange against the dense float64 oracle: outputs, lse and every gradient, on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from tests.attention.problem import FLAT_WAYS, MESH_WAYS, Problem, Way, check, solve, whole
from tests.harness import oracle
from tests.harness.cases import LAYOUT_CASES, MASK_CASES, MaskCase, case_ids, layout_case, mask_case
from tests.harness.compare import assert_within_rule
from tests.harness.ranks import RankPool

WAYS = (*FLAT_WAYS, *MESH_WAYS)
LAYOUTS = case_ids(LAYOUT_CASES)
PACKED, ZIGZAG = mask_case("documents&causal"), layout_case("zigzag")


def worlds(way: Way) -> tuple[int, ...]:
    return (1, 2, 3, 4) if way.mesh is None else (4,)


def in_layout(layout: str, masks: Sequence[MaskCase]) -> list[Problem]:
    """Grouped heads, Dv != D, poisoned buffers."""
    return [
        Problem(
            mask, layout_case(layout), 23, heads=4, kv_heads=(4, 2, 1)[i % 3], v_dim=3, batch=1 + i % 2, poison=True
        )
        for i, mask in enumerate(masks)
    ]


def check_way(pool: RankPool, way: Way, *problems: Problem, on: tuple[int, ...] = ()) -> None:
    check(pool, [replace(problem, way=way) for problem in problems], on or worlds(way))


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_masks(pool: RankPool, way: Way, layout: str) -> None:
    """Every mask once, in turn with all layouts, each way beginning with another; on two numbers of ranks."""
    number, start = LAYOUTS.index(layout), WAYS.index(way)
    masks = [mask for i, mask in enumerate(MASK_CASES) if (i + start) % len(LAYOUTS) == number]
    check_way(pool, way, *in_layout(layout, masks), on=worlds(way)[number % 2 :: 2] or worlds(way))


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_mask_in_every_layout(pool: RankPool, way: Way, layout: str) -> None:
    check_way(pool, way, *in_layout(layout, MASK_CASES))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_heads(pool: RankPool, way: Way) -> None:
    """Heads that do not divide, fewer than ranks, and kv heads that are fewer still."""
    heads = ((1, 1), (3, 3), (3, 1), (6, 6), (6, 3), (6, 2), (6, 1), (7, 7), (7, 1), (10, 2))
    check_way(
        pool,
        way,
        *(Problem(PACKED, ZIGZAG, 19, heads=h, kv_heads=kv, v_dim=3, sink=True) for h, kv in heads),
        on=worlds(way)[-3:],
    )


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_options(pool: RankPool, way: Way) -> None:
    base = Problem(PACKED, ZIGZAG, 23, batch=2, heads=4, kv_heads=2, dim=5, v_dim=3, sink=True, scale=0.9, poison=True)
    masks = (mask_case("causal"), mask_case("window_left"))
    check_way(
        pool,
        way,
        replace(base, softcap=1.3),
        replace(base, backend="sdpa"),
        replace(base, backend="reference", kv_heads=4),
        replace(base, mask=masks),
        replace(base, mask=(PACKED, mask_case("full")), kv_heads=4, layout=layout_case("striped_1")),
        on=worlds(way)[-2:],
    )


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_cross_attention(pool: RankPool, way: Way) -> None:
    """Other layouts for keys than for queries, more and fewer keys, and ranks with none of either."""
    problems = [
        Problem(mask_case(mask), layout_case(layout), q_len, k_len=k_len, kv_layout=layout_case(kv_layout), heads=4,
                kv_heads=kv_heads, v_dim=3, poison=True)
        for mask, layout, kv_layout, q_len, k_len, kv_heads in (
            ("causal", "zigzag", "striped_3", 17, 26, 2),
            ("window_both", "striped_1", "contiguous", 19, 6, 4),
            ("full", "contiguous", "zigzag", 1, 13, 4),
            ("full", "contiguous", "zigzag", 13, 1, 2),
            ("window_left", "contiguous", "contiguous", 16, 4, 4),
            ("causal", "zigzag", "zigzag", 13, 0, 2),
            ("full", "zigzag", "contiguous", 0, 13, 2),
        )
    ]  # fmt: skip
    check_way(pool, way, *problems, on=worlds(way)[-2:])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_fewer_tokens_than_ranks(pool: RankPool, way: Way) -> None:
    lengths = (0, 1, 3)
    check_way(pool, way, *(Problem(PACKED, layout_case("zigzag"), n, sink=True, poison=True) for n in lengths))


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_exact_as_plain_torch(pool: RankPool, way: Way, dtype: torch.dtype) -> None:
    """Queries travel in the backward with as many kv heads; gradients of replicated ones are summed in fp32."""
    for kv_heads in (4, 1):
        problem = Problem(
            PACKED, ZIGZAG, 61, heads=4, kv_heads=kv_heads, dim=16, v_dim=16, sink=True, dtype=dtype, way=way
        )
        t = problem.tensors()
        plain = oracle.plain_gradients(*t[:3], problem.allowed(), t.dout, t.dlse, sink=problem.sink_logits())
        expected = problem.expected()
        for name, actual in whole(problem, pool.run(solve, 4, problem)).items():
            if name == "dsink":
                continue  # in fp32 whatever the inputs are
            exact = name in ("lse",)
            wanted = torch.float32 if exact else dtype
            assert actual.dtype == wanted, name
            assert_within_rule(
                actual, getattr(expected, name), getattr(plain, name), name=f"{name} of {way}", check_dtype=not exact
            )


@pytest.mark.long
@pytest.mark.parametrize(
    "way", [Way("hybrid", (2, 3)), Way("hybrid", (3, 2), 2), Way("ring", (2, 3)), Way("ring", (3, 2))], ids=str
)
def test_six_ranks(way: Way) -> None:
    with RankPool(6) as six:
        problems = [
            Problem(mask, layout_case(layout), 37, heads=h, kv_heads=kv, v_dim=3, sink=True, poison=True, way=way)
            for mask in MASK_CASES
            for layout, (h, kv) in zip(("contiguous", "zigzag", "striped_1"), ((6, 6), (7, 1), (6, 2)), strict=True)
        ]
        check(six, problems, [6])
