"""Every other test trusts the harness, so it is tested first: it passes, and fails, when it should."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.harness import ranks
from tests.harness.cases import (
    CROSS_MASK_CASES,
    LAYOUT_CASES,
    MASK_CASES,
    case_ids,
    cu_seqlens,
    layout_case,
    mask_case,
    tensors,
)
from tests.harness.compare import assert_close, assert_within_rule
from tests.harness.launch import launch
from tests.harness.oracle import dense_attention, dense_gradients, plain_attention, plain_gradients
from tests.harness.poison import poisoned_empty
from tests.harness.ranks import RankFailure, RankPool

# --- ranks ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> Iterator[RankPool]:
    """A pool of its own, which these tests break at will."""
    yield from ranks.pool(2)


def total(group: dist.ProcessGroup, x: Tensor) -> tuple[int, int, Tensor]:
    """Sum rank + x over the group."""
    x = x + group.rank()
    dist.all_reduce(x, group=group)
    return group.rank(), torch.get_num_threads(), x


def answers(group: dist.ProcessGroup, value: object) -> object:
    return value


def raises_on(group: dist.ProcessGroup, bad_rank: int) -> None:
    if group.rank() == bad_rank:
        raise ValueError(f"rank {bad_rank} is bad")
    dist.barrier(group=group)


def raises_in_turn(group: dist.ProcessGroup) -> None:
    time.sleep(0.1 * (group.size() - group.rank()))
    raise KeyError(group.rank())


def exits_on(group: dist.ProcessGroup, bad_rank: int) -> None:
    if group.rank() == bad_rank:
        os._exit(7)
    dist.barrier(group=group)


def hangs_on(group: dist.ProcessGroup, bad_rank: int) -> None:
    if group.rank() == bad_rank:
        time.sleep(1000)


def returns_unpicklable(group: dist.ProcessGroup) -> object:
    return lambda: None


def assert_works(pool: RankPool) -> None:
    x = torch.tensor([1.5, 2.5], dtype=torch.bfloat16)
    for world_size in (1, 2):
        results = pool.run(total, world_size, x)
        assert [(rank, num_threads) for rank, num_threads, _ in results] == [(r, 1) for r in range(world_size)]
        for _, _, summed in results:
            assert_close(summed, x * world_size + world_size * (world_size - 1) // 2, atol=0, name="sum")


def test_pool_runs_on_every_world_size(pair: RankPool) -> None:
    assert_works(pair)


def test_pool_refuses_more_ranks_than_it_has(pair: RankPool) -> None:
    for world_size in (0, 3):
        with pytest.raises(ValueError, match="world_size"):
            pair.run(answers, world_size, None)


def test_first_failing_rank_is_named_with_its_traceback(pair: RankPool) -> None:
    with pytest.raises(RankFailure, match="first on rank 1") as failure:
        pair.run(raises_in_turn, 2)
    assert failure.value.rank == 1
    report = str(failure.value)
    assert re.search(r"(?s)rank 1 raised\nTraceback.*in raises_in_turn.*KeyError: 1.*rank 0 raised", report)


def test_exiting_rank_is_reported(pair: RankPool) -> None:
    with pytest.raises(RankFailure, match="rank 1 died with exit code 7") as failure:
        pair.run(exits_on, 2, 1)
    assert failure.value.rank == 1


def test_hanging_rank_times_out_and_shows_where(pair: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"(?s)rank 1 gave no answer in 3 s.*in hangs_on") as failure:
        pair.run(hangs_on, 2, 1, timeout_s=3)
    assert failure.value.rank == 1
    assert_works(pair)


def test_expected_errors_come_back_as_data_and_keep_the_processes(pair: RankPool) -> None:
    [pid] = pair.run(process_id, 1)
    errors = pair.expect_error(raises_in_turn, 2)
    assert [(error.rank, error.type_name, error.message) for error in errors] == [
        (0, "KeyError", "0"),
        (1, "KeyError", "1"),
    ]
    assert "LookupError" in errors[0].mro_names
    [error] = pair.expect_error(returns_unpicklable, 1)
    assert "lambda" in error.message
    assert pair.run(process_id, 1) == [pid]


def test_expecting_an_error_that_does_not_come_fails(pair: RankPool) -> None:
    with pytest.raises(RankFailure, match="rank 0 returned instead of raising"):
        pair.expect_error(answers, 1, None)


def test_one_rank_raising_alone_is_no_expected_error(pair: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"(?s)rank 0 gave no answer.*rank 1 raised ValueError: rank 1 is bad"):
        pair.expect_error(raises_on, 2, 1, timeout_s=1)


def process_id(group: dist.ProcessGroup) -> int:
    return os.getpid()


PROGRAM = """
import sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.ones(1)
dist.all_reduce(x)
print(f"{dist.get_rank()} of {x.item():g} is told {sys.argv[1:]}", flush=True)
if dist.get_rank() == 1:
    if "fail" in sys.argv:
        raise ValueError("rank 1 is bad")
    time.sleep(1000 if "hang" in sys.argv else 0)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def test_launched_programs_meet_and_print(program: Path) -> None:
    said = launch(program, "what", ranks=3)
    assert said.splitlines() == [f"{rank} of 3 is told ['what']" for rank in range(3)]


def test_launched_programs_that_fail_or_hang_are_told_of(program: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)1 of 2 is told.*ValueError: rank 1 is bad"):
        launch(program, "fail")
    with pytest.raises(AssertionError, match=r"(?s)ended with \[-9, -9\].*0 of 2 is told"):
        launch(program, "hang", timeout_s=2)


# --- oracle ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("v_dim", [4, 6])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_oracle_agrees_with_torch(kv_heads: int, v_dim: int) -> None:
    x = tensors(0, 2, 7, 9, 4, kv_heads, 4, v_dim, torch.float64)
    allowed = torch.from_numpy(mask_case("causal").allowed(7, 9))
    q, k, v = (part.transpose(1, 2).requires_grad_() for part in (x.q, x.k, x.v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    grads = torch.autograd.grad(out, (q, k, v), x.dout)
    ours = dense_gradients(x.q, x.k, x.v, allowed, x.dout, scale=0.3)
    assert_close(ours.out, out, atol=1e-12, name="out")
    for name, actual, expected in zip("qkv", (ours.dq, ours.dk, ours.dv), grads, strict=True):
        assert_close(actual, expected.transpose(1, 2), atol=1e-12, name=f"d{name}")


def test_oracle_by_hand() -> None:
    q = torch.tensor([[[[1.0]], [[1.0]]]])  # two queries, the second with nothing to see
    k, v = torch.tensor([[[[0.0]], [[2.0]]]]), torch.tensor([[[[1.0]], [[3.0]]]])
    allowed = torch.tensor([[True, True], [False, False]])
    e2 = np.exp(2)
    out, lse = dense_attention(q, k, v, allowed, scale=1.0)
    np.testing.assert_allclose(out.flatten(), [(1 + 3 * e2) / (1 + e2), 0])
    np.testing.assert_allclose(lse.flatten(), [np.log(1 + e2), -np.inf])
    out, lse = dense_attention(q, k, v, allowed, scale=1.0, sink=torch.tensor([2.0]))
    np.testing.assert_allclose(out.flatten(), [(1 + 3 * e2) / (1 + 2 * e2), 0])
    np.testing.assert_allclose(lse.flatten(), [np.log(1 + 2 * e2), 2])
    capped = np.exp(np.tanh(2))
    out, lse = dense_attention(q, k, v, allowed, scale=1.0, softcap=1.0)
    np.testing.assert_allclose(out.flatten(), [(1 + 3 * capped) / (1 + capped), 0])


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("has_sink", [False, True])
def test_oracle_gradients(softcap: float | None, has_sink: bool) -> None:
    x = tensors(1, 2, 3, 2, 2, 1, 2, 3, torch.float64)
    allowed = torch.from_numpy(mask_case("window_self").allowed(3, 2))
    allowed[1] = False
    per_row = torch.stack([allowed, ~allowed])
    sink = torch.tensor([0.3, -0.8], dtype=torch.float64, requires_grad=True) if has_sink else None

    def attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse = dense_attention(q, k, v, per_row, softcap=softcap, sink=sink)
        return out, lse.masked_fill(lse.isinf(), 0)  # gradcheck subtracts, and inf - inf is NaN

    q, k, v = (part.requires_grad_() for part in x[:3])
    inputs = (q, k, v, sink)
    assert torch.autograd.gradcheck(attend, inputs)  # type: ignore[arg-type]  # None is fine
    result = dense_gradients(q, k, v, per_row, x.dout, x.dlse, softcap=softcap, sink=sink)
    assert not any(part.isnan().any() for part in result if part is not None)
    assert (result.out[0, 1] == 0).all()
    assert (result.dq[0, 1] == 0).all()
    assert (result.dsink is not None) == has_sink
    lse_of_empty = torch.full((2,), -torch.inf) if sink is None else sink.detach()
    assert result.lse[0, :, 1].equal(lse_of_empty.double())


def test_oracle_takes_no_keys_no_queries_and_every_shape_of_allowed() -> None:
    x = tensors(2, 2, 5, 0, 2, 2, 4, 4, torch.float32)
    out, lse = dense_attention(x.q, x.k, x.v, torch.ones(5, 0, dtype=torch.bool))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    x = tensors(2, 2, 0, 5, 2, 2, 4, 4, torch.float32)
    assert dense_attention(x.q, x.k, x.v, torch.ones(0, 5, dtype=torch.bool))[0].shape == (2, 0, 2, 4)
    x = tensors(2, 2, 5, 5, 2, 2, 4, 4, torch.float32)
    allowed = torch.from_numpy(mask_case("causal").allowed(5, 5))
    expected, _ = dense_attention(x.q, x.k, x.v, allowed)
    for same in (allowed.expand(2, 5, 5), allowed.expand(2, 1, 5, 5)):
        assert dense_attention(x.q, x.k, x.v, same)[0].equal(expected)


def test_plain_stays_in_its_dtype() -> None:
    x = tensors(3, 1, 5, 5, 4, 2, 4, 4, torch.bfloat16)
    allowed = torch.from_numpy(mask_case("window_left").allowed(5, 5))
    sink = torch.zeros(4)
    plain = plain_gradients(x.q, x.k, x.v, allowed, x.dout, x.dlse, sink=sink)
    exact = dense_gradients(x.q, x.k, x.v, allowed, x.dout, x.dlse, sink=sink)
    assert {part.dtype for part in plain[:5]} == {torch.bfloat16}
    assert {part.dtype for part in exact if part is not None} == {torch.float64}
    for name, a, b in zip(plain._fields, plain, exact, strict=True):
        assert a is not None
        assert b is not None
        assert_close(a, b, atol=0.2, name=name, check_dtype=False)
    assert plain_attention(x.q, x.k, x.v, allowed, sink=sink)[0].equal(plain.out)


# --- compare --------------------------------------------------------------------------------------


def test_close_names_the_worst_element() -> None:
    expected = torch.zeros(2, 3)
    actual = expected.clone()
    actual[0, 1], actual[1, 2] = 0.25, -0.5
    assert_close(actual, expected, atol=0.5, name="out")
    message = "out[1, 2] = -0.5, expected 0: error 0.5, allowed 0.1 (atol = 0.1); 2 of 6 elements are off"
    with pytest.raises(AssertionError, match=re.escape(message)):
        assert_close(actual, expected, atol=0.1, name="out")


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ([torch.nan], [1.0]),
        ([torch.inf], [1.0]),
        ([1.0], [torch.inf]),
        ([-torch.inf], [torch.inf]),
        ([torch.nan], [torch.nan]),
        ([torch.nan], [-torch.inf]),
        ([1.0, 1.0], [1.0]),
    ],
)
def test_compare_fails(actual: list[float], expected: list[float]) -> None:
    a, b = torch.tensor(actual, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"^x"):
        assert_close(a, b, atol=1e300, name="x")
    with pytest.raises(AssertionError, match="x"):
        assert_within_rule(a, b, b.clone(), name="x", floor_factor=1e300)


def test_compare_checks_dtypes_unless_told_otherwise() -> None:
    a, b = torch.zeros(3), torch.zeros(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="dtype"):
        assert_close(a, b, atol=1, name="x")
    with pytest.raises(AssertionError, match="dtype"):
        assert_within_rule(a, b, b, name="x")
    assert_close(a, b, atol=0, name="x", check_dtype=False)
    assert_within_rule(a, b, b, name="x", check_dtype=False)
    with pytest.raises(AssertionError, match="float64"):
        assert_within_rule(a, a, a, name="x")


def test_compare_passes_what_it_should() -> None:
    same = torch.tensor([-torch.inf, 0.0, 1.0])
    assert_close(same, same.clone(), atol=0, name="x")
    assert_close(torch.empty(0, 3), torch.empty(0, 3), atol=0, name="x")
    assert_within_rule(torch.empty(0), torch.empty(0).double(), torch.empty(0), name="x")
    assert_within_rule(same, same.double(), same, name="x")


def test_rule_allows_twice_plain_and_a_floor() -> None:
    expected = torch.tensor([4.0, -torch.inf], dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps

    def off_by(error: float) -> Tensor:
        return (expected + error).float()

    assert_within_rule(off_by(0.5), expected, off_by(0.25), name="x")
    assert_within_rule(off_by(8 * eps), expected, off_by(0), name="x", floor_factor=2)
    for error, plain_error in ((0.51, 0.25), (12 * eps, 0)):
        with pytest.raises(AssertionError, match=r"x\[0\] = 4.*2 x plain's"):
            assert_within_rule(off_by(error), expected, off_by(plain_error), name="x", floor_factor=2)
    with pytest.raises(AssertionError, match="plain PyTorch is not finite"):
        assert_within_rule(off_by(0), expected, torch.full((2,), -torch.inf), name="x")


# --- cases ----------------------------------------------------------------------------------------


def test_definitions_by_hand() -> None:
    def shown(name: str, q_len: int, k_len: int) -> list[str]:
        return ["".join(".x"[int(sees)] for sees in row) for row in mask_case(name).allowed(q_len, k_len)]

    assert shown("causal", 3, 3) == ["x..", "xx.", "xxx"]
    assert shown("anti_causal", 3, 2) == ["xx", ".x", ".."]
    assert shown("window_self", 3, 3) == ["x..", ".x.", "..x"]
    assert shown("window_both", 6, 4) == ["xxx.", "xxxx", "xxxx", "xxxx", ".xxx", "..xx"]
    assert shown("prefix_some", 6, 6) == ["xx....", "xx....", "xxx...", "xxxx..", "xxxxx.", "xxxxxx"]
    assert shown("prefix_long", 2, 3) == ["xxx", "xxx"]
    assert shown("documents", 10, 10) == ["xxxxxxx..."] * 7 + [".......x.."] + ["........xx"] * 2
    assert shown("documents&causal", 10, 10)[6:] == ["xxxxxxx...", ".......x..", "........x.", "........xx"]
    assert shown("chunked_5", 7, 6) == ["xxxxx."] * 5 + [".....x"] * 2
    assert shown("full", 1, 2) == ["xx"]


@pytest.mark.parametrize("seq_len", [0, 1, 7, 8, 20, 44, 45, 100])
def test_documents_fill_the_sequence(seq_len: int) -> None:
    ends = cu_seqlens(seq_len)
    assert ends == sorted(ends)
    assert ends[0] == 0
    assert ends[-1] == seq_len
    assert max(np.diff(ends)) <= 19


def test_cases_have_names_of_their_own_and_travel_by_them() -> None:
    for cases in (MASK_CASES, LAYOUT_CASES):
        assert len(set(case_ids(cases))) == len(cases)
    for mask in MASK_CASES:
        assert pickle.loads(pickle.dumps(mask)) is mask
    assert pickle.loads(pickle.dumps(layout_case("zigzag"))) is layout_case("zigzag")
    assert "documents" not in " ".join(case_ids(CROSS_MASK_CASES))


def test_tensors_depend_on_their_arguments_alone() -> None:
    first = tensors(5, 2, 3, 4, 6, 2, 8, 5, torch.float16)
    torch.manual_seed(1)
    again = tensors(5, 2, 3, 4, 6, 2, 8, 5, torch.float16)
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not first.q.equal(tensors(6, 2, 3, 4, 6, 2, 8, 5, torch.float16).q)
    shapes = [(2, 3, 6, 8), (2, 4, 2, 8), (2, 4, 2, 5), (2, 3, 6, 5), (2, 6, 3)]
    assert [tuple(x.shape) for x in first] == shapes
    assert [x.dtype for x in first] == [torch.float16] * 4 + [torch.float32]


# --- poison ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_poison_reaches_every_kind_of_empty(dtype: torch.dtype) -> None:
    source = torch.zeros(3, 4, dtype=dtype)
    with poisoned_empty():
        made = [torch.empty(3, 4, dtype=dtype), torch.empty_like(source), source.new_empty(3, 4)]
        made += [torch.empty_strided((3, 4), (4, 1), dtype=dtype), torch.empty_like(source.T)]
        whole = torch.empty(5, dtype=torch.int64)
    assert all(x.isnan().all() for x in made)
    assert (whole == torch.iinfo(torch.int64).max).all()


class _Leaky(torch.autograd.Function):
    """Reads memory that its backward never wrote."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return torch.empty_like(grads[0])


def test_poison_reaches_backward() -> None:
    x = torch.ones(1000, requires_grad=True)
    with poisoned_empty():
        _Leaky.apply(x).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.isnan().all()


def test_poison_nests_and_leaves_no_trace() -> None:
    with contextlib.suppress(KeyError), poisoned_empty():
        with poisoned_empty():
            pass
        assert torch.empty(4).isnan().all()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
