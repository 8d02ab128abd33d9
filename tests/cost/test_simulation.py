"""The simulator beside sums done by hand, and what must hold whatever the numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from ringattn import causal, contiguous, full, sliding_window, zigzag
from ringattn.cost.cost_model import Compute, CostModel, Link
from ringattn.cost.simulation import simulate
from ringattn.cost.spread_timetable import spread_timetable_for
from ringattn.cost.timetables import Scene, timetable_for
from ringattn.errors import ArgumentError, ArgumentTypeError
from ringattn.geometry.layout import Layout
from ringattn.geometry.masks import Mask
from ringattn.plan.exchanges import Gather, Ring
from ringattn.plan.payload import AttentionShape
from ringattn.plan.plan import Phase

# One head of one number: a row of k, v is 2 bytes, and a pair costs 4 flops.
SIZES = AttentionShape(1, 1, 1, 1, 1, 1, 1)
FREE_COPIES = Compute(4.0, 4.0, float("inf"), 0.0)  # a pair a second
ROWS = 10


def scene(mask: Mask, layout: Layout, phase: Phase = Phase.FORWARD, sizes: AttentionShape = SIZES) -> Scene:
    return Scene((mask,), layout, layout, sizes, phase, (True, True))


def test_a_ring_that_computes_longer_than_it_sends() -> None:
    """A block of 20 bytes takes 1 + 20 / 2 = 11 s, under work of 100 s in each of 3 steps."""
    found = simulate(timetable_for(Ring(), scene(full(), contiguous(30, 3))), CostModel(Link(1.0, 2.0), FREE_COPIES))
    assert found.done.tolist() == [300.0] * 3
    assert found.exposed == 0.0


def test_a_ring_that_sends_longer_than_it_computes() -> None:
    """201 s for a transfer: the first is there at 201, is sent on at once, and the second is there at 402."""
    found = simulate(timetable_for(Ring(), scene(full(), contiguous(30, 3))), CostModel(Link(1.0, 0.1), FREE_COPIES))
    assert found.done.tolist() == [502.0] * 3
    assert found.exposed == pytest.approx(202.0)


def test_the_last_rank_of_a_causal_ring_waits_for_nobody() -> None:
    """Contiguous, causal: 55, then 100 for each block before. Rank 0 must send its block: 11 s."""
    found = simulate(timetable_for(Ring(), scene(causal(), contiguous(30, 3))), CostModel(Link(1.0, 2.0), FREE_COPIES))
    assert found.done.tolist() == [55.0, 155.0, 255.0]


def test_a_gather_takes_turns_on_its_way() -> None:
    """Two blocks of 20 bytes, 200 s each, one after the other; the latency of 1 s is that of the second alone."""
    found = simulate(timetable_for(Gather(), scene(full(), contiguous(30, 3))), CostModel(Link(1.0, 0.1), FREE_COPIES))
    assert found.done.tolist() == [501.0] * 3


def test_stages_compute_while_the_next_is_on_its_way() -> None:
    """Half a block each: 20 bytes, of which 10 at a time: 100 s of way under 50 of work; own work of 100 at first."""
    table = timetable_for(Gather(2), scene(full(), contiguous(20, 2)))
    slow = simulate(table, CostModel(Link(0.0, 0.1), FREE_COPIES))
    assert slow.done.tolist() == [250.0] * 2  # own 100 under the first; both ways 200; the second's work 50
    fast = simulate(table, CostModel(Link(0.0, 1.0), FREE_COPIES))
    assert fast.done.tolist() == [200.0] * 2


def test_copies_and_calls_take_time() -> None:
    """The own block is packed for 20 s, and each of two visits takes a second more."""
    compute = Compute(4.0, 4.0, 1.0, 1.0)
    table = timetable_for(Ring(), scene(full(), contiguous(20, 2)))
    assert simulate(table, CostModel(Link(0.0, 1e9), compute)).done.tolist() == [20.0 + 2 * 101.0] * 2


def test_backward_of_a_ring_by_hand() -> None:
    """Two ranks; 10 flops a pair at 10 a second. kv 2 bytes a row; sums of gradients go home: 2 bytes a row."""
    table = timetable_for(Ring(), scene(full(), contiguous(20, 2), Phase.BACKWARD))
    found = simulate(table, CostModel(Link(0.0, 0.1), replace(FREE_COPIES, backward_flops_per_s=20.0)), backward=True)
    # A pair takes 10 flops / 20 a second. Halves are of 4 rows and 6. Own rows: 20 s, while 4 of the other's come until
    # 80 and are computed until 100, and 6 until 200. The gradients of the 4 are on their way until 280, the 6 being
    # computed meanwhile; theirs until 400, under the own block's 6.
    assert found.done.tolist() == [80.0 + 120.0 + 80.0 + 120.0] * 2
    fast = simulate(table, CostModel(Link(0.0, 1.0), replace(FREE_COPIES, backward_flops_per_s=20.0)), backward=True)
    assert fast.done.tolist() == [100.0] * 2


def test_spread_heads_by_hand() -> None:
    """Two ranks, two heads: 10 rows x (1 + 2 bytes) x 1 head there; 400 pairs; 10 rows x (1 + 1) back."""
    sizes = replace(SIZES, heads=2, kv_heads=2)
    table = spread_timetable_for(Ring(), scene(full(), contiguous(20, 2), sizes=sizes), 1, 1)
    assert table.bytes_sent.tolist() == [30 + 20] * 2
    found = simulate(table, CostModel(Link(1.0, 1.0), FREE_COPIES))
    assert found.done.tolist() == [31.0 + 400.0 + 21.0] * 2


def test_the_slow_axis_hides_under_a_turn() -> None:
    """Two groups of two: 20 bytes take 150 s on the slow axis, under a turn of 200; the fast axis costs nothing."""
    table = timetable_for(Ring(2), scene(full(), contiguous(40, 4)))
    model = CostModel(Link(0.0, 1e9), FREE_COPIES, Link(0.0, 20 / 150.0))
    assert simulate(table, model).done.tolist() == pytest.approx([400.0] * 4)
    plain = simulate(timetable_for(Ring(), scene(full(), contiguous(40, 4))), replace(model, link=model.links[1]))
    assert plain.total == pytest.approx(3 * 150.0 + 100.0)


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("mask", [full(), causal(), sliding_window(5)], ids=str)
def test_no_faster_link_makes_it_slower(mask: Mask, phase: Phase) -> None:
    where = scene(mask, zigzag(60, 6), phase, AttentionShape(2, 6, 3, 4, 4, 2, 4))
    tables = [timetable_for(e, where) for e in (Ring(), Ring(2), Ring(3), Gather(), Gather(3))]
    tables += [spread_timetable_for(Ring(), where, groups, stages) for groups in (1, 2, 3) for stages in (1, 2)]
    compute = Compute(1e6, 1e6, 1e6, 1e-4)
    for table in tables:
        totals = [
            simulate(table, CostModel(Link(1e-3, rate), compute, Link(1e-2, rate / 4))).total
            for rate in (1e3, 1e4, 1e5, 1e6, 1e9)
        ]
        assert totals == sorted(totals, reverse=True)
        assert totals[0] > totals[-1]
        least = max(table.flops) / 1e6
        assert totals[-1] >= least


@pytest.mark.parametrize("world", [256, pytest.param(1024, marks=pytest.mark.long)])
def test_a_thousand_ranks(world: int) -> None:
    """Time is that of the work, as what is sent hides under it; and it is simulated in seconds."""
    where = scene(causal(), zigzag(world * 64, world), sizes=AttentionShape(1, 8, 8, 64, 64, 2, 4))
    table = timetable_for(Ring(), where)
    start = time.perf_counter()
    found = simulate(table, CostModel(Link(1e-6, 1e12), Compute(1e12, 1e12, 1e12, 0.0)))
    assert time.perf_counter() - start < 10.0  # well under 2 s on a quiet machine
    assert len(table.messages.step) == world * (world - 1)
    np.testing.assert_allclose(found.total, table.flops.max() / 1e12, rtol=0.02)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Link(-1.0, 1.0), ArgumentError, "latency_s=-1.0: must be finite, 0 or more"),
        (lambda: Link(0.0, 0.0), ArgumentError, "bytes_per_s=0.0: must be positive"),
        (lambda: Link(0.0, float("nan")), ArgumentError, "bytes_per_s=nan: must be positive"),
        (
            lambda: Link("fast", 1.0),  # type: ignore[arg-type]
            ArgumentTypeError,
            "latency_s='fast': must be a number, not str",
        ),
        (lambda: Compute(1.0, 1.0, 1.0, -1.0), ArgumentError, "launch_s=-1.0"),
        (
            lambda: CostModel(1.0, FREE_COPIES),  # type: ignore[arg-type]
            ArgumentTypeError,
            "link=1.0: must be a Link",
        ),
        (
            lambda: CostModel(Link(0, 1), FREE_COPIES, buffer_bytes=-1),
            ArgumentError,
            "buffer_bytes=-1: must be",
        ),
    ],
)
def test_numbers_that_cannot_be(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
