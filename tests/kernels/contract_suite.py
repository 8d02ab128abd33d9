"""What every kernel must promise by ringattn/kernels/contract.py, as cases and one check against the dense oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ringattn.geometry.tiles import Tile, Tiles
from ringattn.kernels import (
    BACKENDS,
    BackwardQueries,
    BlockKernel,
    Gradients,
    Keys,
    ProblemSpec,
    Queries,
    State,
    refusals,
)
from ringattn.score import Score
from ringattn.softmax import accumulation_dtype, empty_state
from tests.geometry.brute import tile_counts
from tests.harness import oracle
from tests.harness.cases import Tensors, tensors
from tests.harness.compare import assert_close, assert_within_rule
from tests.harness.poison import poisoned_empty

NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """One problem: queries, some blocks of keys/values, and for each block the tiles that a kernel is called with."""

    name: str
    blocks: tuple[tuple[Tile, ...], ...]
    rows: int = 13
    cols: int = 11  # of each block
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    dim: int = 4
    v_dim: int = 4
    dtype: torch.dtype = torch.float64
    scale: float = 0.4
    softcap: float | None = None
    lse_grad: bool = False
    zero_dout: bool = False  # every other row of dout, and some gradients of lse, are exactly zero
    strided: bool = False
    previous: bool = False  # dq, dk, dv already hold something
    tile_by_tile: bool = False
    narrowed: bool = False  # from float64: too small, or too steep, for plain PyTorch to be a fair measure

    @property
    def score(self) -> Score:
        return Score(self.scale, self.softcap)

    def call(self, device: str) -> ProblemSpec:
        return ProblemSpec(device, self.dtype, self.heads, self.kv_heads, self.dim, self.v_dim, True, self.score)

    def allowed(self) -> Tensor:
        """(B, rows, blocks * cols) bool; the tiles must be disjoint."""
        counts = [tile_counts(tiles, self.batch, self.rows, self.cols) for tiles in self.blocks]
        together = torch.cat([torch.from_numpy(c) for c in counts], dim=2)
        assert int(together.max()) <= 1, f"{self.name}: tiles overlap"
        return together.bool()

    def tensors(self) -> Tensors:
        keys = self.cols * len(self.blocks)
        t = tensors(3, self.batch, self.rows, keys, self.heads, self.kv_heads, self.dim, self.v_dim, self.dtype)
        if self.zero_dout:
            t.dout[:, ::2] = 0
            t.dlse[:, :, ::3] = 0
        return t


def why_not(backend: str, device: str, case: Case) -> list[str]:
    """Every reason why a backend cannot run a case."""
    return refusals(backend, case.call(device))


def fitted(backend: str, device: str, case: Case) -> Case:
    """The case in the widest dtype that the backend takes: few compute in float64."""
    for dtype in (torch.float32, torch.bfloat16):
        if case.dtype is not torch.float64 or not why_not(backend, device, case):
            break
        narrower = replace(case, dtype=dtype, narrowed=True)
        if not why_not(backend, device, narrower):
            return narrower
    return case


def check(backend: str, device: str, case: Case) -> None:
    """Compares a kernel's forward and backward with the oracle: 1e-10 in float64, the tolerance rule otherwise."""
    t, allowed = case.tensors(), case.allowed()
    dlse = t.dlse if case.lse_grad else None
    wide_dlse = None if dlse is None else dlse.double()
    expected = oracle.dense_gradients(t.q, t.k, t.v, allowed, t.dout, wide_dlse, scale=case.scale, softcap=case.softcap)
    with poisoned_empty():
        found = run(backend, device, case, t, allowed, expected)
    plain, terms = None, None
    if case.narrowed:
        terms = oracle.sizes_of_terms(t.q, t.k, t.v, allowed, t.dout, dlse, scale=case.scale, softcap=case.softcap)
    if case.dtype is not torch.float64:
        plain = oracle.plain_gradients(t.q, t.k, t.v, allowed, t.dout, dlse, scale=case.scale, softcap=case.softcap)
    for name, actual in zip(NAMES, found, strict=True):
        told, wanted = f"{backend}'s {name} of {case.name}", getattr(expected, name)
        if plain is None:
            assert_close(actual, wanted, atol=1e-10, name=told)
        else:
            assert actual.dtype is torch.float32
            size = None if terms is None else getattr(terms, name)
            assert_within_rule(actual, wanted, getattr(plain, name), name=told, check_dtype=False, terms=size)
    unseen = ~allowed.any(-1)
    assert (found[0][unseen] == 0).all(), "rows without keys keep out = 0"
    assert (found[1].transpose(1, 2)[unseen] == -torch.inf).all(), "rows without keys keep lse = -inf"


def run(
    backend: str, device: str, case: Case, t: Tensors, allowed: Tensor, expected: oracle.Gradients
) -> tuple[Tensor, ...]:
    """Calls the kernel for each block in turn, and returns its own share of (out, lse, dq, dk, dv)."""
    kernel, acc = BACKENDS[backend], accumulation_dtype(case.dtype)
    q, dout = place(t.q, case, device), place(t.dout, case, device)
    # What no tile mentions must not be read: it may be another block's, or nothing at all.
    k_seen = allowed.any(1)[..., None, None]
    k = place(t.k.masked_fill(~k_seen, torch.nan), case, device)
    v = place(t.v.masked_fill(~k_seen, torch.nan), case, device)
    out = place(torch.zeros(t.dout.shape, dtype=acc), case, device)
    state = State(out, place(torch.full(t.dlse.shape, -torch.inf, dtype=acc), case, device))
    final_lse = expected.lse.to(acc).to(device)
    delta = (t.dout.double() * expected.out).sum(-1).transpose(1, 2)
    delta = (delta - t.dlse.double() if case.lse_grad else delta).to(acc).to(device)
    queries = BackwardQueries(q, dout, final_lse, delta, case.lse_grad)
    dq, dk, dv = [place(torch.full(x.shape, float(case.previous), dtype=acc), case, device) for x in (t.q, t.k, t.v)]
    for index, tiles in enumerate(case.blocks):
        here = slice(index * case.cols, (index + 1) * case.cols)
        for some in [(tile,) for tile in tiles] if case.tile_by_tile else [tiles]:
            listed = Tiles.of(*some)
            keys, held = Keys(k[:, here], v[:, here]), Gradients(dq, dk[:, here], dv[:, here])
            kernel.forward(Queries(q), keys, listed, case.score, state)
            kernel.backward(queries, keys, listed, case.score, held)
    added = (x - float(case.previous) for x in (dq, dk, dv))
    return tuple(x.cpu() for x in (*state, *added))


def run_once(kernel: BlockKernel, case: Case) -> tuple[Tensor, ...]:
    """(out, lse, dq, dk, dv) of one forward and one backward over the first block, from an empty state, in fp32."""
    t, tiles = case.tensors(), Tiles.of(*case.blocks[0])
    return run_tensors(kernel, t, tiles, case.score)


def run_tensors(kernel: BlockKernel, t: Tensors, tiles: Tiles, score: Score) -> tuple[Tensor, ...]:
    """The same, of tensors."""
    state = forward(kernel, t.q, t.k, t.v, tiles, score)
    delta = (t.dout.float() * state.out).sum(-1).transpose(1, 2).contiguous()
    held = Gradients(*(torch.zeros(x.shape) for x in (t.q, t.k, t.v)))
    kernel.backward(BackwardQueries(t.q, t.dout, state.lse, delta), Keys(t.k, t.v), tiles, score, held)
    return *state, *held


def forward(kernel: BlockKernel, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, score: Score) -> State:
    """The state of one forward, from an empty one."""
    state = empty_state(q, v.shape[3])
    kernel.forward(Queries(q), Keys(k, v), tiles, score, state)
    return state


def place(x: Tensor, case: Case, device: str) -> Tensor:
    """A copy on the device: contiguous, or strided, in the midst of a larger tensor that holds NaN."""
    if not case.strided:
        return x.to(device, copy=True)
    if x.dim() == 3:  # lse: every other head
        larger = torch.full((x.shape[0], 2 * x.shape[1], x.shape[2]), torch.nan, dtype=x.dtype, device=device)
        view = larger[:, ::2]
    else:  # heads before rows, as in fused projections; a dim of 8 more, so that rows stay aligned
        b, s, h, d = x.shape
        larger = torch.full((b, 2 * h, s, d + 8), torch.nan, dtype=x.dtype, device=device)
        view = larger.transpose(1, 2)[:, :, h:, :d]
    view.copy_(x)
    return view


def tile(q: range, k: range, lo: int = -(1 << 60), hi: int = 1 << 60, batch: int = -1) -> Tile:
    """A tile told by ranges of rows."""
    return Tile(q.start, q.stop, k.start, k.stop, lo, hi, batch)


WHOLE = (tile(range(13), range(11)),)
CAUSAL = (tile(range(13), range(11), hi=-1),)  # row 0 sees nothing
MIXED = (
    tile(range(5), range(3, 11), lo=1, hi=4),
    tile(range(6, 12), range(4), batch=0),
    tile(range(7, 13), range(2, 11), lo=-6, hi=-2, batch=1),
    tile(range(6, 9), range(8, 11), lo=0),
)


def _band(rows: int, lo: int, hi: int) -> tuple[Tile, ...]:
    return (tile(range(rows), range(rows), lo, hi),)


LARGE = Case("", (), rows=300, cols=300, batch=1, heads=2, kv_heads=1, dim=8, v_dim=8)
BANDS = tuple(
    replace(LARGE, name=f"band of {rows} rows, {lo} to {hi}", blocks=(_band(rows, lo, hi),))
    for rows, lo, hi in (
        (300, -200, 0),
        (300, -64, 0),
        (300, 0, 99),
        (300, -40, 90),
        (300, -63, 0),
        (300, -20, 10),
        (299, -1, 0),
        (300, -299, 0),
        (300, 0, 299),
        (300, -250, 250),
        (300, -150, -30),
        (257, 70, 140),
        (129, -64, 64),
        (65, -32, 32),
    )
)
BASE: tuple[Case, ...] = (
    Case("whole", (WHOLE,)),
    Case("causal", (CAUSAL,)),
    Case("several tiles", (MIXED,)),
    Case("no tiles", ((),)),
    Case("one row and one key", ((tile(range(4, 5), range(7, 8)),),)),
    Case("two blocks", (CAUSAL, MIXED)),
    Case("three blocks, one without tiles", (MIXED, (), WHOLE)),
    Case("tile by tile", (MIXED, WHOLE), tile_by_tile=True),
    Case("grouped heads", (CAUSAL, MIXED), heads=6, kv_heads=2),
    Case("one kv head", (MIXED,), heads=3, kv_heads=1),
    Case("narrow values", (CAUSAL, MIXED), dim=6, v_dim=3),
    Case("wide values", (CAUSAL, MIXED), dim=3, v_dim=7, heads=4, kv_heads=2),
    Case("head dim 1", (MIXED,), dim=1, v_dim=1),
    Case("head dim 16", (CAUSAL, MIXED), dim=16, v_dim=16),
    Case("head dim 64", (CAUSAL, MIXED), dim=64, v_dim=64),
    Case("head dim 96 and values 64", (CAUSAL, MIXED), dim=96, v_dim=64),
    Case("strided", (CAUSAL, MIXED), strided=True, heads=4),
    Case("strided with gradients of lse", (CAUSAL, MIXED), strided=True, heads=4, lse_grad=True),
    Case("gradients held before", (CAUSAL, MIXED), previous=True),
    Case("gradients of lse", (CAUSAL, MIXED), lse_grad=True, heads=4),
    Case("gradients of lse, dout zero", (CAUSAL, MIXED), lse_grad=True, zero_dout=True),
    Case("dout zero", (CAUSAL, MIXED), zero_dout=True),
    Case("large scale", (CAUSAL, MIXED), scale=30.0),
    *BANDS,
    replace(LARGE, name="bands of two blocks", blocks=(_band(300, -100, 0), _band(290, 5, 150)), batch=2),
    replace(LARGE, name="strided band", blocks=(_band(300, -80, 20),), batch=2, strided=True),
    replace(LARGE, name="strided masked band", blocks=(_band(300, -20, 20),), batch=2, strided=True, previous=True),
    replace(LARGE, name="band with gradients of lse", blocks=(_band(300, -100, 0),), lse_grad=True, zero_dout=True),
    replace(
        LARGE,
        name="bands of each batch row",
        blocks=((*_band(300, -70, 5), tile(range(300), range(300), 10, 150, 1)),),
        batch=2,
    ),
)

# In every dtype but float64.
ROUNDED: tuple[Case, ...] = tuple(
    replace(case, dtype=dtype, name=f"{case.name}, {str(dtype).removeprefix('torch.')}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for case in (
        Case("two blocks", (CAUSAL, MIXED), heads=4, kv_heads=2, dim=16, v_dim=16),
        Case("other values", (CAUSAL, WHOLE), heads=4, kv_heads=2, dim=16, v_dim=24, strided=True),
        Case("gradients of lse", (CAUSAL, WHOLE), dim=64, v_dim=64, lse_grad=True, zero_dout=True),
        replace(LARGE, name="bands", blocks=(_band(300, -100, 0), _band(300, 3, 20)), dim=96, v_dim=96, scale=0.1),
    )
)

# Cases of the options that a kernel is free to refuse.
SOFTCAP: tuple[Case, ...] = (
    Case("softcap", (CAUSAL, MIXED), softcap=1.5),
    Case("softcap with gradients of lse", (CAUSAL, MIXED), softcap=0.7, lse_grad=True, zero_dout=True),
    replace(LARGE, name="band with softcap", blocks=(_band(300, -100, 0),), softcap=2.0),
    Case("softcap, bfloat16", (CAUSAL, MIXED), softcap=1.5, dtype=torch.bfloat16),
)

CASES = BASE + ROUNDED + SOFTCAP
