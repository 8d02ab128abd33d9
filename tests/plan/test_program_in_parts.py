"""Plans for rows that lie in parts: the same pairs in the same steps, and nothing that reaches over two parts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn import causal, striped
from ringattn.plan.exchanges import Gather, Ring, build_plan
from ringattn.plan.head_parallel import gathered_layout_in_parts
from ringattn.plan.payload import Payload
from ringattn.plan.plan import BlockSlice, Phase, Program, Step
from tests.geometry.brute import tile_counts
from tests.geometry.strategies import examples, layouts, masks
from tests.plan.replay import rows_of

SEQ_LEN = 24
Counts = npt.NDArray[np.int64]


def parted(data: st.DataObject, rows: int) -> list[int]:
    """So many rows in up to three parts, some of them empty."""
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=2)))
    return [stop - start for start, stop in pairwise([0, *cuts, rows])]


def pairs(step: Step, program: Program, batch: int, stays: Sequence[int]) -> list[Counts]:
    """How often the step computes each pair of this rank's rows, in parts, with the rows of each block."""
    starts = [0, *accumulate(stays)]
    found = [np.zeros((batch, sum(stays), rows), dtype=np.int64) for rows in program.block_rows]
    for visit in step.visits:
        held, own = rows_of(visit.piece, program.block_rows), stays[visit.part]
        shape = (own, len(held)) if program.carried is Payload.KV else (len(held), own)
        counts = tile_counts(visit.tiles, batch, *shape)
        if program.carried is Payload.Q:
            counts = counts.transpose(0, 2, 1)
        found[visit.piece.block][:, starts[visit.part] : starts[visit.part + 1], held] += counts
    return found


@pytest.mark.parametrize("exchange", [Ring(), Gather()], ids=str)
@pytest.mark.parametrize("backward", [Phase.BACKWARD, Phase.BACKWARD_BY_QUERIES])
@given(st.data(), st.integers(1, 3))
@examples(25)
def test_parts(exchange: Ring | Gather, backward: Phase, data: st.DataObject, world: int) -> None:
    layout, kv_layout = (data.draw(layouts(SEQ_LEN, world)) for _ in range(2))
    built = [case.build(SEQ_LEN) for case in data.draw(st.lists(masks(SEQ_LEN), min_size=1, max_size=2))]
    for rank in range(world):
        plan = build_plan(exchange, tuple(built), layout, kv_layout, rank, backward)
        q_rows, kv_rows = (parted(data, held.num_tokens(rank)) for held in (layout, kv_layout))
        cut = plan.in_parts(q_rows, kv_rows)
        for whole, program in ((plan.forward, cut.forward), (plan.backward, cut.backward)):
            stays, own = (q_rows, kv_rows) if program.carried is Payload.KV else (kv_rows, q_rows)
            runs = [range(*ends) for ends in pairwise(accumulate(own, initial=0))]
            for before, after in zip(whole.steps, program.steps, strict=True):
                expected = pairs(before, whole, len(built), [sum(stays)])
                for theirs, ours in zip(expected, pairs(after, program, len(built), stays), strict=True):
                    np.testing.assert_array_equal(theirs, ours)
                for visit in after.visits:
                    assert visit.tiles
                    if visit.piece.block == rank and len(own) > 1:
                        assert visit.piece in [BlockSlice(rank, (run,)) for run in runs]


def test_stripes_meet_stripes() -> None:
    """Queries of one stripe beside keys of all positions would take a tile for each row."""
    layout, (rows,) = gathered_layout_in_parts(striped(64, 4), 1, 4)
    num_rows = [part.total for part in rows]
    plan = build_plan(Ring(), (causal(),), layout, layout, 0).in_parts(num_rows, num_rows)
    assert [len(visit.tiles) for visit in plan.forward.visits] == [1] * 16
