"""Agreement: ranks that make the same call go on; otherwise all of them raise the same error."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import ringattn
from ringattn.comm import agreement
from ringattn.comm.agreement import agree
from ringattn.comm.topology import RankMesh, rank_mesh
from ringattn.errors import ArgumentError, ArgumentTypeError, DisagreementError, LayoutError
from tests.attention.problem import Problem, solve
from tests.harness.cases import layout_case, mask_case
from tests.harness.ranks import RankPool

Prepared = tuple[dict[str, str], int]
PROBLEM = Problem(mask_case("documents&causal"), layout_case("zigzag"), 23, batch=2, heads=4, kv_heads=2)


@contextlib.contextmanager
def counted_gathers() -> Iterator[list[object]]:
    """Lists the arguments of every dist.all_gather_object that is called inside the context."""
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


class NotOurs(Exception):
    """An error that is none of ours."""


def raise_on(group: dist.ProcessGroup, ranks: list[int], kind: type[Exception], message: str) -> None:
    def prepare() -> Prepared:
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


def test_the_first_of_several_errors_is_raised(pool: RankPool) -> None:
    errors = pool.expect_error(raise_on, 4, [3, 2], LayoutError, "no")
    assert {error.message for error in errors} == {"on rank 2 of 4: no"}


@pytest.mark.parametrize("kind", [NotOurs, ZeroDivisionError, KeyError])
def test_errors_of_other_libraries_are_raised_on_all_ranks(pool: RankPool, kind: type[Exception]) -> None:
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
    fingerprint = {"a": "1"} if group.rank() == 0 else {"a": "1", "b": "2"}
    agree(rank_mesh(group), ("names",), lambda: (fingerprint, 1))


def test_a_name_that_only_some_ranks_have_is_a_disagreement(pool: RankPool) -> None:
    errors = pool.expect_error(disagree_on_names, 2)
    assert {error.type_name for error in errors} == {"DisagreementError"}
    assert all("disagree on b" in error.message for error in errors)


def remember(group: dist.ProcessGroup) -> list[int]:
    """The gathers of: a first call, the same again, another, the first again, two without a signature."""
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

    def prepare() -> Prepared:
        prepared.append(1)
        return {}, 1

    for _ in range(3):
        agree(rank_mesh(group), "prepared once", prepare)
    return len(prepared)


@pytest.mark.parametrize("world", [1, 3])
def test_arguments_are_checked_once(pool: RankPool, world: int) -> None:
    assert pool.run(prepare_once, world) == [1] * world


def fail_then_succeed(group: dist.ProcessGroup) -> list[int]:
    """A failure is not stored: the next call of the signature compares the ranks again."""
    talks = []
    for fails in (True, True, False, False):

        def prepare(fails: bool = fails) -> Prepared:
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
    limit = agreement._MAX_AGREEMENTS
    talks = []
    for keys in (range(limit), [0], [limit], [0], [limit - 1], [1]):
        with counted_gathers() as calls:
            for key in keys:
                agree(rank_mesh(group), ("forgotten", key), lambda: ({}, 1))
        talks.append(len(calls))
    return talks


def test_memory_is_bounded_and_forgets_what_was_longest_unused(pool: RankPool) -> None:
    limit = agreement._MAX_AGREEMENTS
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
    """Two groups of the same ranks store their agreements apart."""
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
    """A stored agreement must not hold a reference to the group under which it is stored."""
    assert pool.run(forget_group, 4) == [True] * 4


# ---- meshes


def wrong_on_one_rank(group: dist.ProcessGroup, wrong: str, operation: str) -> tuple[str, str]:
    """All ranks of a mesh raise the same error, though each talks to its row and column only; then a call works."""
    axes = ("ring", "ulysses") if operation == "hybrid" else ("outer", "inner")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=axes)
    call = getattr(ringattn, f"{operation}_attention")
    last = group.rank() == 3
    x = torch.randn(1, 4, 2, 4)
    q = x
    options: dict[str, object]
    if wrong == "rows":
        q, options = torch.randn(1, 5, 2, 4) if last else x, {"layout": ringattn.contiguous(16, 4)}
    elif wrong == "scale":
        options = {"scale": 0.5 if last else 0.25}
    else:
        options = {"stages": 0 if last else 1}
    with pytest.raises(ringattn.RingAttnError) as caught:
        call(q, x, x, mesh, **options)
    assert call(x, x, x, mesh).shape == x.shape
    return type(caught.value).__name__, str(caught.value)


@pytest.mark.parametrize(
    ("operation", "wrong", "error", "message"),
    [
        ("ring", "rows", LayoutError, "on rank 3 of 4: q has 5 rows"),
        ("hybrid", "rows", LayoutError, "on rank 3 of 4: q has 5 rows"),
        (
            "ring",
            "scale",
            DisagreementError,
            "disagree on scale (rank 0: 0.25; rank 1: 0.25; rank 2: 0.25; rank 3: 0.5)",
        ),
        ("hybrid", "stages", ArgumentError, "on rank 3 of 4: stages=0: must be an integer of 1 or more"),
    ],
)
def test_all_ranks_of_a_mesh_raise(
    pool: RankPool, operation: str, wrong: str, error: type[Exception], message: str
) -> None:
    for kind, text in pool.run(wrong_on_one_rank, 4, wrong, operation):
        assert kind == error.__name__
        assert message in text


def agree_on_meshes(group: dist.ProcessGroup) -> int:
    """X."""
    first, second = (init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")) for _ in range(2))
    meshes = [rank_mesh(first), RankMesh((rank_mesh(first).axes[0], rank_mesh(second).axes[1]))]
    made = []
    for mesh in (*meshes, *meshes):
        agree(mesh, "together", lambda: made.append(1) or ({}, 1))  # type: ignore[func-returns-value]
    return len(made)


def test_meshes_do_not_share_agreements(pool: RankPool) -> None:
    assert pool.run(agree_on_meshes, 4) == [2] * 4
