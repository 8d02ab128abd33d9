"""Exact whatever is chosen; the same choice on every rank, once; and errors on all of them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import ringattn
from ringattn.attention.calibration import DEFAULT_MODELS, default_model
from tests.attention.problem import Problem, Way, mesh_of, share_of
from tests.harness.cases import layout_case, mask_case
from tests.harness.compare import assert_close
from tests.harness.ranks import RankPool

CPU = DEFAULT_MODELS["cpu"]
BASE = Problem(mask_case("documents&causal"), layout_case("zigzag"), 23, heads=4, kv_heads=2, v_dim=3, sink=True)
PROBLEMS = (
    BASE,
    replace(BASE, mask=mask_case("window_left"), layout=layout_case("contiguous"), heads=3, kv_heads=3, softcap=1.3),
    replace(BASE, mask=mask_case("full"), layout=layout_case("striped_1"), kv_heads=1, batch=2, sink=False),
)
MESH = Way("ring", (2, 2))


def options_of(problem: Problem, world_size: int) -> dict[str, Any]:
    layout, kv_layout = problem.layouts(world_size)
    return {
        "mask": problem.built_mask(), "layout": layout, "kv_layout": kv_layout, "scale": problem.scale,
        "softcap": problem.softcap, "backend": problem.backend,
    }  # fmt: skip


def group_of(group: dist.ProcessGroup, on_mesh: bool) -> dist.ProcessGroup | DeviceMesh:
    return mesh_of(group, MESH) if on_mesh else group


def check(group: dist.ProcessGroup, problem: Problem, on_mesh: bool, asked: dict[str, Any]) -> str:
    """Compares this rank's share with the oracle; returns what was chosen."""
    t, expected = share_of(problem, group.rank(), group.size())
    q, k, v = (x.clone().requires_grad_() for x in t[:3])
    sink = problem.sink_logits()
    where, options = group_of(group, on_mesh), options_of(problem, group.size())
    out, lse = ringattn.context_parallel_attention_with_lse(q, k, v, where, sink=sink, **options, **asked)
    grads = torch.autograd.grad([out, lse], [q, k, v], [t.dout, t.dlse])
    for name, actual in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True):
        assert_close(actual, getattr(expected, name), atol=1e-10, name=f"{name}, {asked}, {problem.told()}")
    alone = ringattn.context_parallel_attention(q, k, v, where, sink=sink, **options, **asked)
    assert torch.equal(alone, out)
    seen = {name: options[name] for name in ("mask", "layout", "kv_layout")}
    return str(ringattn.explain(q, k, v, where, **seen, **asked).chosen)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("exchange", ["auto", "ring", "gather", "ulysses"])
def test_exact_on_a_group(pool: RankPool, world_size: int, exchange: str) -> None:
    for problem in PROBLEMS:
        found = pool.run(check, world_size, problem, False, {"exchange": exchange})
        assert len(set(found)) == 1
        assert exchange == "auto" or found[0].startswith(exchange)


@pytest.mark.parametrize("exchange", ["auto", "hybrid", "double ring"])
def test_exact_on_a_mesh(pool: RankPool, exchange: str) -> None:
    for problem in PROBLEMS:
        found = pool.run(check, 4, problem, True, {"exchange": exchange})
        assert len(set(found)) == 1
        assert exchange == "auto" or found[0].startswith(exchange)


def test_stages_that_are_asked_for(pool: RankPool) -> None:
    assert set(pool.run(check, 3, BASE, False, {"exchange": "gather", "stages": 3})) == {"gather in 3 stages"}
    assert set(pool.run(check, 2, BASE, False, {"exchange": "ulysses", "stages": 2})) == {"ulysses in 2 stages"}


def test_models_decide(pool: RankPool) -> None:
    """Free links and dear calls; free calls and no room: another exchange each, and the same numbers."""
    calls = replace(CPU, compute=replace(CPU.compute, launch_s=10.0), link=ringattn.Link(0.0, 1e15))
    window = PROBLEMS[1]
    slow = replace(CPU, link=ringattn.Link(0.0, 1.0))
    found = [set(pool.run(check, 4, p, False, {"model": m})) for p, m in ((BASE, calls), (window, slow))]
    assert found == [{"ulysses"}, {"gather"}]


def count_gathers(group: dist.ProcessGroup, problem: Problem) -> list[int]:
    """How many times the ranks compared notes: in the first call, and in two more."""
    t, _ = share_of(problem, group.rank(), group.size())
    calls = []
    original = dist.all_gather_object
    found: list[int] = []

    def counting(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        original(*arguments, **options)

    dist.all_gather_object = counting
    try:
        for _ in range(3):
            ringattn.context_parallel_attention(*t[:3], group, **options_of(problem, group.size()))
            found.append(len(calls))
            calls.clear()
    finally:
        dist.all_gather_object = original
    return found


def test_later_calls_compare_nothing(pool: RankPool) -> None:
    assert pool.run(count_gathers, 3, replace(BASE, q_len=29)) == [[2, 0, 0]] * 3


def ask(group: dist.ProcessGroup, on_mesh: bool, asked: dict[str, Any], only_rank: int | None) -> None:
    t, _ = share_of(BASE, group.rank(), group.size())
    mine = asked if only_rank in (None, group.rank()) else {}
    options = options_of(BASE, group.size()) | mine
    ringattn.context_parallel_attention(*t[:3], group_of(group, on_mesh), **options)


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown": ({"exchange": "star"}, "ArgumentError", "exchange='star': must be 'auto' or one of 'ring', 'gather'"),
    "unhashable": ({"exchange": ["ring"]}, "ArgumentError", r"exchange=\['ring'\]: must be 'auto' or one of"),
    "needs a mesh": ({"exchange": "hybrid"}, "ArgumentError", "no exchange can do it .*it needs a mesh of two axes"),
    "stages of a ring": ({"exchange": "ring", "stages": 2}, "ArgumentError", "stages=2: exchange='ring' has no stages"),
    "no stages": ({"stages": 0}, "ArgumentError", "stages=0: must be an integer of 1 or more"),
    "true stages": ({"stages": True}, "ArgumentError", "stages=True: must be an integer of 1 or more"),
    "a link alone": (
        {"model": ringattn.Link(0.0, 1.0)},
        "ArgumentTypeError",
        "model=Link.*must be a CostModel",
    ),
    "no room": ({"model": replace(CPU, buffer_bytes=0)}, "ArgumentError", "no exchange can do it .*the model allows"),
    "another scale": ({"scale": "x"}, "ArgumentTypeError", "scale='x': must be a number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_raises_on_every_rank(pool: RankPool, name: str) -> None:
    asked, error, message = WRONG[name]
    for only_rank in (None, 1):
        found = pool.expect_error(ask, 2, False, asked, only_rank)
        assert {e.type_name for e in found} == {error}
        for e in found:
            assert re.search(message, e.message), e.message


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"model": replace(CPU, link=ringattn.Link(0.0, 1e3))}, "model"),
        ({"exchange": "gather"}, "exchange"),
        ({"stages": 1}, "stages"),
        ({"mask": ringattn.full()}, "mask"),
    ],
)
def test_ranks_that_ask_for_different_things(pool: RankPool, asked: dict[str, Any], what: str) -> None:
    for error in pool.expect_error(ask, 3, False, asked, 1):
        assert error.type_name == "DisagreementError"
        assert f"disagree on {what} (rank 0: " in error.message


def test_a_mesh_has_no_flat_exchange(pool: RankPool) -> None:
    for error in pool.expect_error(ask, 4, True, {"exchange": "ring"}, None):
        assert error.type_name == "ArgumentError"
        assert "it needs one group of all ranks, and there is a mesh of two axes" in error.message


def measure(group: dist.ProcessGroup) -> tuple[ringattn.Link, ringattn.Compute]:
    return ringattn.measure_link(group), ringattn.measure_compute(group, dtype=torch.float32)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_is_measured_is_the_same_everywhere(pool: RankPool, world_size: int) -> None:
    found = pool.run(measure, world_size)
    assert len(set(found)) == 1
    link, compute = found[0]
    if world_size > 1:
        assert 1e-6 < link.latency_s < 1.0
        assert 1e6 < link.bytes_per_s < 1e12
    assert 1e7 < compute.backward_flops_per_s < 1e14
    assert 1e7 < compute.flops_per_s < 1e14
    assert 1e7 < compute.copy_bytes_per_s < 1e13
    assert ringattn.CostModel(link, compute)


def test_explained_without_processes() -> None:
    """Shapes alone, on no device; and gradients as they are asked for."""
    q = torch.empty(1, 8192, 8, 64, device="meta", dtype=torch.bfloat16)
    k = torch.empty(1, 8192, 2, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    model = default_model("cuda")
    found = ringattn.explain(q, k, k, 4, model=model, mask=ringattn.causal(), layout=ringattn.zigzag(32768, 4))
    assert found.setting.wanted == (False, True)
    assert found.setting.mesh == (4,)
    with torch.no_grad():
        assert ringattn.explain(q, k, k, (2, 2), model=model).setting.wanted == (False, False)
    mesh = ringattn.explain(q, k, k, (2, 2), model=model)
    assert mesh.setting.layout == ringattn.contiguous(32768, 4)
    assert mesh.chosen is not None
    with pytest.raises(ringattn.ArgumentError, match="model=None: there are no constants for tensors on 'meta'"):
        ringattn.explain(q, k, k, 4)
    with pytest.raises(ringattn.LayoutError, match="made for 3 ranks"):
        ringattn.explain(q, k, k, 4, model=model, layout=ringattn.zigzag(32768, 3))
    for wrong in (0, (2, 2, 2), (2, -1), ()):
        with pytest.raises(ringattn.ArgumentError, match="group_or_mesh="):
            ringattn.explain(q, k, k, wrong, model=model)
