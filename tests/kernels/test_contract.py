"""Every backend against the contract, on every device that is here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringattn.geometry.tiles import Tile, Tiles
from ringattn.kernels import BACKENDS, Keys, Queries, State
from ringattn.kernels.reference import ReferenceKernel
from ringattn.score import Score
from tests.geometry.brute import tile_counts
from tests.geometry.strategies import examples, tiles
from tests.kernels.contract_suite import CASES, Case, check, fitted, why_not

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
# What must run, whatever machine this is: a suite of skips proves nothing.
NEVER_SKIPPED = (("native", "cpu"), ("reference", "cpu"), ("sdpa", "cpu"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_case(case: Case, backend: str, device: str) -> None:
    case = fitted(backend, device, case)
    reasons = why_not(backend, device, case)
    optional = backend == "sdpa" and case.softcap is not None
    if (backend, device) in NEVER_SKIPPED and not optional:
        assert not reasons
    if reasons:
        pytest.skip(f"{backend} on {device}: {' and '.join(reasons)}")
    check(backend, device, case)


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@examples(60)
def test_random_tiles(backend: str, data: st.DataObject) -> None:
    """Any disjoint tiles against two blocks, any heads and dims."""
    batch, rows, cols = (data.draw(st.integers(1, most)) for most in (2, 24, 24))
    blocks = []
    for _ in range(2):
        kept: list[Tile] = []
        for tile in data.draw(st.lists(tiles(rows, cols, batch), max_size=4)):
            if int(tile_counts([*kept, tile], batch, rows, cols).max(initial=0)) <= 1:
                kept.append(tile)
        blocks.append(tuple(kept))
    heads, kv_heads = data.draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]))
    case = Case(
        "random tiles", tuple(blocks), rows, cols, batch, heads, kv_heads,
        dim=data.draw(st.integers(1, 5)), v_dim=data.draw(st.integers(1, 5)),
        lse_grad=data.draw(st.booleans()), strided=data.draw(st.booleans()),
        previous=data.draw(st.booleans()), tile_by_tile=data.draw(st.booleans()),
    )  # fmt: skip
    case = fitted(backend, "cpu", case)
    if reasons := why_not(backend, "cpu", case):
        pytest.skip(f"{backend}: {' and '.join(reasons)}")
    check(backend, "cpu", case)


def test_a_backend_that_ignores_a_tile_is_caught() -> None:
    """The suite itself can fail: a kernel that drops a tile does not pass."""
    case = next(case for case in CASES if case.name == "several tiles")

    class Forgetful(ReferenceKernel):
        def forward(self, queries: Queries, keys: Keys, tiles: Tiles, score: Score, state: State) -> None:
            super().forward(queries, keys, Tiles(tiles.table[1:]), score, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, "reference", Forgetful())
        with pytest.raises(AssertionError, match="reference's out of several tiles"):
            check("reference", "cpu", case)
