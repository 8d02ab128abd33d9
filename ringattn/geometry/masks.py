"""Masks: which (query position, key position) pairs may attend.

A mask is a value. It is the intersection of *terms*, and a term lists *slices* in global positions:

    q in [q_start, q_stop),  k in [k_start, k_stop),  lo <= k - q <= hi

The slices of one mask never overlap, so that every allowed pair stands in exactly one of them. Nothing below
this module knows masks in any other form: a new mask is one constructor here that lists its slices.
"""

from __future__ import annotations

import hashlib
from ast import literal_eval
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ringattn.errors import ArgumentError, MaskError, check_integer
from ringattn.types import Ints

# No band reaches further than any two positions can lie apart. Small enough to add a few of them in int64.
UNBOUNDED = 1 << 60

# Columns of a slice table.
Q_START, Q_STOP, K_START, K_STOP, LO, HI = range(6)


class _HasToList(Protocol):
    def tolist(self) -> list[int]: ...


@dataclass(frozen=True)
class Term:
    """One constraint: its name and parameters are its identity; `list_slices(q_len, k_len)` is its meaning."""

    name: str
    parameters: tuple[int | None, ...]
    list_slices: Callable[[int, int], Ints] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Mask:
    """The pairs that every term allows: immutable, hashable, equal by name and parameters; composed by `&`."""

    terms: tuple[Term, ...] = ()
    # The content, the same in every process; `parse_mask` reads it. It is a plain attribute, so that torch.compile
    # guards it and nothing else.
    text: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        text = " & ".join([f"{term.name}{term.parameters}" for term in self.terms])
        object.__setattr__(self, "text", text or "full()")

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        new = tuple([term for term in other.terms if term not in self.terms])  # torch.compile knows no generators here
        return Mask(tuple(sorted(self.terms + new, key=lambda term: (term.name, repr(term.parameters)))))

    def slices(self, q_len: int, k_len: int) -> Ints:
        """Returns the slices of a q_len x k_len score matrix: (n, 6) int64, sorted by q_start, never overlapping.

        Raises:
            MaskError: when the mask was made for sequences of another length.
        """
        return _slices(self, q_len, k_len)

    @cached_property
    def digest(self) -> str:
        """A digest of the content that is the same in every process, as `hash` is not."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @cached_property
    def _hash(self) -> int:
        return hash(self.terms)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        if not self.terms:
            return "full()"
        return " & ".join(f"{term.name}({_format_parameters(term.parameters)})" for term in self.terms)


def _format_parameters(parameters: tuple[int | None, ...]) -> str:
    if len(parameters) <= 6:
        return ", ".join(map(str, parameters))
    head = ", ".join(map(str, parameters[:3]))
    return f"[{head}, …, {parameters[-1]}], {len(parameters) - 1} documents"


def _table(rows: Sequence[Sequence[int]]) -> Ints:
    return np.array(rows, dtype=np.int64).reshape(-1, 6)


@lru_cache(maxsize=64)
def _slices(mask: Mask, q_len: int, k_len: int) -> Ints:
    table = _table([(0, q_len, 0, k_len, -UNBOUNDED, UNBOUNDED)])
    for term in mask.terms:
        table = _intersect(table, term.list_slices(q_len, k_len))
    table = table[np.argsort(table[:, Q_START], kind="stable")]
    table.setflags(write=False)
    return table


def _intersect(a: Ints, b: Ints) -> Ints:
    """Intersects two slice tables: the intersection of two slices is a slice, or nothing."""
    rows_a, rows_b = overlapping_pairs(a[:, Q_START], a[:, Q_STOP], b[:, Q_START], b[:, Q_STOP])
    left, right = a[rows_a], b[rows_b]
    starts = np.maximum(left, right)
    stops = np.minimum(left, right)
    both = np.stack(
        [
            starts[:, Q_START],
            stops[:, Q_STOP],
            starts[:, K_START],
            stops[:, K_STOP],
            starts[:, LO],
            stops[:, HI],
        ],
        axis=1,
    )
    some = (both[:, Q_START] < both[:, Q_STOP]) & (both[:, K_START] < both[:, K_STOP])
    return both[some & (both[:, LO] <= both[:, HI])]


def overlapping_pairs(a_start: Ints, a_stop: Ints, b_start: Ints, b_stop: Ints) -> tuple[Ints, Ints]:
    """Returns the indices (i, j) of all intervals a[i], b[j] that share a position, ordered by i.

    Intervals are half-open and may overlap among themselves; empty ones share nothing. Memory follows the
    number of pairs when the intervals of b do not nest deeply, which is so for slices and for ranges of step 1.
    """
    order = np.argsort(b_start, kind="stable")
    start, stop = b_start[order], b_stop[order]
    # Before `first`, every interval of b has ended; from `last` on, none has begun.
    first = np.searchsorted(np.maximum.accumulate(stop), a_start, side="right")
    last = np.searchsorted(start, a_stop, side="left")
    index_a, position = expand(first, last)
    keep = (stop[position] > a_start[index_a]) & (a_stop[index_a] > a_start[index_a])
    keep &= stop[position] > start[position]
    return index_a[keep], order[position[keep]]


def expand(first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """Returns (i, x) for every i and every x in [first[i], last[i])."""
    counts = np.maximum(last - first, 0)
    index = np.repeat(np.arange(len(first), dtype=np.int64), counts)
    ends = np.cumsum(counts)
    within = np.arange(len(index), dtype=np.int64) - np.repeat(ends - counts, counts)
    return index, first[index] + within


def full() -> Mask:
    """Every query sees every key."""
    return Mask()


def causal() -> Mask:
    """A query sees the keys up to its own position: k <= q."""
    return Mask((Term("causal", (), lambda q, k: _table([(0, q, 0, k, -UNBOUNDED, 0)])),))


def sliding_window(left: int | None, right: int | None = 0) -> Mask:
    """A query sees `left` keys before its position, itself, and `right` keys after: -left <= k - q <= right.

    Args:
        left: positions to look back, 0 or more; None is without limit.
        right: positions to look ahead, 0 or more; None is without limit.
    Raises:
        MaskError: when a number is negative.
    """
    left = None if left is None else check_integer("left", left, 0, MaskError)
    right = None if right is None else check_integer("right", right, 0, MaskError)
    lo = -UNBOUNDED if left is None else -left
    hi = UNBOUNDED if right is None else right
    return Mask((Term("sliding_window", (left, right), lambda q, k: _table([(0, q, 0, k, lo, hi)])),))


def documents(cu_seqlens: Sequence[int] | npt.ArrayLike | _HasToList) -> Mask:
    """A query sees its own document, both ways; `documents(cu) & causal()` is a packed causal batch.

    Args:
        cu_seqlens: cumulative lengths, 0 first and the sequence's length last: document i is
            [cu_seqlens[i], cu_seqlens[i + 1]). Any length goes, 0 and 1 included. A list, array or tensor;
            one on a GPU is copied to the host, so make the mask once per batch.
    Raises:
        MaskError: when they do not begin with 0 or do not ascend.
    """
    values: object = cu_seqlens
    try:
        values = cu_seqlens.tolist() if hasattr(cu_seqlens, "tolist") else list(cu_seqlens)  # type: ignore[arg-type]
        cu = np.asarray(values, dtype=np.int64)
        exact = bool(np.array_equal(cu, np.asarray(values)))
    except (TypeError, ValueError, OverflowError):
        exact = False
    if not exact or cu.ndim != 1 or len(cu) < 1 or cu[0] != 0 or (np.diff(cu) < 0).any():
        raise MaskError(
            f"cu_seqlens={values!r:.200}: must be integers that begin with 0 and never descend, "
            "such as [0, 5, 12] for documents of 5 and 7 tokens"
        )

    def list_slices(q_len: int, k_len: int) -> Ints:
        for name, length in (("queries", q_len), ("keys", k_len)):
            if length != cu[-1]:
                raise MaskError(
                    f"cu_seqlens ends at {cu[-1]}, but there are {length} {name}: "
                    "the documents must add up to the length of the whole sequence, over all ranks"
                )
        some = np.diff(cu) > 0
        start, stop = cu[:-1][some], cu[1:][some]
        bound = np.full(len(start), UNBOUNDED)
        return np.stack([start, stop, start, stop, -bound, bound], axis=1)

    return Mask((Term("documents", tuple(cu.tolist()), list_slices),))


def prefix_lm(prefix_len: int) -> Mask:
    """A query sees the whole prefix, and after it the keys up to its own position: k < prefix_len or k <= q.

    Args:
        prefix_len: positions of the prefix, 0 or more; it may be longer than the sequence.
    Raises:
        MaskError: when the number is not allowed.
    """
    prefix = check_integer("prefix_len", prefix_len, 0, MaskError)

    def list_slices(q_len: int, k_len: int) -> Ints:
        seen = min(prefix, k_len)
        return _table([(0, q_len, 0, seen, -UNBOUNDED, UNBOUNDED), (0, q_len, seen, k_len, -UNBOUNDED, 0)])

    return Mask((Term("prefix_lm", (prefix,), list_slices),))


def chunked(size: int) -> Mask:
    """A query sees its own chunk of `size` positions, both ways: q // size == k // size.

    `chunked(size) & causal()` is the local attention of Llama 4.

    Args:
        size: positions in a chunk, 1 or more; the last chunk may be shorter.
    Raises:
        MaskError: when the number is not allowed.
    """
    size = check_integer("size", size, 1, MaskError)

    def list_slices(q_len: int, k_len: int) -> Ints:
        start = np.arange(0, min(q_len, k_len), size, dtype=np.int64)
        bound = np.full(len(start), UNBOUNDED)
        q_stop, k_stop = np.minimum(start + size, q_len), np.minimum(start + size, k_len)
        return np.stack([start, q_stop, start, k_stop, -bound, bound], axis=1)

    return Mask((Term("chunked", (size,), list_slices),))


def key_range(start: int, stop: int) -> Mask:
    """Every query sees the keys from `start` up to, not including, `stop`: those that are no padding, say.

    A query that this leaves with nothing to see gets 0. In cross-attention it stands for the padding of the keys, where
    `documents` would speak of the queries, too.

    Args:
        start: the first key that is seen, 0 or more.
        stop: the first that is not seen again, `start` or more; it may lie behind the last key.
    Raises:
        MaskError: when a number is not allowed.
    """
    start = check_integer("start", start, 0, MaskError)
    stop = check_integer("stop", stop, start, MaskError)
    return Mask(
        (
            Term(
                "key_range",
                (start, stop),
                lambda q, k: _table([(0, q, min(start, k), min(stop, k), -UNBOUNDED, UNBOUNDED)]),
            ),
        )
    )


# By the names of their terms.
_CONSTRUCTORS: dict[str, Callable[..., Mask]] = {
    "full": full,
    "causal": causal,
    "sliding_window": sliding_window,
    "documents": lambda *cu_seqlens: documents(cu_seqlens),
    "prefix_lm": prefix_lm,
    "chunked": chunked,
    "key_range": key_range,
}


@lru_cache(maxsize=64)
def parse_mask(text: str) -> Mask:
    """Returns the mask whose text this is.

    Raises:
        MaskError: when it has a term that no constructor here makes.
    """
    mask = full()
    for term in text.split(" & "):
        name, _, parameters = term.partition("(")
        if name not in _CONSTRUCTORS:
            raise MaskError(
                f"mask={text:.200}: a compiled graph holds a mask by the names of its terms, and {name!r} is none of "
                f"{', '.join(_CONSTRUCTORS)}; do not compile around this mask"
            )
        mask &= _CONSTRUCTORS[name](*literal_eval(f"({parameters}"))
    return mask


def normalize_masks(mask: object, batch: int) -> tuple[Mask, ...]:
    """Returns the mask of each batch row, or a single one that holds for all of them.

    Args:
        mask: None (full attention), a Mask, or a list of `batch` masks.
        batch: how many batch rows there are.
    Raises:
        ArgumentError: when it is something else.
        MaskError: when the list has another length.
    """
    if mask is None:
        return (full(),)
    if isinstance(mask, Mask):
        return (mask,)
    if not isinstance(mask, list | tuple) or not all(isinstance(row, Mask) for row in mask):
        raise ArgumentError(f"mask={mask!r:.200}: must be a Mask such as causal(), a list of them, or None")
    if len(mask) != batch:
        raise MaskError(f"mask is a list of {len(mask)} masks, but the batch has {batch} rows; give one each")
    return tuple(mask) if len(set(mask)) > 1 else (mask[0] if mask else full(),)
