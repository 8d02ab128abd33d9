"""Instruction set `avx512_bf16` on a processor that lacks its instructions: they are interpreted, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from ringattn.geometry.tiles import Tiles
from ringattn.kernels import BACKENDS, BackwardQueries, Gradients, Keys, Queries, State
from ringattn.score import Score
from tests.kernels.contract_suite import CASES, Case
from tests.kernels.elsewhere.machine import WITH_BF16, Elsewhere, Machine, PagedElsewhere, not_to_be_emulated
from tests.kernels.test_native import (  # with another `isa` than there
    run,
    test_dims,
    test_huge_scores_take_the_largest,
    test_infinities_stay_with_who_sees_them,
    test_merges_with_a_state_of_rows_seen_and_unseen,
    test_scales,
)
from tests.kernels.test_paged import SHAPES, Problem

__all__ = [
    "test_dims",
    "test_huge_scores_take_the_largest",
    "test_infinities_stay_with_who_sees_them",
    "test_merges_with_a_state_of_rows_seen_and_unseen",
    "test_scales",
]


pytestmark = pytest.mark.long


@pytest.fixture(scope="module", autouse=True)
def _lacking() -> None:
    if reason := not_to_be_emulated():
        pytest.skip(reason)


@dataclass(frozen=True)
class Interpreted(Elsewhere):
    """What is computed is computed by instructions that are interpreted, or the call fails."""

    def forward(self, queries: Queries, keys: Keys, tiles: Tiles, score: Score, state: State) -> None:
        before = self.machine.interpreted
        super().forward(queries, keys, tiles, score, state)
        assert self.machine.interpreted > before or not tiles

    def backward(self, queries: BackwardQueries, keys: Keys, tiles: Tiles, score: Score, gradients: Gradients) -> None:
        before = self.machine.interpreted
        super().backward(queries, keys, tiles, score, gradients)
        assert self.machine.interpreted > before or not tiles


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """This processor, with the instructions that it lacks."""
    made = Machine(WITH_BF16, tmp_path_factory.mktemp("emulated"))
    yield made
    made.close()


@pytest.fixture
def isa(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> str:
    """The instruction set, as the native backend."""
    (name,) = WITH_BF16.isas
    monkeypatch.setitem(BACKENDS, "native", Interpreted(name, machine=machine))
    return name


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_contract(isa: str, case: Case) -> None:
    run(case)


@pytest.mark.parametrize("shape", SHAPES)
def test_pages(shape: str, machine: Machine) -> None:
    """Decoding has no products of pairs: that it is compiled for this set must not matter."""
    problem = Problem(SHAPES[shape], torch.bfloat16)
    problem.check(*problem.attended(PagedElsewhere(*WITH_BF16.isas, machine=machine), "cpu"), "avx512_bf16")
