"""Sums over ranks, from intervals of positions, against the tables over all pairs of ranks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ringattn.geometry.masks import K_START, Q_START
from ringattn.plan.comm_volume import pairs_by_rank, pairs_of_ranks, rows_exchanged, rows_needed
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
    pairs = pairs_by_rank(found, layout, kv_layout)
    assert pairs_of_ranks(found, layout, kv_layout, Q_START).tolist() == pairs.sum(axis=1).tolist()
    assert pairs_of_ranks(found, layout, kv_layout, K_START).tolist() == pairs.sum(axis=0).tolist()
    for column in (K_START, Q_START):
        rows = rows_needed(found, layout, kv_layout, column).copy()
        np.fill_diagonal(rows, 0)
        needs, gives = rows_exchanged(found, layout, kv_layout, column)
        assert needs.tolist() == rows.sum(axis=0).tolist()
        assert gives.tolist() == rows.sum(axis=1).tolist()
