"""What is chosen where it is plain what should be, what cannot be chosen, and how it is told."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from ringattn import (
    Compute,
    CostModel,
    Layout,
    Link,
    Mask,
    balanced,
    causal,
    contiguous,
    documents,
    full,
    sliding_window,
    striped,
    zigzag,
)
from ringattn.plan.comm_pattern import CommPattern
from ringattn.plan.exchanges import Gather, Ring, select_backward
from ringattn.plan.payload import AttentionShape, Payload
from ringattn.plan.plan import Phase
from ringattn.plan.select_exchange import (
    Choice,
    ExchangeProblem,
    candidates,
    predict,
    select_exchange,
)
from tests.cost.simulator import simulate, simulate_direction

GPU = Compute(300e12, 200e12, 1500e9, 10e-6)
FAST, SLOW = Link(5e-6, 400e9), Link(20e-6, 10e9)
MODEL = CostModel(FAST, GPU, SLOW)
MHA, GQA = AttentionShape(1, 32, 32, 128, 128, 2, 4), AttentionShape(1, 32, 4, 128, 128, 2, 4)
BOTH = (True, True)
MOST_AVERAGE_REGRET, MOST_REGRET_OF_99_PERCENT = 0.03, 1.5


def setting(
    mask: Mask, layout: Layout, sizes: AttentionShape = GQA, mesh: tuple[int, ...] | None = None
) -> ExchangeProblem:
    return ExchangeProblem(sizes, (mask,), layout, layout, mesh or (layout.world_size,), BOTH)


def chosen(choice: Choice) -> str:
    assert choice.chosen is not None
    return choice.chosen.exchange


PACKED = documents(list(range(0, 32769, 512))) & causal()


def test_a_long_causal_sequence_goes_round_a_ring() -> None:
    """Everything that travels hides under the work, and the plainest is taken of those as fast."""
    found = select_exchange(setting(causal(), zigzag(1 << 18, 8)), MODEL)
    assert chosen(found) == "ring"


def test_windows_and_packed_documents_are_gathered() -> None:
    slow = replace(MODEL, link=SLOW)
    for mask in (sliding_window(100), documents([*range(0, 32768, 700), 32768]) & causal()):
        assert chosen(select_exchange(setting(mask, contiguous(32768, 8)), slow)) == "gather"


def test_many_heads_on_fast_links_are_spread() -> None:
    """Work that the layout makes uneven, and heads make even."""
    assert chosen(select_exchange(setting(causal(), contiguous(1 << 16, 8), MHA), MODEL)) == "ulysses"


def test_a_ring_where_there_is_no_memory_for_more() -> None:
    where = setting(full(), contiguous(1 << 15, 16))
    latencies = replace(MODEL, link=Link(1e-3, 400e9))
    assert chosen(select_exchange(where, latencies)) != "ring"
    needed = predict(Ring(), where, latencies).buffer_bytes
    tight = select_exchange(where, replace(latencies, buffer_bytes=needed))
    assert chosen(tight) == "ring"
    gather = next(c for c in tight.candidates if c.exchange == "gather")
    assert gather.refusal is not None
    assert "MiB of buffers, and the model allows" in gather.refusal
    nothing = select_exchange(where, replace(latencies, buffer_bytes=0))
    assert nothing.chosen is None


def test_on_a_mesh() -> None:
    """Heads make uneven work more even where there are heads; two rings where there are too few."""
    layout = contiguous(1 << 15, 16)
    assert chosen(select_exchange(setting(causal(), layout, MHA, (2, 8)), MODEL)) == "hybrid"
    one_head = replace(MHA, heads=1, kv_heads=1)
    assert chosen(select_exchange(setting(causal(), layout, one_head, (2, 8)), MODEL)) == "double ring"


def test_what_does_not_apply_is_told() -> None:
    flat = select_exchange(setting(causal(), zigzag(64, 4), replace(MHA, heads=4, kv_heads=4)), MODEL)
    refused = {str(c): c.refusal for c in flat.candidates if c.refusal}
    assert set(refused) == {"double ring", "hybrid", "hybrid in 2 stages", "ulysses in 2 stages"}
    assert "mesh of two axes" in str(refused["hybrid"])
    mesh = select_exchange(setting(causal(), zigzag(64, 4), mesh=(2, 2)), MODEL)
    assert {c.exchange for c in mesh.candidates if c.refusal} == {"ring", "gather", "ulysses"}
    text = str(mesh)
    assert text.count("\n->") == 1
    assert "gather: cannot run; it needs one group of all ranks" in text
    assert "causal(); zigzag(64, 4); 2 x 2 ranks" in text


def test_asked_for_by_name_and_by_stages() -> None:
    where = setting(PACKED, zigzag(32768, 4))
    for name in ("ring", "gather", "ulysses"):
        assert chosen(select_exchange(where, MODEL, name)) == name
    for stages in (1, 2, 7):
        found = select_exchange(where, MODEL, "gather", stages)
        assert [(c.exchange, c.stages) for c in found.candidates] == [("gather", stages)]
    assert {c.exchange for c in select_exchange(where, MODEL, "auto", 3).candidates if not c.refusal} == {
        "gather",
        "ulysses",
    }


def test_forward_alone_is_chosen_by_the_forward() -> None:
    where = setting(causal(), zigzag(32768, 4))
    for candidate in candidates()[:5]:
        alone = predict(candidate.value, replace(where, wanted=(False, False)), MODEL)
        there = predict(candidate.value, where, MODEL)
        assert alone.forward_s == there.forward_s
        assert alone.backward_s == 0.0 < there.backward_s
        assert alone.num_bytes < there.num_bytes


@pytest.mark.parametrize("mesh", [(4,), (2, 2), (1,), (1, 1), (4, 1), (1, 4)])
def test_every_mesh_and_length_has_a_choice(mesh: tuple[int, ...]) -> None:
    world = mesh[0] * mesh[-1] if len(mesh) == 2 else mesh[0]
    for length in (0, 1, 3, 61):
        for sizes in (replace(MHA, heads=1, kv_heads=1), GQA):
            found = select_exchange(setting(causal(), zigzag(length, world), sizes, mesh), MODEL)
            assert found.chosen is not None
            assert str(found)
            assert len(found.candidates) == len(candidates())


def test_queries_do_not_travel_where_that_makes_a_rank_busier() -> None:
    """Long documents beside short ones: queries are dealt evenly, and keys' work is what it is."""
    ends = [0, 4096, 4691, 5200, 6000, 6300, 8200, 9000, 12000, 12500, 14000, 16384]
    packed = documents(ends) & causal()
    even = balanced(packed, 16384, 4)
    pattern = CommPattern(Payload.KV, (packed,), even, even)
    pairs = np.zeros((4, 4), dtype=np.int64)
    for rank in range(4):
        for block, tiles in pattern.tiles(rank).items():
            pairs[rank, block] = tiles.area()
    assert pairs.sum(axis=1).max() < 1.05 * pairs.mean() * 4
    assert pairs.sum(axis=0).max() > 1.1 * pairs.sum(axis=1).max()
    for exchange in (Ring(), Gather()):
        assert select_backward(exchange, (packed,), even, even, MHA) is Phase.BACKWARD
        for mask in (full(), causal()):
            layout = zigzag(16384, 4)
            assert select_backward(exchange, (mask,), layout, layout, MHA) is Phase.BACKWARD_BY_QUERIES


def settings_and_models(seed: int) -> tuple[ExchangeProblem, CostModel]:
    """Any mask, layout, mesh and heads; links and compute of any speed."""
    draw = random.Random(seed)
    world, length = draw.choice([1, 2, 3, 4, 6, 8]), draw.choice([1, 7, 61, 600])
    ends = [0, length // 3, length // 3, length]
    masks = full(), causal(), sliding_window(5), sliding_window(3, 4), documents(ends) & causal()
    batch, kv_heads = draw.choice([1, 2]), draw.choice([1, 3, 8])
    rows = tuple(draw.choice(masks) for _ in range(draw.choice([1, batch])))
    layout = draw.choice([contiguous, zigzag, striped])(length, world)
    sizes = AttentionShape(batch, kv_heads * draw.choice([1, 2]), kv_heads, 8, 6, 2, 4)
    meshes = [(world,), *((outer, world // outer) for outer in range(1, world + 1) if world % outer == 0)]

    def some(least: float, most: float) -> float:
        return float(10 ** draw.uniform(least, most))

    compute = Compute(some(7, 10), some(7, 10), some(6, 10), draw.choice([0.0, some(-6, -3)]))
    outer = draw.choice([None, Link(some(-6, -3), some(5, 9))])
    model = CostModel(Link(draw.choice([0.0, some(-6, -3)]), some(5, 9)), compute, outer)
    wanted = draw.choice([(True, True), (True, False), (False, True), (False, False)])
    return ExchangeProblem(sizes, rows, layout, layout, draw.choice(meshes), wanted), model


@pytest.mark.parametrize("seeds", [range(16), pytest.param(range(16, 300), marks=pytest.mark.long)], ids=len)
def test_no_bound_exceeds_what_is_simulated(seeds: range) -> None:
    close, count = 0, 0
    for seed in seeds:
        where, model = settings_and_models(seed)
        for candidate in select_exchange(where, model).candidates:
            if candidate.prediction is None:
                continue
            exchange = candidate.value
            for phase in where.phases(exchange):
                found = max(simulate_direction(exchange, where.workload(phase), model).now)
                bound = exchange.lower_bound(where.workload(phase), model).seconds
                assert bound <= found * (1 + 1e-9), (seed, candidate, phase)
                close += bound > 0.5 * found
                count += 1
    assert close > 0.8 * count


def regret(seeds: range) -> list[float]:
    """By how much the chosen exchange takes longer than the best one, simulated."""
    found = []
    for seed in seeds:
        where, model = settings_and_models(seed)
        choice = select_exchange(where, model)
        seconds = {
            c.exchange + str(c.stages): simulate(c.value, where, model) for c in choice.candidates if c.prediction
        }
        assert choice.chosen is not None
        best = min(seconds.values())
        found.append(seconds[choice.chosen.exchange + str(choice.chosen.stages)] / best if best else 1.0)
    return sorted(found)


def test_the_choice_is_nearly_the_best() -> None:
    """Of random calls on few ranks, where latencies count the most."""
    slower = regret(range(40))
    assert sum(slower) / len(slower) <= 1.0 + 2 * MOST_AVERAGE_REGRET


@pytest.mark.long
def test_the_choice_is_nearly_the_best_of_a_thousand() -> None:
    slower = regret(range(1000))
    assert sum(slower) / len(slower) <= 1.0 + MOST_AVERAGE_REGRET
    assert slower[989] <= MOST_REGRET_OF_99_PERCENT


@pytest.mark.parametrize("mask", [causal(), documents([*range(0, 1 << 20, 105), 1 << 20]) & causal()], ids=str)
def test_a_thousand_ranks_are_planned_without_their_messages(mask: Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million tokens: no program is written, and no tiles are made."""

    def refuse(*_: object) -> None:
        raise AssertionError("the tiles of a rank")

    monkeypatch.setattr("ringattn.plan.comm_pattern.tiles_of_rank", refuse)
    monkeypatch.setattr("ringattn.plan.comm_pattern.tiles_of_keys", refuse)
    found = select_exchange(setting(mask, zigzag(1 << 20, 1024)), MODEL)
    assert chosen(found) == ("ring" if mask == causal() else "gather")
