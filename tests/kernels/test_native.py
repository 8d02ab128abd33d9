"""The native kernel: each instruction set against the contract, and what the contract's cases are too small for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ringattn.geometry.tiles import Tile, Tiles
from ringattn.kernels import BACKENDS, BackwardQueries, Gradients, Keys, Queries, State
from ringattn.kernels.native import NativeKernel, instruction_sets
from ringattn.score import Score
from tests.geometry.brute import tile_counts
from tests.geometry.strategies import examples, tiles
from tests.harness import oracle
from tests.harness.cases import tensors
from tests.harness.compare import assert_close, assert_within_rule
from tests.kernels.contract_suite import (
    BANDS,
    CASES,
    CAUSAL,
    MIXED,
    WHOLE,
    Case,
    check,
    fitted,
    forward,
    run_once,
    tile,
    why_not,
)

ISAS = ("avx512_bf16", "avx512", "avx2", "portable", "emulated_bf16")
ANYWHERE = ("portable", "emulated_bf16")
# Of the bands, which the default instruction set runs all of, each other one runs some.
SOME = [case for case in CASES if case not in BANDS] + list(BANDS[::5])


@pytest.fixture(autouse=True)
def _loaded() -> None:
    assert not NativeKernel().available()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this processor has, as the native backend."""
    name: str = request.param
    if name not in instruction_sets(torch.bfloat16):
        assert name not in ANYWHERE
        pytest.skip(f"this processor has no {name}")
    monkeypatch.setitem(BACKENDS, "native", NativeKernel(isa=name))
    return name


def run(case: Case) -> None:
    """Checks a case in the widest dtype that the instruction set takes, or not at all where it takes none."""
    case = fitted("native", "cpu", case)
    if reasons := why_not("native", "cpu", case):
        pytest.skip(" and ".join(reasons))
    check("native", "cpu", case)


@pytest.mark.parametrize("case", SOME, ids=[case.name for case in SOME])
def test_contract(isa: str, case: Case) -> None:
    run(case)


DIMS = [(16, 16), (17, 40), (24, 33), (47, 50), (64, 72), (80, 65), (96, 31), (127, 128), (128, 16), (160, 129)]
DIMS += [(192, 128), (255, 253), (256, 256), (1, 256), (256, 1)]


@pytest.mark.parametrize(("dim", "v_dim"), DIMS)
def test_dims(isa: str, dim: int, v_dim: int) -> None:
    rows, cols = 117, 131
    blocks = ((tile(range(rows), range(cols), hi=3),), (tile(range(5, rows), range(2, cols - 1), lo=-70, hi=1),))
    run(Case("dims", blocks, rows, cols, 1, 2, 1, dim, v_dim, scale=dim**-0.5))


@pytest.mark.parametrize("width", [1, 7, 16, 17, 33, 50, 100])
@pytest.mark.parametrize("shift", [0, 5])
def test_narrow_windows(isa: str, width: int, shift: int) -> None:
    """Both edges of the band cross a block of queries, whose vectors then see different keys."""
    window = tile(range(131), range(150), lo=shift - width + 1, hi=shift)
    run(Case("narrow", ((window,),), 131, 150, 1, 2, 1, 17, 20, scale=0.3))


@pytest.mark.parametrize("scale", [0.0, -0.4, -3.0, 1e-30, 100.0])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_scales(isa: str, scale: float, softcap: float | None) -> None:
    run(Case("scales", (CAUSAL, MIXED), scale=scale, softcap=softcap, heads=4, dim=18, v_dim=5))


def test_huge_scores_take_the_largest(isa: str) -> None:
    """Where one score is far above the others, its value is the output, and nothing is NaN."""
    dtype = torch.bfloat16 if isa.endswith("bf16") else torch.float32
    t = tensors(5, 2, 50, 70, 2, 1, 16, 24, dtype)
    scores = torch.einsum("bqhd,bkd->bhqk", t.q.double(), t.k[:, :, 0].double())
    best = scores.topk(2, -1)
    sure = best.values[..., 0] - best.values[..., 1] > 1e-2
    listed = Tiles.of(tile(range(50), range(70)))
    out, lse = forward(BACKENDS["native"], t.q, t.k, t.v, listed, Score(1e12))
    batch = torch.arange(2)[:, None, None]
    expected = t.v[:, :, 0][batch, best.indices[..., 0]].float().transpose(1, 2)
    assert sure.float().mean() > 0.9
    assert out.isfinite().all()
    rounding = 2.0**-8 if isa.endswith("bf16") else 1e-6
    torch.testing.assert_close(out[sure.transpose(1, 2)], expected[sure.transpose(1, 2)], rtol=rounding, atol=0)
    torch.testing.assert_close(lse.double(), best.values[..., 0] * 1e12, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["", *ANYWHERE])
@given(data=st.data())
@examples(20)
def test_random_large_tiles(name: str, data: st.DataObject) -> None:
    """Several segments, whose queries overlap, of single batch rows or all of them; any number of threads."""
    batch, rows, cols = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 150)), data.draw(st.integers(1, 150))
    blocks = []
    for _ in range(data.draw(st.integers(1, 2))):
        kept: list[Tile] = []
        for drawn in data.draw(st.lists(tiles(rows, cols, batch), min_size=1, max_size=6)):
            if int(tile_counts([*kept, drawn], batch, rows, cols).max(initial=0)) <= 1:
                kept.append(drawn)
        blocks.append(tuple(kept))
    heads, kv_heads = data.draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1), (5, 1)]))
    case = Case(
        "large random tiles", tuple(blocks), rows, cols, batch, heads, kv_heads,
        dim=data.draw(st.integers(1, 40)), v_dim=data.draw(st.integers(1, 40)),
        scale=data.draw(st.sampled_from([0.3, -0.3])), softcap=data.draw(st.sampled_from([None, None, 2.0])),
        lse_grad=data.draw(st.booleans()), strided=data.draw(st.booleans()),
        previous=data.draw(st.booleans()), tile_by_tile=data.draw(st.booleans()),
    )  # fmt: skip
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, "native", NativeKernel(isa=name))
        run(case)


def results(case: Case, *, threads: int) -> tuple[Tensor, ...]:
    """(out, lse, dq, dk, dv) of a case with one block."""
    torch.set_num_threads(threads)
    return run_once(BACKENDS["native"], case)


WIDE = Case("threads", ((tile(range(200), range(333), hi=133),),), 200, 333, 1, 3, 1, 24, 17, torch.float32)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_threads(threads: int, kv_heads: int) -> None:
    """One kv head for several threads: its keys are cut into parts, whose gradients of q are summed up."""
    case = replace(WIDE, heads=2 * kv_heads, kv_heads=kv_heads)
    torch.set_num_threads(threads)
    check("native", "cpu", case)
    first, again, alone = results(case, threads=threads), results(case, threads=threads), results(case, threads=1)
    for one, two, three in zip(first, again, alone, strict=True):
        assert torch.equal(one, two), "the same number of threads gives the same bits"
        torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-5)


def test_parts_add_to_what_is_held() -> None:
    torch.set_num_threads(3)
    check("native", "cpu", replace(WIDE, previous=True, strided=True))


def test_merges_with_a_state_of_rows_seen_and_unseen(isa: str) -> None:
    """Some rows come with a state and some without; some are attended to now, and some are not."""
    dtype = torch.bfloat16 if isa.endswith("bf16") else torch.float32
    rows, cols = 70, 61
    t = tensors(7, 2, rows, cols, 2, 2, 20, 13, dtype)
    lse = torch.where(torch.arange(rows) % 3 == 0, -torch.inf, t.dlse)
    lse[:, 1, 5], lse[:, 0, 7] = 80.0, -80.0  # one that outweighs what comes, and one that it outweighs
    out = t.dout.float().masked_fill(lse.transpose(1, 2)[..., None] == -torch.inf, 0.0)
    band = tile(range(rows), range(cols), lo=-20, hi=-3)  # rows 0 to 2 see nothing
    allowed = torch.from_numpy(tile_counts([band], 2, rows, cols)).bool()
    new, new_lse = oracle.dense_attention(t.q.double(), t.k.double(), t.v.double(), allowed, scale=0.3)
    plain, plain_lse = oracle.plain_attention(t.q, t.k, t.v, allowed, scale=0.3)
    wanted_lse = torch.logaddexp(lse.double(), new_lse)
    before, after = ((x.double() - wanted_lse).exp().nan_to_num(0.0).transpose(1, 2)[..., None] for x in (lse, new_lse))
    wanted, plainly = out.double() * before + new * after, out.double() * before + plain.double() * after
    unseen = wanted_lse == -torch.inf
    assert unseen.any()
    BACKENDS["native"].forward(Queries(t.q), Keys(t.k, t.v), Tiles.of(band), Score(0.3), State(out, lse))
    assert_within_rule(out, wanted, plainly.to(dtype), name="merged out", check_dtype=False)
    finite = ~unseen
    plainly_lse = torch.logaddexp(lse.double(), plain_lse.double())
    plainly_lse = plainly_lse[finite].to(dtype)
    assert_within_rule(lse[finite], wanted_lse[finite], plainly_lse, name="merged lse", check_dtype=False)
    assert (lse[unseen] == -torch.inf).all()
    assert (out.transpose(1, 2)[unseen] == 0).all()


@pytest.mark.parametrize("exponent", [-24, -20, -14, 3])
def test_small_halves(isa: str, exponent: int) -> None:
    """fp16 as small as it gets, subnormals among them, is read as it is."""
    if isa.endswith("bf16"):
        pytest.skip(f"{isa} takes bfloat16 only")
    t = tensors(11, 1, 40, 50, 1, 1, 19, 21, torch.float64)
    v = (t.v * 2.0**exponent).half()
    q, k = t.q.half(), t.k.half()
    assert (v.abs() < torch.finfo(torch.float16).tiny).any() == (exponent < -14 + 3)
    out, _ = forward(BACKENDS["native"], q, k, v, Tiles.of(tile(range(40), range(50))), Score(0.3))
    every = torch.ones(40, 50, dtype=torch.bool)
    wanted, _ = oracle.dense_attention(q.double(), k.double(), v.double(), every, scale=0.3)
    assert_close(out.double(), wanted, atol=1e-5 * float(wanted.abs().max()), name="out of small halves")


def test_infinities_stay_with_who_sees_them(isa: str) -> None:
    """An infinite value reaches the queries that see it, and no block of others; an unseen one reaches nobody."""
    dtype = torch.bfloat16 if isa.endswith("bf16") else torch.float16
    t = tensors(13, 1, 120, 120, 1, 1, 8, 8, dtype)
    t.v[:, 110], t.v[:, 59], t.k[:, 115:] = torch.inf, torch.inf, torch.inf
    first, second = tile(range(60), range(59)), tile(range(60, 120), range(60, 115))
    out, lse = forward(BACKENDS["native"], t.q, t.k, t.v, Tiles.of(first, second), Score(0.3))
    assert out[:, :60].isfinite().all()
    assert (out[:, 60:] == torch.inf).all()
    assert lse.isfinite().all()


def sparse(folder: Path, shape: Sequence[int], row: int, dtype: torch.dtype) -> Tensor:
    """A tensor (1, rows, 1, dim) whose rows lie `row` elements apart, in a file that holds little but holes."""
    size = (shape[1] - 1) * row + shape[3]
    file = folder / f"{len(list(folder.iterdir()))}"
    return torch.from_file(str(file), shared=True, size=size, dtype=dtype).as_strided(shape, (size, row, shape[3], 1))


def test_offsets_beyond_32_bits(isa: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if isa.endswith("bf16") else torch.float16
    rows, row = 6, (1 << 29) + 8
    assert (rows - 1) * row > 1 << 31
    case = Case("far rows", ((tile(range(rows), range(rows), hi=0),),), rows, rows, 1, 1, 1, 20, 20, dtype)
    t, listed, near = case.tensors(), Tiles.of(*case.blocks[0]), results(case, threads=1)
    q, k, v, dout = (sparse(tmp_path, x.shape, row, dtype).copy_(x) for x in (t.q, t.k, t.v, t.dout))
    out, dq, dk, dv = (sparse(tmp_path, x.shape, row, torch.float32).zero_() for x in (t.dout, t.q, t.k, t.v))
    lse = torch.full((1, 1, rows), -torch.inf)
    BACKENDS["native"].forward(Queries(q), Keys(k, v), listed, case.score, State(out, lse))
    delta = (t.dout * near[0]).sum(-1).transpose(1, 2).contiguous()
    queries = BackwardQueries(q, dout, lse, delta)
    BACKENDS["native"].backward(queries, Keys(k, v), listed, case.score, Gradients(dq, dk, dv))
    for name, far, expected in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, dq, dk, dv), near, strict=True):
        assert torch.equal(far, expected), name


def test_tiles_to_the_limits_of_integers() -> None:
    """Diagonals as far away as an integer can say mean the whole rectangle, or nothing."""
    far = (-(1 << 63), (1 << 63) - 1)
    t = replace(WIDE, blocks=(WHOLE,), rows=13, cols=11).tensors()
    found = []
    for lo, hi in ((-20, 20), far, (-(1 << 62), 1 << 62), (far[0], far[0]), (far[1], far[1]), (far[1], far[0])):
        out, lse = torch.zeros(t.dout.shape), torch.full(t.dlse.shape, -torch.inf)
        held = [torch.zeros_like(x) for x in (t.q, t.k, t.v)]
        table = torch.tensor([[0, 13, 0, 11, lo, hi, -1]])
        torch.set_num_threads(2)  # more than one part, whose work is counted
        torch.ops.ringattn_native.forward(t.q, t.k, t.v, table, 0.4, 0.0, out, lse, "")
        delta = torch.zeros_like(lse)
        torch.ops.ringattn_native.backward(t.dout, t.q, t.k, t.v, lse, delta, table, 0.4, 0.0, *held, "")
        found.append((out, lse, *held))
    whole, *others = found
    for wide in others[:2]:
        assert all(torch.equal(a, b) for a, b in zip(whole, wide, strict=True))
    for empty in others[2:]:
        assert all((x == (-torch.inf if i == 1 else 0)).all() for i, x in enumerate(empty))


def test_each_instruction_set_was_meant(isa: str) -> None:
    """Names are not just taken: what a set refuses, it refuses by name, and another name is nobody's."""
    call = replace(WIDE, dtype=torch.float32).call("cpu")
    refused = BACKENDS["native"].unsupported(call)
    assert bool(refused) == isa.endswith("bf16")
    assert all(isa in reason for reason in refused)
    assert NativeKernel(isa="avx3").unsupported(call)
