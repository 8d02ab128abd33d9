"""Groups: which one is meant, and ranks that agree, or all raise the same."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import ringattn
from ringattn.comm import group as group_module
from ringattn.comm.group import agree, rank_mesh, resolve_group
from ringattn.errors import ArgumentError, ArgumentTypeError, LayoutError
from tests.attention.problem import Problem, solve, whole
from tests.harness.cases import layout_case, mask_case
from tests.harness.compare import assert_close
from tests.harness.ranks import RankPool

Told = tuple[dict[str, str], int]
PROBLEM = Problem(mask_case("documents&causal"), layout_case("zigzag"), 23, batch=2, heads=4, kv_heads=2)


@contextlib.contextmanager
def counted_gathers() -> Iterator[list[object]]:
    """Within it, every dist.all_gather_object leaves an entry."""
    calls: list[object] = []
    original = dist.all_gather_object

    def counting(*arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        original(*arguments, **options)

    dist.all_gather_object = counting
    try:
        yield calls
    finally:
        dist.all_gather_object = original


def check_exact(results: list[dict[str, Tensor]]) -> None:
    expected = PROBLEM.expected()
    for name, actual in whole(PROBLEM, results).items():
        assert_close(actual, getattr(expected, name), atol=1e-10, name=name)


# ---- resolve


@pytest.mark.parametrize("group", [None, "ring", 3])
def test_without_torch_distributed(group: object) -> None:
    with pytest.raises(ArgumentError, match=r"init_process_group\(\) first"):
        resolve_group(group)


def resolve_groups(group: dist.ProcessGroup) -> None:
    assert resolve_group(group) is group
    assert resolve_group(None) is dist.group.WORLD
    for bad in ("ring", 3, [0, 1], torch.distributed, True):
        with pytest.raises(ArgumentTypeError, match="must be a ProcessGroup, a 1-D DeviceMesh, or None"):
            resolve_group(bad)


def test_resolve(pool: RankPool) -> None:
    pool.run(resolve_groups, 4)


def resolve_meshes(_: dist.ProcessGroup) -> None:
    line = init_device_mesh("cpu", (4,))
    found = resolve_group(line)
    assert (found.rank(), found.size()) == (dist.get_rank(), 4)
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    with pytest.raises(ArgumentError, match=r"a mesh of 2 dimensions.*mesh\['ring'\]"):
        resolve_group(square)
    ring = resolve_group(square["ring"])
    assert dist.get_process_group_ranks(ring) == [dist.get_rank() % 2, dist.get_rank() % 2 + 2]


def test_resolve_meshes(pool: RankPool) -> None:
    pool.run(resolve_meshes, 4)


def resolve_others(_: dist.ProcessGroup, mesh: bool) -> None:
    other = DeviceMesh("cpu", [1, 3]) if mesh else dist.new_group([1, 3])
    if dist.get_rank() in (1, 3):
        assert resolve_group(other).size() == 2
    else:
        with pytest.raises(ArgumentError, match="not a member"):
            resolve_group(other)


def test_groups_of_others_are_refused(pool: RankPool) -> None:
    pool.run(resolve_others, 4, False)


def test_meshes_of_others_are_refused(pool: RankPool) -> None:
    """Torch's own get_group() fails with a bare IndexError there."""
    pool.run(resolve_others, 4, True)


# ---- groups that do not begin with rank 0


def attend_in_subgroup(_: dist.ProcessGroup) -> dict[str, Tensor] | None:
    group = dist.new_group([1, 3])
    return solve(group, PROBLEM) if dist.get_rank() in (1, 3) else None


def test_attention_in_a_group_of_ranks_1_and_3(pool: RankPool) -> None:
    results = pool.run(attend_in_subgroup, 4)
    assert results[0] is results[2] is None
    check_exact([result for result in results if result is not None])


def attend_in_two_groups(_: dist.ProcessGroup) -> dict[str, Tensor]:
    """Two rings side by side, of ranks [0, 2] and [1, 3], each with its own data."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "other"))
    return solve(resolve_group(mesh["ring"]), PROBLEM)


def test_attention_in_groups_side_by_side(pool: RankPool) -> None:
    results = pool.run(attend_in_two_groups, 4)
    check_exact(results[::2])
    check_exact(results[1::2])


def attend_on_a_mesh(_: dist.ProcessGroup) -> Tensor:
    mesh, layout = init_device_mesh("cpu", (4,)), PROBLEM.layouts(4)[0]
    q, k, v = (ringattn.shard(x, layout, resolve_group(mesh)) for x in PROBLEM.tensors()[:3])
    mask = PROBLEM.built_mask()
    out = ringattn.ring_attention(q, k, v, mesh, mask=mask, layout=layout)
    assert torch.equal(out, ringattn.ring_attention(q, k, v, None, mask=mask, layout=layout))
    return out


def test_attention_on_a_mesh(pool: RankPool) -> None:
    outs = [{"out": out} for out in pool.run(attend_on_a_mesh, 4)]
    check_exact(outs)


# ---- agreed


class NotOurs(Exception):
    """An error that is none of ours."""


def raise_on(group: dist.ProcessGroup, ranks: list[int], kind: type[Exception], message: str) -> None:
    def prepare() -> Told:
        if group.rank() in ranks:
            raise kind(message)
        return {"what": "this"}, 1

    agree(rank_mesh(group), ("raising", message), prepare)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("kind", [LayoutError, ArgumentTypeError, ringattn.BackendError])
def test_one_rank_raising_makes_all_raise_the_same(pool: RankPool, world: int, kind: type[Exception]) -> None:
    errors = pool.expect_error(raise_on, world, [1], kind, "q has 3 rows")
    assert [error.type_name for error in errors] == [kind.__name__] * world
    assert {error.message for error in errors} == {f"on rank 1 of {world}: q has 3 rows"}
    # The rank where it happened shows where.
    assert "prepare" in errors[1].traceback


def test_all_ranks_raising_the_same_name_no_rank(pool: RankPool) -> None:
    errors = pool.expect_error(raise_on, 3, [0, 1, 2], LayoutError, "q has 3 rows")
    assert {(error.type_name, error.message) for error in errors} == {("LayoutError", "q has 3 rows")}


def test_the_first_of_several_is_told(pool: RankPool) -> None:
    errors = pool.expect_error(raise_on, 4, [3, 2], LayoutError, "no")
    assert {error.message for error in errors} == {"on rank 2 of 4: no"}


@pytest.mark.parametrize("kind", [NotOurs, ZeroDivisionError, KeyError])
def test_errors_of_others_are_told_to_all_as_well(pool: RankPool, kind: type[Exception]) -> None:
    errors = pool.expect_error(raise_on, 3, [1], kind, "oops")
    assert {error.type_name for error in errors} == {"RingAttnError"}
    assert len({error.message for error in errors}) == 1
    assert "oops" in errors[0].message
    assert kind.__name__ in errors[1].traceback


def raise_alone(group: dist.ProcessGroup) -> None:
    for kind in (LayoutError, NotOurs):
        with pytest.raises(kind, match=r"^no$"):
            raise_on(group, [0], kind, "no")


def test_one_rank_alone_raises_as_it_is(pool: RankPool) -> None:
    pool.run(raise_alone, 1)


def disagree(group: dist.ProcessGroup, values: list[str]) -> None:
    agree(rank_mesh(group), ("disagreeing",), lambda: ({"same": "x", "the scale": values[group.rank()]}, 1))


@pytest.mark.parametrize("values", [["0.5", "0.25"], ["0.5", "0.5", "0.25"], ["1", "2", "3", "4"]], ids=str)
def test_disagreement_names_every_ranks_value(pool: RankPool, values: list[str]) -> None:
    errors = pool.expect_error(disagree, len(values), values)
    assert {error.type_name for error in errors} == {"DisagreementError"}
    assert "ValueError" in errors[0].mro_names
    (message,) = {error.message for error in errors}
    assert "the scale" in message
    assert "same" not in message
    for rank, value in enumerate(values):
        assert f"rank {rank}: {value}" in message


def disagree_on_names(group: dist.ProcessGroup) -> None:
    told = {"a": "1"} if group.rank() == 0 else {"a": "1", "b": "2"}
    agree(rank_mesh(group), ("names",), lambda: (told, 1))


def test_a_name_that_only_some_ranks_tell_is_a_disagreement(pool: RankPool) -> None:
    errors = pool.expect_error(disagree_on_names, 2)
    assert {error.type_name for error in errors} == {"DisagreementError"}
    assert all("disagree on b" in error.message for error in errors)


def remember(group: dist.ProcessGroup) -> list[int]:
    """How often ranks talk: for a first call, for the same again, for another, for one without a key twice."""
    talks = []
    for key in ("a", "a", "b", "a", None, None):
        with counted_gathers() as calls:
            result = agree(rank_mesh(group), key, lambda: ({"what": "this"}, group.rank()))
            assert result == group.rank(), "the result is each rank's own"
        talks.append(len(calls))
    return talks


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_that_agreed_talk_no_more(pool: RankPool, world: int) -> None:
    # No other test may have agreed on these keys in this group: each has keys of its own.
    expected = [0] * 6 if world == 1 else [1, 0, 1, 0, 1, 1]
    assert pool.run(remember, world) == [expected] * world


def prepare_once(group: dist.ProcessGroup) -> int:
    prepared = []

    def prepare() -> Told:
        prepared.append(1)
        return {}, 1

    for _ in range(3):
        agree(rank_mesh(group), "prepared once", prepare)
    return len(prepared)


@pytest.mark.parametrize("world", [1, 3])
def test_arguments_are_checked_once(pool: RankPool, world: int) -> None:
    assert pool.run(prepare_once, world) == [1] * world


def fail_then_succeed(group: dist.ProcessGroup) -> list[int]:
    """What went wrong is not remembered: the next call of the signature compares notes again."""
    talks = []
    for fails in (True, True, False, False):

        def prepare(fails: bool = fails) -> Told:
            if fails and group.rank() == 0:
                raise LayoutError("not yet")
            return {}, 1

        with counted_gathers() as calls, contextlib.suppress(LayoutError):
            agree(rank_mesh(group), "after a failure", prepare)
        talks.append(len(calls))
    return talks


def test_failures_are_not_remembered(pool: RankPool) -> None:
    assert pool.run(fail_then_succeed, 2) == [[1, 1, 1, 0]] * 2


def forget(group: dist.ProcessGroup) -> list[int]:
    """Talks for: many signatures, a recent one, the one used in between, one long unused."""
    limit = group_module._MAX_AGREEMENTS
    talks = []
    for keys in (range(limit), [0], [limit], [0], [limit - 1], [1]):
        with counted_gathers() as calls:
            for key in keys:
                agree(rank_mesh(group), ("forgotten", key), lambda: ({}, 1))
        talks.append(len(calls))
    return talks


def test_memory_is_bounded_and_forgets_what_was_longest_unused(pool: RankPool) -> None:
    limit = group_module._MAX_AGREEMENTS
    assert pool.run(forget, 2) == [[limit, 0, 1, 0, 0, 1]] * 2


def attend_twice(group: dist.ProcessGroup) -> list[int]:
    talks = []
    for _ in range(3):
        with counted_gathers() as calls:
            solve(group, PROBLEM)
        talks.append(len(calls))
    return talks[1:]


def test_attention_talks_no_more_after_the_first_call(pool: RankPool) -> None:
    assert pool.run(attend_twice, 3) == [[0, 0]] * 3


def groups_are_apart(_: dist.ProcessGroup) -> list[int]:
    """Agreement is of one group: another of the same ranks compares notes itself."""
    groups = [dist.new_group([0, 1, 2, 3]) for _ in range(2)]
    talks = []
    for group in groups:
        with counted_gathers() as calls:
            agree(rank_mesh(group), "apart", lambda: ({}, 1))
        talks.append(len(calls))
    return talks


def test_groups_do_not_share_agreements(pool: RankPool) -> None:
    assert pool.run(groups_are_apart, 4) == [[1, 1]] * 4


def forget_group(_: dist.ProcessGroup) -> bool:
    group = dist.new_group([0, 1, 2, 3])
    layout = ringattn.contiguous(8, 4)
    q = torch.randn(1, 2, 1, 4)
    ringattn.ring_attention(q, q, q, group, layout=layout)
    gone = weakref.ref(group)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    return gone() is None


def test_a_destroyed_group_is_not_kept_alive(pool: RankPool) -> None:
    """What ranks agreed on must not hold the group that it is remembered under."""
    assert pool.run(forget_group, 4) == [True] * 4
