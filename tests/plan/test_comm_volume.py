"""Sums over ranks, from intervals of positions, against the tiles of all pairs of ranks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ringattn.geometry.masks import K_START, Q_START
from ringattn.geometry.rows import count_rows
from ringattn.plan.comm_pattern import CommPattern
from ringattn.plan.comm_volume import pairs_of_ranks, rows_exchanged
from ringattn.plan.payload import Payload
from tests.geometry.strategies import examples, layouts, masks


@given(st.data())
@examples(60)
def test_sums_over_the_other_rank(data: st.DataObject) -> None:
    q_len, world = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 4))
    cross = data.draw(st.booleans())
    k_len = data.draw(st.integers(0, 40)) if cross else q_len
    layout, kv_layout = data.draw(layouts(q_len, world)), data.draw(layouts(k_len, world))
    cases = data.draw(st.lists(masks(q_len, cross=cross), min_size=1, max_size=2))
    found = tuple(case.build(q_len) for case in cases)
    patterns = {payload: CommPattern(payload, found, layout, kv_layout) for payload in (Payload.KV, Payload.Q)}
    pairs = np.zeros((world, world), dtype=np.int64)
    for rank in range(world):
        for block, tiles in patterns[Payload.KV].tiles(rank).items():
            pairs[rank, block] = tiles.area()
    assert pairs_of_ranks(found, layout, kv_layout, Q_START).tolist() == pairs.sum(axis=1).tolist()
    assert pairs_of_ranks(found, layout, kv_layout, K_START).tolist() == pairs.sum(axis=0).tolist()
    for pattern in patterns.values():
        received, sent = rows_exchanged(found, layout, kv_layout, pattern.column)
        for rank in range(world):
            assert received[rank] == sum(map(count_rows, pattern.rows_received(rank).values()))
            assert sent[rank] == sum(map(count_rows, pattern.rows_sent(rank).values()))
