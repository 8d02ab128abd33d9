"""Plans replayed in integers: nothing is computed twice or never, sent unasked, used unheld or kept too long."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn import (
    Layout,
    Mask,
    MaskError,
    balanced,
    causal,
    contiguous,
    documents,
    full,
    sliding_window,
    striped,
    zigzag,
)
from ringattn.geometry import masks as masks_module
from ringattn.geometry.tiles import needed_blocks, pairs_of_queries
from ringattn.plan.comm_pattern import CommPattern
from ringattn.plan.exchanges import Exchange, Gather, Ring, build_plan, select_backward
from ringattn.plan.payload import AttentionShape, Payload
from ringattn.plan.plan import Phase, Plan, Program
from tests.geometry.brute import tile_counts
from tests.geometry.strategies import examples, layouts, masks
from tests.harness.cases import Bools, mask_case
from tests.plan import replay


def plans_of(
    built: Sequence[Mask],
    layout: Layout,
    kv_layout: Layout | None = None,
    exchange: Exchange | None = None,
    backward: Phase = Phase.BACKWARD,
) -> list[Plan]:
    kv_layout, exchange = kv_layout or layout, exchange or Ring()
    return [build_plan(exchange, tuple(built), layout, kv_layout, rank, backward) for rank in range(layout.world_size)]


def check_plans(plans: Sequence[Plan], exchange: Exchange, travel: CommPattern) -> None:
    """Everything that can be told without spelling out pairs."""
    forward, backward = [p.forward for p in plans], [p.backward for p in plans]
    replay.check(forward, backward=False)
    replay.check(backward, backward=True)
    replay.check([p.without_gradients() for p in backward], backward=False)
    for plan in plans:
        assert not any(t.payload is not plan.forward.carried for s in plan.forward.steps for t in s.sends)
        moved = any(s.sends or s.receives for s in (*plan.forward.steps, *plan.backward.steps))
        assert plan.communicates == moved
        check_counts(plan)
    for payload, moved_rows in zip((travel.carried, travel.carried.gradient), exchange.rows_moved(travel), strict=True):
        assert sum(p.rows_sent(payload) for p in backward) == moved_rows


def check_counts(plan: Plan) -> None:
    """rows_sent and bytes_sent are what the steps say."""
    sizes = AttentionShape(2, 6, 3, 4, 5, 2, 4)
    bytes_of = {Payload.KV: 2 * 3 * 9 * 2, Payload.DKV: 2 * 3 * 9 * 4, Payload.Q: 2 * 6 * 26, Payload.DQ: 2 * 6 * 16}
    for program in (plan.forward, plan.backward):
        rows: Counter[Payload] = Counter()
        for step in program.steps:
            for t in step.sends:
                rows[t.payload] += len(replay.rows_of(t.piece, program.block_rows))
        assert {payload: program.rows_sent(payload) for payload in rows} == rows
        assert program.bytes_sent(sizes) == sum(count * bytes_of[payload] for payload, count in rows.items())


def check_pairs(program: Sequence[Program], layout: Layout, kv_layout: Layout, allowed: list[Bools]) -> None:
    """Over all ranks and steps each allowed pair is computed once, and no other."""
    counts = np.zeros((len(allowed), layout.seq_len, kv_layout.seq_len), dtype=np.int64)
    for rank, own_steps in enumerate(program):
        for visit in (v for step in own_steps.steps for v in step.visits):
            rows = replay.rows_of(visit.piece, own_steps.block_rows)
            q, k = layout.positions(rank), kv_layout.positions(rank)
            if own_steps.carried is Payload.KV:
                k = kv_layout.positions(visit.piece.block)[rows]
            else:
                q = layout.positions(visit.piece.block)[rows]
            local = tile_counts(visit.tiles, len(allowed), len(q), len(k))
            for row in range(len(allowed)):
                counts[row][np.ix_(q, k)] += local[row]
    np.testing.assert_array_equal(counts, np.stack(allowed).astype(int))


def check_work(plan: Plan, layout: Layout, allowed: list[Bools]) -> None:
    work = tuple(int(sum(a[layout.positions(r)].sum() for a in allowed)) for r in range(layout.world_size))
    assert plan.work == work
    assert plan.imbalance == (pytest.approx(max(work) * len(work) / sum(work) - 1) if sum(work) else 0)


def check_all(
    built: list[Mask],
    layout: Layout,
    kv_layout: Layout,
    allowed: list[Bools],
    exchanges: Sequence[Exchange] = (),
) -> None:
    for exchange in exchanges or replay.exchanges_of(layout.world_size):
        for backward in (Phase.BACKWARD, Phase.BACKWARD_BY_QUERIES):
            plans = plans_of(built, layout, kv_layout, exchange, backward)
            check_plans(plans, exchange, CommPattern(backward.carried, tuple(built), layout, kv_layout))
            check_pairs([p.forward for p in plans], layout, kv_layout, allowed)
            check_pairs([p.backward for p in plans], layout, kv_layout, allowed)
            check_work(plans[0], layout, allowed)
            if isinstance(exchange, Gather):
                check_least(plans, layout, kv_layout, allowed)


def check_least(plans: Sequence[Plan], layout: Layout, kv_layout: Layout, allowed: list[Bools]) -> None:
    """A gather moves each row once to each rank that has an allowed pair in it, and to no other."""
    either = np.any(allowed, axis=0)
    if plans[0].backward.carried is Payload.Q:
        check_received([p.backward for p in plans], either.T, layout, kv_layout)
    else:
        check_received([p.backward for p in plans], either, kv_layout, layout)
    check_received([p.forward for p in plans], either, kv_layout, layout)


def check_received(programs: Sequence[Program], needs: Bools, held: Layout, needing: Layout) -> None:
    for rank, program in enumerate(programs):
        least = set(np.flatnonzero(needs[needing.positions(rank)].any(axis=0)).tolist())
        least -= set(held.positions(rank).tolist())
        received = [
            int(position)
            for step in program.steps
            for t in step.receives
            if t.payload is program.carried
            for position in held.positions(t.piece.block)[replay.rows_of(t.piece, program.block_rows)]
        ]
        assert sorted(received) == sorted(least)


@given(st.data(), st.integers(0, 60), st.integers(1, 8), st.integers(1, 2))
@examples(60)
def test_self_attention(data: st.DataObject, seq_len: int, world: int, batch: int) -> None:
    layout = data.draw(layouts(seq_len, world))
    cases = data.draw(st.lists(masks(seq_len), min_size=batch, max_size=batch))
    allowed = [case.allowed(seq_len, seq_len) for case in cases]
    exchange = data.draw(st.sampled_from(replay.exchanges_of(world)))
    check_all([case.build(seq_len) for case in cases], layout, layout, allowed, [exchange])


@pytest.mark.parametrize("name", ["full", "causal", "window_both", "documents&causal"])
def test_every_exchange(name: str) -> None:
    """Messages both ways between all ranks, of both kinds in one step where there are stages."""
    case, layout = mask_case(name), zigzag(47, 6)
    check_all([case.build(47)], layout, layout, [case.allowed(47, 47)])


@given(st.data(), st.integers(0, 50), st.integers(0, 50), st.integers(1, 8), st.integers(1, 2))
@examples(45)
def test_cross_attention(data: st.DataObject, q_len: int, k_len: int, world: int, batch: int) -> None:
    layout, kv_layout = data.draw(layouts(q_len, world)), data.draw(layouts(k_len, world))
    cases = data.draw(st.lists(masks(max(q_len, k_len), cross=True), min_size=batch, max_size=batch))
    built = [case.build(max(q_len, k_len)) for case in cases]
    exchange = data.draw(st.sampled_from(replay.exchanges_of(world)))
    check_all(built, layout, kv_layout, [case.allowed(q_len, k_len) for case in cases], [exchange])


def _balanced(seq_len: int, world: int) -> Layout:
    return balanced(causal(), seq_len, world)


@pytest.mark.parametrize("exchange", [Ring(), Ring(4), Gather(3)], ids=repr)
@pytest.mark.parametrize("make", [zigzag, striped, _balanced])
@pytest.mark.parametrize(
    "mask",
    [full(), causal(), sliding_window(20, 9), documents([0, 1, 60, 80, 140]) & causal()],
    ids=["full", "causal", "window", "documents"],
)
def test_many_ranks(mask: Mask, make: Callable[[int, int], Layout], exchange: Exchange) -> None:
    layout = make(140, 12)
    for backward in (Phase.BACKWARD, Phase.BACKWARD_BY_QUERIES):
        travel = CommPattern(backward.carried, (mask,), layout, layout)
        check_plans(plans_of([mask], layout, None, exchange, backward), exchange, travel)


@pytest.mark.parametrize("exchange", [Ring(), Ring(8), Gather()], ids=repr)
@pytest.mark.parametrize(
    "mask", [causal(), pytest.param(sliding_window(20, 9), marks=pytest.mark.long)], ids=["causal", "window"]
)
def test_sixty_four_ranks(mask: Mask, exchange: Exchange) -> None:
    layout = zigzag(260, 64)
    plans = plans_of([mask], layout, None, exchange, Phase.BACKWARD)
    check_plans(plans, exchange, CommPattern(Payload.KV, (mask,), layout, layout))


@pytest.mark.parametrize("make", [contiguous, zigzag, striped, _balanced])
@pytest.mark.parametrize("seq_len", [0, 1, 3])
def test_ranks_without_tokens(seq_len: int, make: Callable[[int, int], Layout]) -> None:
    layout = make(seq_len, 8)
    check_all([causal()], layout, layout, [np.tri(seq_len, dtype=np.bool_)])
    assert plans_of([causal()], layout)[-1].forward.rows_sent(Payload.KV) <= seq_len


def test_all_tokens_on_one_rank() -> None:
    layout = Layout(5, ((), (range(5),), ()))
    check_all([full()], layout, layout, [np.ones((5, 5), dtype=np.bool_)])
    plans = plans_of([full()], layout)
    assert not any(plan.communicates for plan in plans)
    assert [plan.work for plan in plans] == [(0, 25, 0)] * 3
    assert plans[0].imbalance == pytest.approx(2)


def test_one_rank_moves_nothing() -> None:
    for exchange in replay.exchanges_of(1):
        (plan,) = plans_of([causal()], contiguous(9, 1), None, exchange)
        assert not plan.communicates
        assert [len(plan.forward.steps), len(plan.backward.steps)] == [1, 1]


@pytest.mark.parametrize("left", [1, 15, 16])
def test_a_window_within_a_shard_costs_one_hop(left: int) -> None:
    """A query sees `left` keys back: shards of 16 reach into the next one at most."""
    plans = plans_of([sliding_window(left)], contiguous(128, 8))
    for plan in plans:
        last = plan.rank == 7
        assert plan.forward.rows_sent(Payload.KV) == (0 if last else 16)
        assert plan.backward.rows_sent(Payload.KV) == (0 if last else 16)
        assert len(plan.forward.steps) == 2
        # Gradients go home from the neighbour, one half of the block after the other.
        halves = [t for s in plan.backward.steps for t in s.sends if t.payload is Payload.DKV]
        assert [t.peer for t in halves] == [plan.rank - 1] * (2 if plan.rank else 0)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("left", [1, 9, 16, 40])
def test_a_window_costs_a_gather_its_halo(left: int, stages: int) -> None:
    plans = plans_of([sliding_window(left)], contiguous(128, 8), None, Gather(stages))
    received = [sum(plan.forward.rows_of(t) for step in plan.forward.steps for t in step.receives) for plan in plans]
    assert received == [min(left, 16 * rank) for rank in range(8)]


def test_documents_cost_a_gather_what_crosses_a_boundary() -> None:
    """Two documents cross a boundary of shards of 16: one by 3 rows, one by 20."""
    mask = documents([0, 13, 17, 32, 60, 70]) & causal()
    layout = Layout(70, tuple((range(a, min(a + 16, 70)),) for a in range(0, 70, 16)))
    plans = plans_of([mask], layout, None, Gather())
    received = [
        {t.piece.block: plan.forward.rows_of(t) for s in plan.forward.steps for t in s.receives} for plan in plans
    ]
    assert received == [{}, {0: 3}, {}, {2: 16}, {3: 4}]


def test_stages_are_even() -> None:
    for plan in plans_of([full()], contiguous(100, 4), None, Gather(4)):
        for step in plan.forward.steps[:4]:
            assert sorted(plan.forward.rows_of(t) for t in step.receives) in ([6, 6, 6], [6, 6, 7], [7, 7, 7])[:3]


def test_a_window_of_one_more_costs_two_hops() -> None:
    plans = plans_of([sliding_window(17)], contiguous(128, 8))
    assert plans[3].forward.rows_sent(Payload.KV) == 32


def test_documents_within_shards_cost_nothing() -> None:
    for exchange in replay.exchanges_of(8):
        plans = plans_of([documents(range(0, 129, 4))], contiguous(128, 8), None, exchange)
        assert not any(plan.communicates for plan in plans)
        assert {len(plan.forward.steps) for plan in plans} == {1}


def test_full_attention_sends_each_block_around_once() -> None:
    world, seq_len = 8, 128
    for plan in plans_of([full()], zigzag(seq_len, world)):
        assert plan.forward.rows_sent(Payload.KV) == (world - 1) * seq_len // world
        assert plan.backward.rows_sent(Payload.KV) == (world - 1) * seq_len // world
        assert plan.backward.rows_sent(Payload.DKV) == (world - 1) * seq_len // world
        assert plan.imbalance == 0


def outer_rows(plan: Plan, program: Program, num_inner: int, payload: Payload) -> list[list[int]]:
    """For each step: the rows that the rank sends to another group."""
    return [
        [
            program.rows_of(t)
            for t in step.sends
            if t.payload is payload and t.peer // num_inner != plan.rank // num_inner
        ]
        for step in program.steps
    ]


def test_a_double_ring_crosses_the_slow_axis_once_a_turn() -> None:
    """Two groups of four: each rank's block crosses once, at the turn's beginning, and has all of it for its way."""
    for plan in plans_of([full()], contiguous(128, 8), None, Ring(2)):
        assert outer_rows(plan, plan.forward, 4, Payload.KV) == [[16]] + [[]] * 7
        first, *_, last = [
            i
            for i, s in enumerate(plan.forward.steps)
            if any(t.peer // 4 != plan.rank // 4 for t in (*s.sends, *s.sent))
        ]
        assert (first, last) == (0, 3)
        crossing = [t.piece for t in plan.forward.steps[0].receives if t.peer // 4 != plan.rank // 4]
        assert [v.piece for v in plan.forward.steps[4].visits] == crossing
        # The gradients' sum of the whole group crosses once, too, in halves, and work is left for it to hide under.
        home = outer_rows(plan, plan.backward, 4, Payload.DKV)
        assert [step for step in home if step] == [[8], [8]]
        assert all(step.visits for step in plan.backward.steps)
        single = build_plan(Ring(), (full(),), contiguous(128, 8), contiguous(128, 8), plan.rank)
        assert plan.forward.rows_sent(Payload.KV) == single.forward.rows_sent(Payload.KV)


def test_messages_of_a_double_ring_stay_on_one_axis() -> None:
    for num_outer in (2, 3, 4, 6):
        inner = 12 // num_outer
        for plan in plans_of([causal()], zigzag(200, 12), None, Ring(num_outer)):
            for step in (*plan.forward.steps, *plan.backward.steps):
                for t in (*step.sends, *step.receives):
                    assert t.peer // inner == plan.rank // inner or t.peer % inner == plan.rank % inner


def sizes(heads: int, kv_heads: int, itemsize: int = 2) -> AttentionShape:
    return AttentionShape(1, heads, kv_heads, 64, 64, itemsize, 8 if itemsize == 8 else 4)


@pytest.mark.parametrize("exchange", [Ring(), Ring(2), Gather()])
def test_queries_travel_where_that_is_fewer_bytes(exchange: Exchange) -> None:
    """Queries and their gradients are 8 + 1/8 bytes a number, keys and values with theirs 12 for each kv head."""
    layout = zigzag(128, 4)
    for heads, kv_heads, expected in (
        (8, 8, Phase.BACKWARD_BY_QUERIES),
        (8, 4, Phase.BACKWARD),
        (8, 1, Phase.BACKWARD),
    ):
        for itemsize in (2, 4, 8):
            found = select_backward(exchange, (causal(),), layout, layout, sizes(heads, kv_heads, itemsize))
            assert found is expected
            by_both = {
                phase: sum(
                    p.backward.bytes_sent(sizes(heads, kv_heads, itemsize))
                    for p in plans_of([causal()], layout, None, exchange, phase)
                )
                for phase in (Phase.BACKWARD, Phase.BACKWARD_BY_QUERIES)
            }
            assert by_both[found] == min(by_both.values())


def test_what_nobody_wants_does_not_count() -> None:
    layout = zigzag(128, 4)
    args = (Ring(), (causal(),), layout, layout)
    # Keys and values alone against queries with gradients, and the other way round.
    assert select_backward(*args, sizes(8, 8), (True, False)) is Phase.BACKWARD
    assert select_backward(*args, sizes(8, 4), (False, True)) is Phase.BACKWARD_BY_QUERIES
    # Few queries over many keys.
    few, many = contiguous(8, 4), contiguous(800, 4)
    assert select_backward(Ring(), (full(),), few, many, sizes(8, 1)) is Phase.BACKWARD_BY_QUERIES


def test_causal_zigzag_is_even() -> None:
    for world in (2, 8, 64):
        for seq_len in (world * 200, world * 200 + 77):
            plan = build_plan(Ring(), (causal(),), zigzag(seq_len, world), zigzag(seq_len, world), 0)
            assert plan.imbalance < 0.01
    assert plans_of([causal()], contiguous(1600, 8))[0].imbalance > 0.8


def test_blocks_stop_where_nobody_needs_them_further() -> None:
    """Causal, contiguous: the last rank needs block s, W - 1 - s hops away; so rank r passes on blocks 0 to r."""
    plans = plans_of([causal()], contiguous(128, 8))
    for plan in plans:
        passed_on = [t.piece.block for s in plan.forward.steps for t in s.sends]
        assert sorted(passed_on) == ([] if plan.rank == 7 else list(range(plan.rank + 1)))


def test_describe_is_for_people() -> None:
    told = plans_of([causal()], contiguous(8, 2))[0].describe()
    assert "ring plan of rank 0 of 2" in told
    assert "work 10 pairs" in told
    assert "kv[0] → 1" in told
    assert "dkv[0: 2 rows] ← 1" in told
    assert "nothing moves" in plans_of([causal()], contiguous(8, 1))[0].describe()


def test_is_built_once() -> None:
    layout = zigzag(40, 4)
    first = build_plan(Ring(), (causal() & documents([0, 9, 40]),), layout, layout, 2)
    again = build_plan(Ring(), (documents([0, 9, 40]) & causal(),), zigzag(40, 4), zigzag(40, 4), 2)
    assert again is first


def test_refuses_what_it_has_not() -> None:
    layout = contiguous(8, 2)
    with pytest.raises(MaskError, match="ends at 9"):
        build_plan(Ring(), (documents([0, 9]),), layout, layout, 0)


def test_a_million_tokens_on_a_thousand_ranks() -> None:
    """One rank's plan, 10,000 documents, causal, zigzag: under 2 s, a required bound; then from the cache."""
    seq_len, world = 1_048_576, 1024
    cuts = np.sort(np.random.default_rng(0).integers(0, seq_len, 9_999))
    took_s = []
    for rank in (511, 0):
        for cached in (build_plan, needed_blocks, pairs_of_queries, masks_module._slices, zigzag):
            cached.cache_clear()
        mask = documents([0, *cuts.tolist(), seq_len]) & causal()
        start_s = time.perf_counter()
        layout = zigzag(seq_len, world)
        plan = build_plan(Ring(), (mask,), layout, layout, rank)
        took_s.append(time.perf_counter() - start_s)
        assert build_plan(Ring(), (mask,), layout, layout, rank) is plan
    assert min(took_s) < 2
    assert sum(v.tiles.area() for s in plan.forward.steps for v in s.visits) == plan.work[0]
    assert sum(plan.work) == int(sum(n * (n + 1) // 2 for n in np.diff([0, *cuts, seq_len]).tolist()))
