"""Merging partial softmax: exact, in any order, and safe where nothing was attended to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ringattn.kernels.paged.native_paged import NativePaged
from ringattn.kernels.paged.reference_paged import ReferencePaged
from ringattn.softmax import accumulation_dtype, add_sink_, empty_state, merge_, merge_parts, sink_gradient
from tests.harness.compare import assert_close, assert_within_rule

State = tuple[Tensor, Tensor]
SHAPE = (2, 5, 3, 4)  # batch, rows, heads, dim
EMPTY_SIDES = ("left", "right", "both")


def scores_and_values(keys: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores (B, H, S, keys) of very different sizes, and values (B, keys, H, D)."""
    generator = torch.Generator().manual_seed(seed)
    batch, rows, heads, dim = SHAPE
    scores = 20 * torch.randn(batch, heads, rows, keys, generator=generator, dtype=torch.float64)
    return scores, torch.randn(batch, keys, heads, dim, generator=generator, dtype=torch.float64)


def attention(scores: Tensor, values: Tensor) -> State:
    """By the definition; no keys give (0, -inf)."""
    if not scores.shape[-1]:
        return torch.zeros(SHAPE, dtype=scores.dtype), scores.new_full(scores.shape[:3], -torch.inf)
    return torch.einsum("bhsk,bkhd->bshd", scores.softmax(-1), values), scores.logsumexp(-1)


def parts(*sizes: int) -> tuple[list[State], State]:
    """Attention over each part of the keys, and over all of them."""
    scores, values = scores_and_values(sum(sizes))
    split = zip(torch.split(scores, list(sizes), -1), torch.split(values, list(sizes), 1), strict=True)
    return [attention(s, v) for s, v in split], attention(scores, values)


def merged(*states: State) -> State:
    out, lse = (x.clone() for x in states[0])
    for part, part_lse in states[1:]:
        merge_(out, lse, part, part_lse)
    return out, lse


def assert_same(actual: State, expected: State, atol: float = 1e-13) -> None:
    assert_close(actual[0], expected[0], atol=atol, name="out")
    assert_close(actual[1], expected[1], atol=atol, name="lse")


@pytest.mark.parametrize("sizes", [(1, 1), (3, 4), (1, 9), (2, 0, 3), (0, 5), (1,) * 12], ids=str)
def test_is_exact_in_float64(sizes: tuple[int, ...]) -> None:
    states, expected = parts(*sizes)
    assert_same(merged(*states), expected, atol=1e-12)


def test_commutes() -> None:
    (a, b), _ = parts(3, 4)
    assert_same(merged(a, b), merged(b, a))


def test_associates() -> None:
    (a, b, c), _ = parts(3, 4, 2)
    assert_same(merged(merged(a, b), c), merged(a, merged(b, c)))


def test_fp32_is_exact_to_rounding() -> None:
    states, expected = parts(3, 4, 2, 7)
    found = merged(*[(out.float(), lse.float()) for out, lse in states])
    assert found[0].dtype is found[1].dtype is torch.float32
    # An error of eps * |lse|, up to 60, in an exponent, and a few roundings.
    assert_same((found[0].double(), found[1].double()), expected, atol=3e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_takes_parts_of_another_dtype(dtype: torch.dtype) -> None:
    (a, b), _ = parts(3, 4)
    half = (b[0].to(dtype), b[1].float())
    state = merged((a[0].float(), a[1].float()), half)
    assert_same(state, merged((a[0].float(), a[1].float()), (half[0].float(), half[1])), atol=1e-6)
    assert state[0].dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("empty", EMPTY_SIDES)
def test_nothing_is_the_neutral_element(empty: str, dtype: torch.dtype) -> None:
    """Bit for bit, and without a NaN on the way."""
    (something,), _ = parts(3)
    something = (something[0].to(dtype), something[1].to(dtype))
    nothing = empty_state(torch.empty(SHAPE, dtype=dtype), SHAPE[3])
    a, b = {"left": (nothing, something), "right": (something, nothing), "both": (nothing, nothing)}[empty]
    expected = nothing if empty == "both" else something
    found = merged(a, b)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_nothing_in_some_rows() -> None:
    (a, b), both = parts(3, 4)
    a[0][:, 0], a[1][:, :, 0] = 0, -torch.inf
    b[0][:, 1], b[1][:, :, 1] = 0, -torch.inf
    a[0][:, 2], a[1][:, :, 2] = 0, -torch.inf
    b[0][:, 2], b[1][:, :, 2] = 0, -torch.inf
    out, lse = merged(a, b)
    assert torch.equal(out[:, 0], b[0][:, 0])
    assert torch.equal(out[:, 1], a[0][:, 1])
    assert (out[:, 2] == 0).all()
    assert (lse[:, :, 2] == -torch.inf).all()
    assert_same((out[:, 3:], lse[:, :, 3:]), (both[0][:, 3:], both[1][:, :, 3:]), atol=1e-12)


@pytest.mark.parametrize("gap", [200.0, 1e4, 1e30])
def test_very_unequal_parts(gap: float) -> None:
    (a, b), _ = parts(3, 4)
    for small, large in ((a, (b[0], b[1] + gap)), ((a[0], a[1] - gap), b)):
        assert_same(merged(small, large), large, atol=1e-12 * max(1.0, gap))
        assert merged(small, large)[0].isfinite().all()


def test_writes_to_views() -> None:
    (a, b), expected = parts(3, 4)
    out, lse = torch.full((2, 9, 6, 4), 7.0, dtype=torch.float64), torch.full((2, 6, 9), 7.0, dtype=torch.float64)
    here, there = out[:, 2:7, ::2], lse[:, ::2, 2:7]
    here.copy_(a[0])
    there.copy_(a[1])
    merge_(here, there, *b)
    assert_same((here, there), expected, atol=1e-12)
    assert (out[:, :2] == 7).all()
    assert (out[:, :, 1::2] == 7).all()
    assert (lse[:, 1::2] == 7).all()


def test_leaves_the_part_alone() -> None:
    (a, b), _ = parts(3, 4)
    before = b[0].clone(), b[1].clone()
    merged(a, b)
    assert torch.equal(b[0], before[0])
    assert torch.equal(b[1], before[1])


def test_empty_state() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        out, lse = empty_state(torch.empty(2, 5, 3, 4, dtype=dtype), 7)
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        assert out.dtype is lse.dtype is accumulation_dtype(dtype) is wide
        assert (out.shape, lse.shape) == ((2, 5, 3, 7), (2, 3, 5))
        assert (out == 0).all()
        assert (lse == -torch.inf).all()


def with_sink(scores: Tensor, values: Tensor, sink: Tensor) -> State:
    """The definition: the sink is one more key, whose value is zero."""
    column = sink[None, :, None, None].expand(*scores.shape[:3], 1)
    nothing = values.new_zeros(values.shape[0], 1, *values.shape[2:])
    return attention(torch.cat([scores, column], -1), torch.cat([values, nothing], 1))


@pytest.mark.parametrize("keys", [0, 1, 6])
def test_add_sink(keys: int) -> None:
    scores, values = scores_and_values(keys)
    sink = torch.tensor([-3.0, 0.5, 40.0], dtype=torch.float64)
    state = attention(scores, values)
    add_sink_(*state, sink)
    assert_same(state, with_sink(scores, values, sink), atol=1e-12)


def test_a_sink_of_minus_infinity_is_none() -> None:
    state = attention(*scores_and_values(6))
    before = state[0].clone(), state[1].clone()
    add_sink_(*state, torch.full((3,), -torch.inf))
    assert torch.equal(state[0], before[0])
    assert torch.equal(state[1], before[1])


@pytest.mark.parametrize("keys", [0, 6])
def test_sink_gradient(keys: int) -> None:
    scores, values = scores_and_values(keys)
    sink = torch.tensor([-3.0, 0.5, 4.0], dtype=torch.float64, requires_grad=True)
    out, lse = with_sink(scores, values, sink)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    dlse = torch.randn(lse.shape, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad([out, lse], [sink], [dout, dlse])
    delta = (dout * out).sum(-1).transpose(1, 2) - dlse
    found = sink_gradient(sink.detach(), lse.detach(), delta.detach())
    assert_close(found, expected, atol=1e-12, name="dsink")


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 5])
def test_parts_of_many_ranks_at_once(num_parts: int, with_sink: bool) -> None:
    """The reference and the native operator, with rows that nobody has seen; in the order of ranks, to the bit."""
    generator = torch.Generator().manual_seed(num_parts)
    lses = 4 * torch.randn(num_parts, 2, 5, 3, generator=generator)
    lses[0, 0, :3] = -torch.inf
    lses[:, 1, 2] = -torch.inf
    outs = torch.randn(num_parts, 2, 3, 5, 7, generator=generator)
    outs[(lses == -torch.inf).transpose(2, 3)] = 0
    sink = torch.tensor([0.3, -torch.inf, 2.0, -40.0, 5.0]) if with_sink else None
    scores = lses.double() if sink is None else torch.cat([lses, sink[:, None].expand_as(lses[:1])]).double()
    weights = scores.softmax(0).nan_to_num(nan=0.0)[:num_parts].transpose(2, 3)[..., None]
    expected = (weights * outs.double()).sum(0)
    assert_close(merge_parts(outs.double(), lses.double(), sink=sink), expected, atol=1e-12, name="float64")
    assert NativePaged().available() == []
    for merge in (ReferencePaged().merge, NativePaged().merge):
        whole = merge(outs, lses, 0, sink)
        assert_within_rule(whole, expected, merge_parts(outs, lses, sink=sink), name="fp32")
        for first in range(num_parts):  # in whatever place the part lies that stands first
            order = [first, *(i for i in range(num_parts) if i != first)]
            assert torch.equal(merge(outs[order], lses[order], first, sink), whole)
        some = slice(1, 4)  # heads alone, as strided views
        part = merge(outs[:, :, :, some], lses[:, :, some], 0, None if sink is None else sink[some])
        assert torch.equal(part, whole[:, :, some])
