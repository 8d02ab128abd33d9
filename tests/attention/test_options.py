"""Every option of a call, alone and together, against the oracle: outputs and all gradients."""

from __future__ import annotations

import pytest

from tests.attention.problem import WORLDS, Problem, check, window_case
from tests.harness.cases import layout_case, mask_case
from tests.harness.ranks import RankPool

BACKENDS = ("sdpa", "reference")
PACKED = mask_case("documents&causal")
ZIGZAG = layout_case("zigzag")


@pytest.mark.parametrize("backend", BACKENDS)
def test_sink(pool: RankPool, backend: str) -> None:
    """The ranks' shares of the sink's gradient add up to the whole."""
    masks = (mask_case("full"), PACKED, mask_case("window_left"))
    check(pool, [Problem(mask, ZIGZAG, 23, batch=2, heads=4, sink=True, backend=backend) for mask in masks])


def test_softcap(pool: RankPool) -> None:
    """A cap small enough to bend the scores; only the reference kernel has one."""
    layouts = (ZIGZAG, layout_case("striped_3"))
    check(
        pool, [Problem(PACKED, layout, 23, softcap=0.7, backend=b) for layout in layouts for b in (None, "reference")]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(pool: RankPool, backend: str) -> None:
    scales = (0.11, 1.7, 2)
    check(pool, [Problem(PACKED, ZIGZAG, 17, scale=scale, backend=backend) for scale in scales], worlds=(1, 3))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("scale", [-0.6, 0.0])
def test_scale_of_zero_or_less(pool: RankPool, scale: float, backend: str | None) -> None:
    """Torch's CPU flash kernel scales what it has masked: -inf becomes NaN or +inf."""
    check(pool, [Problem(PACKED, ZIGZAG, 17, scale=scale, backend=backend)], worlds=(1, 3))


def test_everything_at_once(pool: RankPool) -> None:
    for name in ("contiguous", "striped_1", "balanced"):
        problem = Problem(
            mask_case("documents&window_both"),
            layout_case(name),
            29,
            batch=2,
            heads=6,
            kv_heads=2,
            dim=5,
            v_dim=3,
            sink=True,
            softcap=1.3,
            scale=0.9,
            poison=True,
        )
        check(pool, [problem])


@pytest.mark.parametrize("backend", BACKENDS)
def test_head_counts_and_head_dims(pool: RankPool, backend: str) -> None:
    """Multi-head, grouped and multi-query attention; values narrower and wider than keys, down to one column."""
    heads = ((1, 1), (5, 5), (6, 3), (6, 2), (5, 1))
    dims = ((4, 4), (8, 3), (3, 8), (1, 6), (6, 1))
    check(
        pool,
        [
            Problem(PACKED, ZIGZAG, 19, heads=h, kv_heads=hkv, dim=d, v_dim=dv, backend=backend, sink=True)
            for (h, hkv), (d, dv) in zip(heads * 2, (*dims, *reversed(dims)), strict=True)
        ],
        worlds=(1, 2, 3),
    )


@pytest.mark.parametrize(
    ("backend", "worlds"),
    [
        ("sdpa", WORLDS),
        ("reference", (1, 3)),  # it has no strips
        pytest.param("reference", (2, 4), marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("layout", ["zigzag", "striped_1", "striped_3", "contiguous"])
def test_longer_sequences(pool: RankPool, layout: str, backend: str, worlds: tuple[int, ...]) -> None:
    """Odd lengths long enough for the fused kernel to cut bands into batched strips, window edges included."""
    masks = (window_case(70, 0), window_case(9, 4), mask_case("causal"))
    problems = [
        Problem(mask, layout_case(layout), length, batch=2, heads=4, kv_heads=2, dim=8, v_dim=8, backend=backend)
        for length in (61, 131)
        for mask in masks
    ]
    check(pool, [*problems, Problem(window_case(70, 0), layout_case(layout), 611, backend=backend)], worlds)
