"""Choosing a kernel: in order, never instead of another, and with every reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ringattn.kernels as kernels
from ringattn import BackendError
from ringattn.kernels import BACKENDS, ProblemSpec, refusals, select
from ringattn.kernels.paged import PAGED_BACKENDS
from ringattn.kernels.reference import ReferenceKernel
from ringattn.kernels.select_kernel import Selectable
from ringattn.score import Score

CALL = ProblemSpec("cpu", torch.float32, 4, 2, 64, 64, True, Score(0.125))


class Fake(ReferenceKernel):
    """A kernel that refuses for the reasons it is given."""

    def __init__(self, name: str, machine: list[str], call: list[str]) -> None:
        self.name, self.machine, self.call = name, machine, call

    def available(self) -> list[str]:
        return self.machine

    def unsupported(self, problem: ProblemSpec) -> list[str]:
        return self.call


@pytest.fixture(autouse=True)
def _no_memory() -> None:
    """What `select` remembers, it remembers of another table."""
    select.cache_clear()


def table(patch: pytest.MonkeyPatch, *fakes: Fake) -> None:
    patch.setattr(kernels, "BACKENDS", {fake.name: fake for fake in fakes})


def test_table() -> None:
    assert all(name == kernel.name for name, kernel in BACKENDS.items())
    assert list(BACKENDS)[-1] == "reference", "the last resort"


def test_takes_the_first_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    table(monkeypatch, Fake("a", ["no GPU"], []), Fake("b", [], ["not now"]), Fake("c", [], []), Fake("d", [], []))
    assert select(None, CALL).name == "c"


def test_takes_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    table(monkeypatch, Fake("a", [], []), Fake("b", [], []))
    assert select("b", CALL).name == "b"


@pytest.mark.parametrize("machine", [[], ["no GPU"]])
def test_never_falls_back(monkeypatch: pytest.MonkeyPatch, machine: list[str]) -> None:
    table(monkeypatch, Fake("a", machine, ["too wide"]), Fake("b", [], []))
    with pytest.raises(BackendError, match="backend='a' cannot run this call"):
        select("a", CALL)


def test_tells_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    table(monkeypatch, Fake("a", ["no GPU", "no driver"], []), Fake("b", [], ["too wide", "too hot"]))
    with pytest.raises(BackendError) as told:
        select(None, CALL)
    for words in ("a: no GPU and no driver", "b: too wide and too hot", "backend=None"):
        assert words in str(told.value)
    with pytest.raises(BackendError) as told:
        select("b", CALL)
    assert "too wide and too hot" in str(told.value)
    assert "no GPU" not in str(told.value)


def test_refusals_are_of_the_machine_or_else_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    table(monkeypatch, Fake("a", ["no GPU"], ["too wide"]), Fake("b", [], ["too wide"]), Fake("c", [], []))
    assert refusals("a", CALL) == ["no GPU"]
    assert refusals("b", CALL) == ["too wide"]
    assert refusals("c", CALL) == []


@pytest.mark.parametrize("name", ["", "SDPA", "flash", "no such"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(BackendError) as told:
        select(name, CALL)
    for words in (f"backend={name!r}", *map(repr, BACKENDS), "None"):
        assert words in str(told.value)


def test_each_call_goes_to_the_first_that_takes_it() -> None:
    capped = replace(CALL, score=Score(0.125, softcap=30.0))
    exact = replace(CALL, dtype=torch.float64)
    assert select(None, CALL).name == "native"
    assert select(None, capped).name == "native"
    assert select(None, exact).name == "sdpa"
    assert select(None, replace(exact, score=capped.score)).name == "reference"
    with pytest.raises(BackendError, match="sdpa: has no softcap"):
        select("sdpa", capped)


def test_several_reasons_of_a_real_kernel() -> None:
    call = ProblemSpec("cuda", torch.float64, 4, 2, 512, 64, True, Score(0.125, softcap=30.0))
    reasons = BACKENDS["sdpa"].unsupported(call)
    assert len(reasons) == 3
    for words in ("float64", "softcap", "512"):
        assert sum(words in reason for reason in reasons) == 1


class BiasedScore(Score):
    """A score with a term that no kernel knows."""

    def terms(self) -> frozenset[str]:
        return super().terms() | {"bias"}


@pytest.mark.parametrize("kernel", [*BACKENDS.values(), *PAGED_BACKENDS.values()], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_unknown_term_of_a_score_is_refused_by_name(kernel: Selectable, device: str) -> None:
    plain = replace(CALL, device_type=device, dtype=torch.bfloat16)
    biased = replace(plain, score=BiasedScore(0.125))
    reasons = kernel.unsupported(plain)
    if any("runs on" in reason for reason in reasons):
        pytest.skip("not a kernel for this device")
    assert kernel.unsupported(biased) == ["has no bias", *reasons]
    assert biased != plain, "kernels are remembered by problem"


def test_a_device_that_nobody_made_a_kernel_for() -> None:
    assert BACKENDS["sdpa"].unsupported(replace(CALL, device_type="xpu")) == ["runs on cpu and cuda, not on xpu"]
    assert select(None, replace(CALL, device_type="xpu")).name == "reference"


def test_remembers() -> None:
    assert select(None, CALL) is select(None, replace(CALL))
