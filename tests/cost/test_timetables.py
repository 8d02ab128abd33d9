"""Timetables of all ranks at once are those of the ranks' own programs: messages, work, waits, bytes, buffers."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from ringattn import causal, chunked, contiguous, documents, full, sliding_window, striped, zigzag
from ringattn.cost.cost_model import Compute, CostModel, Link
from ringattn.cost.simulation import simulate
from ringattn.cost.spread_timetable import spread_timetable_for
from ringattn.cost.timetable import Timetable
from ringattn.cost.timetables import Scene, flops_per_pair, timetable_for
from ringattn.geometry.layout import Layout
from ringattn.geometry.masks import Mask
from ringattn.plan.exchanges import Exchange, Gather, Ring, build_plan
from ringattn.plan.head_parallel import HeadSharding, gathered_layout
from ringattn.plan.head_shards import shard_heads
from ringattn.plan.payload import AttentionShape
from ringattn.plan.plan import Phase
from tests.cost.reading import timetable_of
from tests.plan.replay import exchanges_of

SEQ_LEN = 61
SIZES = AttentionShape(2, 4, 2, 8, 6, 2, 4)
MASKS = (full(), causal(), sliding_window(7), documents([0, 3, 3, 20, 41, 61]) & causal(), chunked(9))
MODEL = CostModel(Link(1e-5, 1e9), Compute(1e11, 7e10, 1e10, 1e-5), Link(1e-4, 2e8))


def both(
    exchange: Exchange, mask: Mask, layout: Layout, phase: Phase, home: bool = True
) -> tuple[Timetable, Timetable]:
    """The timetable of the ranks' programs, and the one written for all of them."""
    world = layout.world_size
    inner = world // exchange.num_outer if isinstance(exchange, Ring) else world
    back = phase if phase.is_backward else Phase.BACKWARD
    plans = [build_plan(exchange, (mask,), layout, layout, rank, back) for rank in range(world)]
    programs = [plan.backward if phase.is_backward else plan.forward for plan in plans]
    if not home:
        programs = [program.without_gradients() for program in programs]
    per_pair = flops_per_pair(SIZES, phase)
    read = timetable_of(programs, SIZES, per_pair, 2, lambda a, b: int(a // inner != b // inner))
    return read, timetable_for(exchange, Scene((mask,), layout, layout, SIZES, phase, (home, home)))


def messages(timetable: Timetable) -> list[tuple[int, ...]]:
    return sorted(zip(*(column.tolist() for column in timetable.messages[:6]), strict=True))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_all_ranks_at_once_as_each_by_itself(world: int) -> None:
    moved = 0
    masks, homes = (MASKS[:4], (True, False)) if world < 4 else (MASKS[1::2], (True,))
    layouts = (contiguous, zigzag, striped) if world < 6 else (zigzag,)
    for exchange, mask, layout in product(exchanges_of(world), masks, layouts):
        for phase, home in product(Phase, homes):
            held = layout(SEQ_LEN, world)
            read, written = both(exchange, mask, held, phase, home)
            told = f"{exchange.name}, {mask}, {held}, {phase}, {home}"
            assert read.num_steps == written.num_steps, told
            assert messages(read) == messages(written), told
            np.testing.assert_allclose(written.flops, read.flops, rtol=1e-12, err_msg=told)
            moved += len(read.messages.step)
            by_rank, at_once = (simulate(t, MODEL, backward=phase.is_backward).done for t in (read, written))
            if isinstance(exchange, Gather):  # what pieces are equal, and what is in each stage, is estimated
                np.testing.assert_allclose(at_once, by_rank, rtol=0.1, err_msg=told)
            else:
                np.testing.assert_allclose(at_once, by_rank, rtol=1e-12, err_msg=told)
    assert moved > 0 or world == 1


def test_buffers_of_a_ring_are_two_blocks() -> None:
    """What is sent on and what comes meanwhile; and the own block, while it is sent."""
    held = contiguous(64, 4)
    block = 16 * SIZES.row_bytes(Phase.FORWARD.carried)
    for found in both(Ring(), full(), held, Phase.FORWARD):
        assert found.buffer_bytes.tolist() == [2 * block] * 4
        assert found.bytes_sent.tolist() == [3 * block] * 4
        assert found.messages_sent.tolist() == [3] * 4
    for gather in both(Gather(), full(), held, Phase.FORWARD):
        assert gather.buffer_bytes.tolist() == [4 * block] * 4


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (7, 1), (6, 2), (3, 3), (1, 1)])
@pytest.mark.parametrize(("groups", "width"), [(1, 3), (1, 4), (2, 2), (3, 2), (4, 1), (1, 1)])
def test_bytes_and_work_of_spread_heads(heads: int, kv_heads: int, groups: int, width: int) -> None:
    """As `HeadSharding` and the plans between the groups have them."""
    world = groups * width
    sizes = AttentionShape(2, heads, kv_heads, 8, 6, 2, 4)
    mask, held = causal(), zigzag(SEQ_LEN, world)
    layout, rows = gathered_layout(held, groups)
    for stages, wanted in product((1, 2, 3), ((True, True), (True, False))):
        shares = shard_heads(heads, kv_heads, width, stages)
        for phase in Phase:
            back = phase if phase.is_backward else Phase.BACKWARD
            found = spread_timetable_for(Ring(), Scene((mask,), held, held, sizes, phase, wanted), groups, stages)
            expected = []
            for rank in range(world):
                group, place = divmod(rank, width)
                plan = build_plan(Ring(), (mask,), layout, layout, group, back)
                program = plan.backward if phase.is_backward else plan.forward
                if phase.is_backward and not wanted[0 if phase is Phase.BACKWARD_BY_QUERIES else 1]:
                    program = program.without_gradients()
                spread = HeadSharding(place, shares, (rows[group],), (rows[group],))
                inner = [sizes.of_heads(len(s[place].heads), len(s[place].kv_heads)) for s in shares]
                sent = spread.bytes_sent(sizes, wanted)[int(phase.is_backward)]
                expected.append(sent + sum(program.bytes_sent(part) for part in inner))
            assert found.bytes_sent.tolist() == expected, (stages, wanted, phase)
            pairs = SEQ_LEN * (SEQ_LEN + 1) // 2 * 2
            assert found.flops.sum() == pytest.approx(pairs * flops_per_pair(sizes, phase))
