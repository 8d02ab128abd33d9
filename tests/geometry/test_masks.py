"""Masks against their definitions in numpy: each allowed pair stands in exactly one slice, no other in any."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringattn import (
    ArgumentError,
    Layout,
    Mask,
    MaskError,
    balanced,
    causal,
    chunked,
    contiguous,
    documents,
    full,
    key_range,
    prefix_lm,
    sliding_window,
    striped,
    zigzag,
)
from ringattn.geometry.intervals import overlapping_pairs
from ringattn.geometry.masks import REGISTERED_MASKS, MaskTerm, normalize_masks, parse_mask, register_mask
from tests.geometry.brute import Counts, slice_counts
from tests.geometry.scratch_mask import diagonals
from tests.geometry.strategies import examples, masks, terms
from tests.harness.cases import CROSS_MASK_CASES, MASK_CASES, MaskCase, case_ids


def check_meaning(case: MaskCase, q_len: int, k_len: int) -> None:
    slices = case.build(max(q_len, k_len)).slices(q_len, k_len)
    np.testing.assert_array_equal(slice_counts(slices, q_len, k_len), case.allowed(q_len, k_len).astype(int))
    assert slices.dtype == np.int64
    assert slices.shape[1] == 6
    assert slices[:, 0].tolist() == sorted(slices[:, 0].tolist())


@pytest.mark.parametrize("case", MASK_CASES, ids=case_ids(MASK_CASES))
@pytest.mark.parametrize("seq_len", [0, 1, 2, 23, 44, 61])
def test_definition(case: MaskCase, seq_len: int) -> None:
    check_meaning(case, seq_len, seq_len)


@pytest.mark.parametrize("case", CROSS_MASK_CASES, ids=case_ids(CROSS_MASK_CASES))
@pytest.mark.parametrize(("q_len", "k_len"), [(0, 5), (5, 0), (1, 9), (23, 9), (9, 23)])
def test_definition_of_cross_attention(case: MaskCase, q_len: int, k_len: int) -> None:
    check_meaning(case, q_len, k_len)


@given(st.data(), st.integers(0, 40))
@examples(150)
def test_random_compositions(data: st.DataObject, seq_len: int) -> None:
    check_meaning(data.draw(masks(seq_len)), seq_len, seq_len)


@given(st.data(), st.integers(0, 30), st.integers(0, 30))
@examples(100)
def test_random_compositions_of_cross_attention(data: st.DataObject, q_len: int, k_len: int) -> None:
    check_meaning(data.draw(masks(max(q_len, k_len), cross=True)), q_len, k_len)


@given(st.data(), st.integers(0, 30))
@examples(100)
def test_and_is_an_intersection(data: st.DataObject, seq_len: int) -> None:
    """Commutative, associative, idempotent, with full() as neutral element: as values, not only in meaning."""
    a, b, c = (data.draw(terms(seq_len)).build(seq_len) for _ in range(3))
    assert a & b == b & a
    assert hash(a & b) == hash(b & a)
    assert repr(a & b) == repr(b & a)
    assert (a & b) & c == a & (b & c)
    assert a & a == a
    assert (a & b) & a == a & b
    assert a & full() == a == full() & a

    def meaning(mask: Mask) -> Counts:
        return slice_counts(mask.slices(seq_len, seq_len), seq_len, seq_len)

    np.testing.assert_array_equal(np.minimum(meaning(a), meaning(b)), meaning(a & b))


EQUAL: list[tuple[Callable[[], Mask], Callable[[], Mask]]] = [
    (full, full),
    (causal, causal),
    (lambda: sliding_window(3), lambda: sliding_window(3, 0)),
    (lambda: sliding_window(cast(int, np.int64(3))), lambda: sliding_window(3)),
    (lambda: documents([0, 3, 9]), lambda: documents((0, 3, 9))),
    (lambda: prefix_lm(4), lambda: prefix_lm(4)),
    (lambda: chunked(4) & causal(), lambda: causal() & chunked(4)),
]


@pytest.mark.parametrize(("a", "b"), EQUAL)
def test_equal_by_content(a: Callable[[], Mask], b: Callable[[], Mask]) -> None:
    assert a() == b()
    assert hash(a()) == hash(b())


def test_different_masks_differ() -> None:
    different = {
        full(), causal(), sliding_window(3), sliding_window(3, 1), sliding_window(None), sliding_window(None, None),
        documents([0, 3, 9]), documents([0, 4, 9]), documents([0, 3, 3, 9]), prefix_lm(4), prefix_lm(5), chunked(4),
        chunked(4) & causal(), chunked(4) & chunked(5),
    }  # fmt: skip
    assert len(different) == 14
    assert cast(object, causal()) != "causal()"


def test_shows_how_it_was_made() -> None:
    assert repr(full()) == "full()"
    assert repr(causal() & chunked(4)) == "causal() & chunked(4)"
    assert "sliding_window(3, None)" in repr(sliding_window(3, None))
    assert repr(documents([0, 3, 9])) == "documents([0, 3, 9])"
    told = repr(documents(range(1001)))
    assert "1000 documents" in told
    assert len(told) < 100


def test_shows_many_parameters_that_are_no_documents() -> None:
    assert repr(diagonals(*range(-8, 1))) == "diagonals(-8, -7, -6, -5, -4, -3, -2, -1, 0)"


# ---- values that are alike in every process


VALUES: list[Mask | Layout] = [
    full(), causal(), sliding_window(None), sliding_window(3, None) & causal(), documents([0, 3, 3, 9]) & causal(),
    prefix_lm(2), chunked(4) & key_range(0, 5), diagonals(-9, -1, 0) & documents(range(12)),
    contiguous(23, 3), zigzag(23, 3), striped(23, 3), striped(23, 3, 2), balanced(causal(), 23, 3),
]  # fmt: skip
# Reads pickled values; prints which equal their texts, which are what a pickle of them is read as, and their hashes.
READER = """
import pickle, sys
from ringattn.geometry.layout import parse_layout
from ringattn.geometry.masks import Mask, parse_mask
values = pickle.load(sys.stdin.buffer)
for value in values:
    parse = parse_mask if isinstance(value, Mask) else parse_layout
    assert value == parse(value.text) == pickle.loads(pickle.dumps(value))
print([(repr(value), value.digest, hash(value)) for value in values])
"""


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_values_pickle(protocol: int) -> None:
    for value in VALUES:
        again = pickle.loads(pickle.dumps(value, protocol))
        assert (again, repr(again), hash(again)) == (value, repr(value), hash(value))
        assert copy.deepcopy(value) == value
        assert len({value, again}) == 1


def test_values_are_alike_in_every_process() -> None:
    expected = str([(repr(value), value.digest, hash(value)) for value in VALUES])
    for seed in ("0", "1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", READER]
        done = subprocess.run(command, input=pickle.dumps(VALUES), env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()[-4000:]
        assert done.stdout.decode().strip() == expected


# ---- masks that other modules register


@pytest.mark.parametrize(("q_len", "k_len"), [(0, 5), (5, 0), (9, 9), (23, 9), (9, 23)])
@pytest.mark.parametrize("offsets", [(), (0,), (-3, 2), tuple(range(-9, 1))], ids=str)
def test_a_mask_of_another_module(offsets: tuple[int, ...], q_len: int, k_len: int) -> None:
    mask = diagonals(*offsets)
    assert parse_mask(mask.text) == mask
    q, k = np.arange(q_len)[:, None], np.arange(k_len)[None, :]
    seen = np.isin(k - q, offsets)
    np.testing.assert_array_equal(slice_counts(mask.slices(q_len, k_len), q_len, k_len), seen)
    np.testing.assert_array_equal(slice_counts((mask & causal()).slices(q_len, k_len), q_len, k_len), seen & (k <= q))


def test_every_constructor_is_registered() -> None:
    ours = {name for name, known in REGISTERED_MASKS.items() if known.constructor.__module__ == Mask.__module__}
    assert ours == {"causal", "chunked", "documents", "key_range", "prefix_lm", "sliding_window"}


def test_a_term_that_is_not_registered() -> None:
    for use in (lambda mask: mask.slices(3, 3), repr, pickle.dumps, lambda mask: parse_mask(mask.text)):
        with pytest.raises(MaskError, match="'mine', which is none of"):
            use(Mask((MaskTerm("mine"),)))


def test_a_name_that_is_registered_already() -> None:
    with pytest.raises(MaskError, match="'causal' is already registered, by ringattn"):

        @register_mask(np.empty)
        def causal() -> Mask:
            return full()


@pytest.mark.parametrize(
    "cu",
    [
        [0, 3, 3, 9],
        (0, 3, 3, 9),
        np.array([0, 3, 3, 9]),
        np.array([0, 3, 3, 9], dtype=np.int32),
        torch.tensor([0, 3, 3, 9]),
        torch.tensor([0, 3, 3, 9], dtype=torch.int32),
    ],
    ids=["list", "tuple", "numpy", "numpy int32", "torch", "torch int32"],
)
def test_cu_seqlens_of_any_kind(cu: list[int]) -> None:
    assert documents(cu) == documents([0, 3, 3, 9])
    assert documents(cu).slices(9, 9)[:, :4].tolist() == [[0, 3, 0, 3], [3, 9, 3, 9]]


def test_changing_cu_seqlens_afterwards_changes_nothing() -> None:
    cu = torch.tensor([0, 3, 9])
    mask = documents(cu)
    cu[1] = 5
    assert mask == documents([0, 3, 9])
    assert mask.slices(9, 9)[0, :4].tolist() == [0, 3, 0, 3]


@pytest.mark.parametrize(
    "cu",
    [
        [],
        [1, 5],
        [-1, 5],
        [0, 5, 4],
        [0, 2.5, 5],
        [0, float("nan")],
        [0, float("inf")],
        [0, None, 5],
        ["0", "5"],
        [[0, 5]],
        [[0, 5], [1]],
        torch.tensor([[0, 5]]),
        torch.tensor([0.5, 5.0]),
        np.float64(3.5),
    ],
    ids=str,
)
def test_refuses_bad_cu_seqlens(cu: list[int]) -> None:
    with pytest.raises(MaskError, match="cu_seqlens="):
        documents(cu)


@pytest.mark.parametrize("cu", [None, 5], ids=str)
def test_refuses_cu_seqlens_that_are_no_sequence(cu: list[int]) -> None:
    """A bare "'int' object is not iterable" would name neither argument nor what is allowed."""
    with pytest.raises(ArgumentError, match="cu_seqlens="):
        documents(cu)


@pytest.mark.parametrize(("q_len", "k_len"), [(0, 5), (5, 0), (9, 9), (23, 9), (9, 23)])
@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 4), (3, 8), (5, 50), (30, 40)])
def test_key_range(start: int, stop: int, q_len: int, k_len: int) -> None:
    q, k = np.arange(q_len)[:, None], np.arange(k_len)[None, :]
    seen = np.broadcast_to((start <= k) & (k < stop), (q_len, k_len))
    for mask, expected in ((key_range(start, stop), seen), (key_range(start, stop) & causal(), seen & (k <= q))):
        np.testing.assert_array_equal(slice_counts(mask.slices(q_len, k_len), q_len, k_len), expected)
    assert parse_mask((key_range(start, stop) & causal()).text) == key_range(start, stop) & causal()


def test_key_range_cannot_end_before_it_starts() -> None:
    with pytest.raises(MaskError, match="stop=2: must be an integer of 3 or more"):
        key_range(3, 2)


@pytest.mark.parametrize(("q_len", "k_len", "told"), [(8, 9, "8 queries"), (9, 10, "10 keys"), (0, 0, "0 queries")])
def test_refuses_documents_of_another_total(q_len: int, k_len: int, told: str) -> None:
    for mask in (documents([0, 3, 9]), causal() & documents([0, 3, 9])):
        with pytest.raises(MaskError, match=f"ends at 9, but there are {told}"):
            mask.slices(q_len, k_len)


@pytest.mark.parametrize("bad", [-1, True, 1.0, "3"])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("left", lambda bad: sliding_window(bad)),
        ("right", lambda bad: sliding_window(0, bad)),
        ("prefix_len", lambda bad: prefix_lm(bad)),
        ("size", lambda bad: chunked(bad)),
    ],
)
def test_refuses_bad_numbers(name: str, make: Callable[[object], Mask], bad: object) -> None:
    with pytest.raises(MaskError, match=f"{name}="):
        make(bad)


def test_refuses_chunks_of_none() -> None:
    with pytest.raises(MaskError, match="size=0"):
        chunked(0)
    with pytest.raises(MaskError, match="prefix_len=None"):
        prefix_lm(cast(int, None))


def test_is_composed_of_masks_only() -> None:
    with pytest.raises(TypeError):
        causal() & cast(Mask, True)


def test_slices_cannot_be_written_to() -> None:
    slices = causal().slices(4, 4)
    with pytest.raises(ValueError, match="read-only"):
        slices[0, 0] = 1
    assert causal().slices(4, 4) is slices


def test_check_mask() -> None:
    a, b = causal(), full()
    assert normalize_masks(None, 3) == (full(),)
    assert normalize_masks(a, 3) == (a,)
    assert normalize_masks([a, b], 2) == (a, b)
    assert normalize_masks((a, b), 2) == (a, b)
    assert normalize_masks([a, causal()], 2) == (a,)
    assert normalize_masks([], 0) == (full(),)
    with pytest.raises(MaskError, match="list of 2 masks, but the batch has 3"):
        normalize_masks([a, b], 3)
    for bad in ("causal", True, torch.ones(3, 3), [a, None], [causal]):
        with pytest.raises(ArgumentError, match="mask="):
            normalize_masks(bad, 2)


@given(st.data())
@examples(100)
def test_overlapping_pairs(data: st.DataObject) -> None:
    interval = st.tuples(st.integers(0, 20), st.integers(0, 20))
    a, b = data.draw(st.lists(interval, max_size=6)), data.draw(st.lists(interval, max_size=6))
    columns = [np.array([x[side] for x in some], dtype=np.int64) for some in (a, b) for side in (0, 1)]
    i, j = overlapping_pairs(*columns)
    expected = [(x, y) for x in range(len(a)) for y in range(len(b)) if set(range(*a[x])) & set(range(*b[y]))]
    assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == expected
    assert i.tolist() == sorted(i.tolist())
