"""Low precision: as exact as plain PyTorch in the same dtype, and no worse on more ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.attention.problem import WORLDS, Problem, solve, whole
from tests.harness import oracle
from tests.harness.cases import layout_case, mask_case
from tests.harness.compare import assert_within_rule
from tests.harness.ranks import RankPool

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("out", "lse", "dq", "dk", "dv")
LAYOUTS = {1: "contiguous", 2: "zigzag", 3: "striped_3", 4: "zigzag", 8: "zigzag"}


def problem_of(mask: str, dtype: torch.dtype, backend: str, world_size: int, **options: int) -> Problem:
    return Problem(mask_case(mask), layout_case(LAYOUTS[world_size]), dtype=dtype, backend=backend, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("mask", ["causal", "documents&window_both"])
def test_as_exact_as_plain_torch(pool: RankPool, mask: str, backend: str, dtype: torch.dtype) -> None:
    sizes = {"q_len": 61, "heads": 4, "kv_heads": 2, "dim": 16, "v_dim": 16}
    for world_size in WORLDS:
        problem = problem_of(mask, dtype, backend, world_size, **sizes)
        t = problem.tensors()
        plain = oracle.plain_gradients(*t[:3], problem.allowed(), t.dout, t.dlse)
        expected = problem.expected()
        found = whole(problem, pool.run(solve, world_size, problem))
        assert set(found) == set(NAMES)
        for name, actual in found.items():
            # lse is fp32 also where plain PyTorch's is as coarse as its inputs.
            wanted = torch.float32 if name == "lse" else dtype
            assert actual.dtype == wanted, name
            told = f"{name} of {world_size} ranks"
            assert_within_rule(
                actual, getattr(expected, name), getattr(plain, name), name=told, check_dtype=name != "lse"
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lse_is_as_exact_as_fp32_of_the_same_inputs(pool: RankPool, dtype: torch.dtype) -> None:
    """Scores are sums in fp32, whatever the inputs' dtype: the lse does not know how coarse they are."""
    for backend in ("sdpa", "reference"):
        problem = problem_of("causal", dtype, backend, 3, q_len=61, dim=16)
        q, k, v = (x.float() for x in problem.tensors()[:3])
        _, plain = oracle.plain_attention(q, k, v, problem.allowed())
        found = whole(problem, pool.run(solve, 3, problem))["lse"]
        assert_within_rule(found, problem.expected().lse, plain, name=f"lse of {backend}")


def worst(problem: Problem, results: list[dict[str, torch.Tensor]]) -> Iterator[tuple[str, float, float]]:
    """(name, largest error, largest value) of every result."""
    expected = problem.expected()
    for name, actual in whole(problem, results).items():
        exact = getattr(expected, name)
        yield name, float((actual.double() - exact).abs().max()), float(exact.abs().max())


def check_growth(pools: dict[int, RankPool], dtype: torch.dtype, backend: str) -> None:
    """Errors on several ranks are at most 1.5 times those of one, and two roundings of the largest value."""
    sizes = {"q_len": 256, "heads": 4, "kv_heads": 2, "dim": 16, "v_dim": 16}
    alone = problem_of("causal", dtype, backend, 1, **sizes)
    errors = {name: error for name, error, _ in worst(alone, pools[min(pools)].run(solve, 1, alone))}
    assert max(errors.values()) > 0, "nothing was rounded, so nothing was compared"
    for world_size, pool in pools.items():
        problem = problem_of("causal", dtype, backend, world_size, **sizes)
        for name, error, largest in worst(problem, pool.run(solve, world_size, problem)):
            eps = torch.finfo(torch.float32 if name == "lse" else dtype).eps
            limit = 1.5 * errors[name] + 2 * eps * largest
            assert error <= limit, f"{name} on {world_size} ranks: error {error:.3g}, of one rank {errors[name]:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_errors_do_not_grow_with_the_world(pool: RankPool, backend: str, dtype: torch.dtype) -> None:
    check_growth({2: pool, 4: pool}, dtype, backend)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_do_not_grow_up_to_eight_ranks(dtype: torch.dtype) -> None:
    with RankPool(8) as pool:
        for backend in ("sdpa", "reference"):
            check_growth({2: pool, 4: pool, 8: pool}, dtype, backend)
