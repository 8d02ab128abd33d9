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
    ArgumentError,
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
from ringattn.geometry.plan import EXCHANGES, Payload, Plan, Step, build_plan
from ringattn.geometry.tiles import needs, work_of_ranks
from tests.geometry.brute import tile_counts
from tests.geometry.strategies import examples, layouts, masks
from tests.harness.cases import Bools

Program = Sequence[tuple[Step, ...]]  # of every rank


def plans_of(
    built: Sequence[Mask], layout: Layout, kv_layout: Layout | None = None, exchange: str = "ring"
) -> list[Plan]:
    kv_layout = layout if kv_layout is None else kv_layout
    return [build_plan(exchange, tuple(built), layout, kv_layout, rank) for rank in range(layout.world_size)]


def check_plans(plans: Sequence[Plan]) -> None:
    """Everything that can be told without spelling out pairs."""
    forward, backward = [p.forward for p in plans], [p.backward for p in plans]
    for program in (forward, backward):
        check_matched(program)
        check_held(program)
    check_gradients_come_home(backward)
    for plan in plans:
        assert not any(t.payload is Payload.DKV for s in plan.forward for t in (*s.sends, *s.receives))
        check_same_tiles(plan)
        moved = any(s.sends or s.receives for s in plan.backward)
        assert plan.communicates == moved
        check_counts(plan)


def check_same_tiles(plan: Plan) -> None:
    """A block is attended to in one step, and backward goes through what forward went through."""
    there, back = ([(s.block, s.tiles) for s in steps if s.tiles] for steps in (plan.forward, plan.backward))
    for blocks in (there, back):
        assert len({block for block, _ in blocks}) == len(blocks)
    assert {block for block, _ in there} == {block for block, _ in back}
    for block, tiles in there:
        np.testing.assert_array_equal(tiles.table, dict(back)[block].table)


def check_counts(plan: Plan) -> None:
    """rows_sent and bytes_sent are what the steps say."""
    rows: Counter[tuple[str, Payload]] = Counter()
    for name, steps in (("forward", plan.forward), ("backward", plan.backward)):
        for step in steps:
            for t in step.sends:
                rows[name, t.payload] += plan.block_rows[t.block]
    for payload in Payload:
        assert plan.rows_sent(payload, plan.forward) == rows["forward", payload]
        assert plan.rows_sent(payload, plan.backward) == rows["backward", payload]
    there, back = plan.bytes_sent(10, 7)
    assert there == 10 * rows["forward", Payload.KV]
    assert back == 10 * rows["backward", Payload.KV] + 7 * rows["backward", Payload.DKV]
    assert plan.bytes_sent(10) == (there, 10 * rows["backward", Payload.KV])


def check_matched(program: Program) -> None:
    """Every message stands in the same step of its two ranks, and messages cannot be confused."""
    assert len({len(steps) for steps in program}) == 1
    for step in zip(*program, strict=True):
        sent = Counter((r, t.peer, t.payload, t.block) for r, s in enumerate(step) for t in s.sends)
        received = Counter((t.peer, r, t.payload, t.block) for r, s in enumerate(step) for t in s.receives)
        assert sent == received
        assert not any(sender == receiver for sender, receiver, *_ in sent)
        # comm.ring tells messages apart by (sender, receiver, payload).
        pairs = Counter((sender, receiver, payload) for sender, receiver, payload, _ in sent.elements())
        assert not pairs or max(pairs.values()) == 1
        for rank in range(len(program)):
            check_traffic(rank, step[rank])


def check_traffic(rank: int, step: Step) -> None:
    """One send and one receive per payload, but for a gradient on its last way home: that may come besides."""
    for payload in Payload:
        assert sum(t.payload is payload for t in step.sends) <= 1
        ring = [t for t in step.receives if t.payload is payload and t.block != rank]
        home = [t for t in step.receives if t.payload is payload and t.block == rank]
        assert len(ring) <= 1
        assert len(home) <= (payload is Payload.DKV)


def check_held(program: Program) -> None:
    """A rank attends to and sends only what it holds, and frees each block right after its last use."""
    for rank, steps in enumerate(program):
        held, last_use = {rank}, {rank: 0}
        for index, step in enumerate(steps):
            used = {t.block for t in step.sends if t.payload is Payload.KV}
            used |= {step.block} if step.tiles else set()
            assert used <= held, f"rank {rank} uses {used - held} in step {index} without holding it"
            arrived = {t.block for t in step.receives if t.payload is Payload.KV}
            assert not arrived & held
            held |= arrived
            last_use.update(dict.fromkeys(used | arrived, index))
            assert set(step.frees) <= held
            assert len(set(step.frees)) == len(step.frees)
            held -= set(step.frees)
        assert not held, f"rank {rank} keeps {held} for ever"
        freed = {block: index for index, step in enumerate(steps) for block in step.frees}
        assert freed == last_use


def check_gradients_come_home(program: Program) -> None:
    """Every rank's share of a block's gradient reaches the block's own rank once, by way of one travelling sum."""
    world = len(program)
    sums: list[dict[int, list[int]]] = [{rank: []} for rank in range(world)]
    for step in zip(*program, strict=True):
        flying = {}
        for rank in range(world):
            for t in step[rank].sends:
                if t.payload is Payload.DKV:
                    flying[t.peer, t.block] = sums[rank].pop(t.block)
        for rank in range(world):
            for t in step[rank].receives:
                if t.payload is Payload.DKV:
                    assert t.block not in sums[rank], "a sum would be overwritten"
                    sums[rank][t.block] = flying.pop((rank, t.block))
        assert not flying
        for rank in range(world):
            if step[rank].tiles:
                # Into the sum that is here by the end of the step; one begun here must find its own way home.
                sums[rank].setdefault(step[rank].block, []).append(rank)
    for rank in range(world):
        shares = [r for r, steps in enumerate(program) for s in steps if s.tiles and s.block == rank]
        assert sorted(sums[rank].pop(rank)) == shares
        assert not sums[rank], f"rank {rank} still has sums of {sorted(sums[rank])}"


def check_pairs(plans: Sequence[Plan], layout: Layout, kv_layout: Layout, allowed: list[Bools]) -> None:
    """Over all ranks and steps each allowed pair is computed once, and no other."""
    counts = np.zeros((len(allowed), layout.seq_len, kv_layout.seq_len), dtype=np.int64)
    for plan in plans:
        own = layout.positions(plan.rank)
        for step in plan.forward:
            keys = kv_layout.positions(step.block)
            assert plan.block_rows[step.block] == len(keys)
            local = tile_counts(step.tiles, len(allowed), len(own), len(keys))
            for row in range(len(allowed)):
                counts[row][np.ix_(own, keys)] += local[row]
        work = tuple(int(sum(a[layout.positions(r)].sum() for a in allowed)) for r in range(layout.world_size))
        assert plan.work == work
        if sum(work):
            assert plan.imbalance == pytest.approx(max(work) * len(work) / sum(work) - 1)
        else:
            assert plan.imbalance == 0
    np.testing.assert_array_equal(counts, np.stack(allowed).astype(int))


@given(st.data(), st.integers(0, 80), st.integers(1, 8), st.integers(1, 2))
@examples(120)
def test_self_attention(data: st.DataObject, seq_len: int, world: int, batch: int) -> None:
    layout = data.draw(layouts(seq_len, world))
    cases = data.draw(st.lists(masks(seq_len), min_size=batch, max_size=batch))
    for exchange in EXCHANGES:
        plans = plans_of([case.build(seq_len) for case in cases], layout, exchange=exchange)
        check_plans(plans)
        check_pairs(plans, layout, layout, [case.allowed(seq_len, seq_len) for case in cases])


@given(st.data(), st.integers(0, 60), st.integers(0, 60), st.integers(1, 8), st.integers(1, 2))
@examples(100)
def test_cross_attention(data: st.DataObject, q_len: int, k_len: int, world: int, batch: int) -> None:
    layout, kv_layout = data.draw(layouts(q_len, world)), data.draw(layouts(k_len, world))
    cases = data.draw(st.lists(masks(max(q_len, k_len), cross=True), min_size=batch, max_size=batch))
    for exchange in EXCHANGES:
        built = [case.build(max(q_len, k_len)) for case in cases]
        plans = plans_of(built, layout, kv_layout, exchange)
        check_plans(plans)
        check_pairs(plans, layout, kv_layout, [case.allowed(q_len, k_len) for case in cases])


def _balanced(seq_len: int, world: int) -> Layout:
    return balanced(causal(), seq_len, world)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("world", [16, 63, 64])
@pytest.mark.parametrize("make", [contiguous, zigzag, striped, _balanced])
@pytest.mark.parametrize(
    "mask",
    [full(), causal(), sliding_window(20, 9), documents([0, 1, 100, 150, 260]) & causal()],
    ids=["full", "causal", "window", "documents"],
)
def test_many_ranks(mask: Mask, make: Callable[[int, int], Layout], world: int, exchange: str) -> None:
    check_plans(plans_of([mask], make(260, world), exchange=exchange))


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("make", [contiguous, zigzag, striped, _balanced])
@pytest.mark.parametrize("seq_len", [0, 1, 3])
def test_ranks_without_tokens(seq_len: int, make: Callable[[int, int], Layout], exchange: str) -> None:
    layout = make(seq_len, 8)
    plans = plans_of([causal()], layout, exchange=exchange)
    check_plans(plans)
    check_pairs(plans, layout, layout, [np.tri(seq_len, dtype=np.bool_)])
    assert plans[-1].rows_sent(Payload.KV, plans[-1].forward) <= seq_len


def test_all_tokens_on_one_rank() -> None:
    layout = Layout(5, ((), (range(5),), ()))
    plans = plans_of([full()], layout)
    check_plans(plans)
    assert not any(plan.communicates for plan in plans)
    assert [plan.work for plan in plans] == [(0, 25, 0)] * 3
    assert plans[0].imbalance == pytest.approx(2)


def test_one_rank_moves_nothing() -> None:
    (plan,) = plans_of([causal()], contiguous(9, 1))
    assert not plan.communicates
    assert [len(plan.forward), len(plan.backward)] == [1, 1]
    assert plan.bytes_sent(100, 100) == (0, 0)


@pytest.mark.parametrize("left", [1, 15, 16])
def test_a_window_within_a_shard_costs_one_hop(left: int) -> None:
    """A query sees `left` keys back: shards of 16 reach into the next one at most."""
    plans = plans_of([sliding_window(left)], contiguous(128, 8))
    check_plans(plans)
    for plan in plans:
        last = plan.rank == 7
        assert plan.rows_sent(Payload.KV, plan.forward) == (0 if last else 16)
        assert plan.rows_sent(Payload.KV, plan.backward) == (0 if last else 16)
        assert len(plan.forward) == 2
        # The gradient's sum goes one hop there and home again from the neighbour.
        assert sum(t.payload is Payload.DKV for s in plan.backward for t in s.sends) == (plan.rank > 0) + (not last)


def test_a_window_of_one_more_costs_two_hops() -> None:
    plans = plans_of([sliding_window(17)], contiguous(128, 8))
    check_plans(plans)
    assert plans[3].rows_sent(Payload.KV, plans[3].forward) == 32


def test_documents_within_shards_cost_nothing() -> None:
    plans = plans_of([documents(range(0, 129, 4))], contiguous(128, 8))
    assert not any(plan.communicates for plan in plans)
    assert {len(plan.forward) for plan in plans} == {1}


def test_full_attention_sends_each_block_around_once() -> None:
    world, seq_len = 8, 128
    for plan in plans_of([full()], zigzag(seq_len, world)):
        assert plan.rows_sent(Payload.KV, plan.forward) == (world - 1) * seq_len // world
        assert plan.bytes_sent(2, 4) == (7 * 16 * 2, 7 * 16 * 2 + 8 * 16 * 4)
        assert plan.imbalance == 0


def test_causal_zigzag_is_even() -> None:
    for world in (2, 8, 64):
        for seq_len in (world * 200, world * 200 + 77):
            (plan,) = plans_of([causal()], zigzag(seq_len, world))[:1]
            assert plan.imbalance < 0.01
    assert plans_of([causal()], contiguous(1600, 8))[0].imbalance > 0.8


def test_blocks_stop_where_nobody_needs_them_further() -> None:
    """Causal, contiguous: the last rank needs block s, W - 1 - s hops away; so rank r passes on blocks 0 to r."""
    plans = plans_of([causal()], contiguous(128, 8))
    for plan in plans:
        passed_on = [t.block for s in plan.forward for t in s.sends]
        assert sorted(passed_on) == ([] if plan.rank == 7 else list(range(plan.rank + 1)))


def test_describe_is_for_people() -> None:
    told = plans_of([causal()], contiguous(8, 2))[0].describe()
    assert "ring plan of rank 0 of 2" in told
    assert "work 10 pairs" in told
    assert "kv[0] → 1" in told
    assert "dkv[0] ← 1" in told
    assert "nothing moves" in plans_of([causal()], contiguous(8, 1))[0].describe()


def test_is_built_once() -> None:
    layout = zigzag(40, 4)
    first = build_plan("ring", (causal() & documents([0, 9, 40]),), layout, layout, 2)
    again = build_plan("ring", (documents([0, 9, 40]) & causal(),), zigzag(40, 4), zigzag(40, 4), 2)
    assert again is first


def test_refuses_what_it_has_not() -> None:
    layout = contiguous(8, 2)
    with pytest.raises(ArgumentError, match=r"exchange='pigeon'.*'ring'"):
        build_plan("pigeon", (full(),), layout, layout, 0)
    with pytest.raises(MaskError, match="ends at 9"):
        build_plan("ring", (documents([0, 9]),), layout, layout, 0)


def test_a_million_tokens_on_a_thousand_ranks() -> None:
    """One rank's plan, 10,000 documents, causal, zigzag: under 2 s, a required bound; then from the cache."""
    seq_len, world = 1_048_576, 1024
    cuts = np.sort(np.random.default_rng(0).integers(0, seq_len, 9_999))
    took_s = []
    for rank in (511, 0):
        for cached in (build_plan, needs, work_of_ranks, masks_module._slices, zigzag):
            cached.cache_clear()
        mask = documents([0, *cuts.tolist(), seq_len]) & causal()
        start_s = time.perf_counter()
        layout = zigzag(seq_len, world)
        plan = build_plan("ring", (mask,), layout, layout, rank)
        took_s.append(time.perf_counter() - start_s)
        assert build_plan("ring", (mask,), layout, layout, rank) is plan
    assert min(took_s) < 2
    assert sum(s.tiles.area() for s in plan.forward) == plan.work[0]
    assert sum(plan.work) == int(sum(n * (n + 1) // 2 for n in np.diff([0, *cuts, seq_len]).tolist()))
