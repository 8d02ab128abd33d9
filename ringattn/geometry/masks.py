"""Masks: which (query position, key position) pairs may attend.

A mask is a value: the intersection of *terms*, each a name and parameters. The constructor of a term is registered
together with a function that lists the *slices* of the term, in global positions:

    q in [q_start, q_stop),  k in [k_start, k_stop),  lo <= k - q <= hi

The slices of one mask never overlap, so that every allowed pair is in exactly one of them. Tiles, plans and kernels
know masks as slices only. A new mask is one registered constructor, in this module or in any other:

    def _diagonal_slices(q_len, k_len, offset):
        return slice_table((0, q_len, 0, k_len, offset, offset))

    @register_mask(_diagonal_slices)
    def diagonal(offset):
        return Mask((MaskTerm("diagonal", (offset,)),))
"""

from __future__ import annotations

import hashlib
from ast import literal_eval
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import import_module
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ringattn.errors import ArgumentError, MaskError, check_integer
from ringattn.geometry.intervals import overlapping_pairs
from ringattn.types import Ints

# No band reaches further than any two positions can lie apart. Small enough to add a few of them in int64.
UNBOUNDED = 1 << 60

# Columns of a slice table.
Q_START, Q_STOP, K_START, K_STOP, LO, HI = range(6)


class _HasToList(Protocol):
    def tolist(self) -> list[int]: ...


@dataclass(frozen=True)
class MaskTerm:
    """One constraint: the name of a registered constructor, and checked parameters."""

    name: str
    parameters: tuple[int | None, ...] = ()

    def __repr__(self) -> str:
        return f"{self.name}({_definition(self.name).format_parameters(*self.parameters)})"


@dataclass(frozen=True, eq=False)
class Mask:
    """The pairs that every term allows: an immutable, hashable value, equal by content; composed by `&`.

    Equal masks have equal hashes in every process. A pickle holds the text, and names the modules outside this package
    that register the terms.
    """

    terms: tuple[MaskTerm, ...] = ()
    # The content, the same in every process; `parse_mask` reads it. It is a plain attribute, so that torch.compile
    # guards it and nothing else.
    text: str = field(init=False, repr=False)

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
            MaskError: when the mask was made for sequences of another length, or a term is not registered.
        """
        return _slices(self, q_len, k_len)

    @cached_property
    def digest(self) -> str:
        """A digest of the content, 16 hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @cached_property
    def _hash(self) -> int:
        return hash(int(self.digest, 16))  # the hash of a string or of None differs between processes

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self.text == other.text if isinstance(other, Mask) else NotImplemented

    def __reduce__(self) -> tuple[Callable[..., Mask], tuple[str, tuple[str, ...]]]:
        modules = {_definition(term.name).constructor.__module__ for term in self.terms} - {__name__}
        return _unpickle, (self.text, tuple(sorted(modules)))

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.terms)) or "full()"


# ---- the registry


class MaskDefinition(NamedTuple):
    """What is registered under the name of a constructor.

    Args:
        constructor: the public function, which checks its arguments and returns the mask.
        list_slices: takes (q_len, k_len, *parameters) and returns the slices of the term, (n, 6) int64.
        format_parameters: takes the parameters and returns the text that stands in brackets in a repr.
    """

    constructor: Callable[..., Mask]
    list_slices: Callable[..., Ints]
    format_parameters: Callable[..., str]


# In the order in which the manual lists them.
REGISTERED_MASKS: dict[str, MaskDefinition] = {}

Constructor = TypeVar("Constructor", bound=Callable[..., Mask])


def _join_parameters(*parameters: int | None) -> str:
    return ", ".join(map(str, parameters))


def register_mask(
    list_slices: Callable[..., Ints], format_parameters: Callable[..., str] = _join_parameters
) -> Callable[[Constructor], Constructor]:
    """Returns a decorator that registers a constructor of masks under its name.

    Attention, torch.compile, pickle, repr and the manual then know the mask.

    Args:
        list_slices: takes (q_len, k_len, *parameters) and returns the slices of the term, (n, 6) int64, of which no
            two overlap; it raises MaskError where the parameters do not fit the lengths.
        format_parameters: takes the parameters and returns the text that stands in brackets in a repr.
    Raises:
        MaskError: when another constructor has this name.
    """

    def register(constructor: Constructor) -> Constructor:
        name = constructor.__name__
        known = REGISTERED_MASKS.get(name)
        if known is not None and known.constructor.__module__ != constructor.__module__:
            raise MaskError(f"a mask {name!r} is already registered, by {known.constructor.__module__}")
        REGISTERED_MASKS[name] = MaskDefinition(constructor, list_slices, format_parameters)
        return constructor

    return register


def _definition(name: str) -> MaskDefinition:
    found = REGISTERED_MASKS.get(name)
    if found is None:
        raise MaskError(
            f"a mask has the term {name!r}, which is none of {', '.join(REGISTERED_MASKS)}; "
            "import the module that registers it"
        )
    return found


@lru_cache(maxsize=64)
def parse_mask(text: str) -> Mask:
    """Returns the mask whose text this is.

    Raises:
        MaskError: when the constructor of a term is not registered.
    """
    if text == "full()":
        return Mask()
    terms = []
    for term in text.split(" & "):
        name, _, parameters = term.partition("(")
        _definition(name)
        terms.append(MaskTerm(name, literal_eval(f"({parameters}")))
    return Mask(tuple(terms))


def _unpickle(text: str, modules: tuple[str, ...]) -> Mask:
    for module in modules:
        import_module(module)
    return parse_mask(text)


# ---- slice tables


def slice_table(*rows: tuple[int, int, int, int, int, int]) -> Ints:
    """Returns a table of slices, each (q_start, q_stop, k_start, k_stop, lo, hi): (n, 6) int64."""
    return np.array(rows, dtype=np.int64).reshape(-1, 6)


def _block_slices(q_start: Ints, q_stop: Ints, k_start: Ints, k_stop: Ints) -> Ints:
    """Returns the slices of full rectangles, without bounds on k - q."""
    bound = np.full(len(q_start), UNBOUNDED)
    return np.stack([q_start, q_stop, k_start, k_stop, -bound, bound], axis=1)


@lru_cache(maxsize=64)
def _slices(mask: Mask, q_len: int, k_len: int) -> Ints:
    table = slice_table((0, q_len, 0, k_len, -UNBOUNDED, UNBOUNDED))
    for term in mask.terms:
        table = _intersect(table, _definition(term.name).list_slices(q_len, k_len, *term.parameters))
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


# ---- the masks


def full() -> Mask:
    """Every query sees every key."""
    return Mask()


def _causal_slices(q_len: int, k_len: int) -> Ints:
    return slice_table((0, q_len, 0, k_len, -UNBOUNDED, 0))


@register_mask(_causal_slices)
def causal() -> Mask:
    """A query sees the keys up to its own position: k <= q."""
    return Mask((MaskTerm("causal"),))


def _window_slices(q_len: int, k_len: int, left: int | None, right: int | None) -> Ints:
    lo = -UNBOUNDED if left is None else -left
    hi = UNBOUNDED if right is None else right
    return slice_table((0, q_len, 0, k_len, lo, hi))


@register_mask(_window_slices)
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
    return Mask((MaskTerm("sliding_window", (left, right)),))


def _document_slices(q_len: int, k_len: int, *cu_seqlens: int) -> Ints:
    for name, length in (("queries", q_len), ("keys", k_len)):
        if length != cu_seqlens[-1]:
            raise MaskError(
                f"cu_seqlens ends at {cu_seqlens[-1]}, but there are {length} {name}: "
                "the documents must add up to the length of the whole sequence, over all ranks"
            )
    cu = np.array(cu_seqlens, dtype=np.int64)
    some = np.diff(cu) > 0
    start, stop = cu[:-1][some], cu[1:][some]
    return _block_slices(start, stop, start, stop)


def _format_documents(*cu_seqlens: int) -> str:
    if len(cu_seqlens) <= 6:
        return str(list(cu_seqlens))
    return f"[{_join_parameters(*cu_seqlens[:3])}, …, {cu_seqlens[-1]}], {len(cu_seqlens) - 1} documents"


@register_mask(_document_slices, _format_documents)
def documents(cu_seqlens: Sequence[int] | npt.ArrayLike | _HasToList) -> Mask:
    """A query sees its own document, both ways; `documents(cu) & causal()` is a packed causal batch.

    Args:
        cu_seqlens: cumulative lengths, 0 first and the length of the sequence last: document i is
            [cu_seqlens[i], cu_seqlens[i + 1]). Documents may have any length, 0 and 1 included. A list, array or
            tensor; one on a GPU is copied to the host, so make the mask once per batch.
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
    return Mask((MaskTerm("documents", tuple(cu.tolist())),))


def _prefix_slices(q_len: int, k_len: int, prefix_len: int) -> Ints:
    seen = min(prefix_len, k_len)
    return slice_table((0, q_len, 0, seen, -UNBOUNDED, UNBOUNDED), (0, q_len, seen, k_len, -UNBOUNDED, 0))


@register_mask(_prefix_slices)
def prefix_lm(prefix_len: int) -> Mask:
    """A query sees the whole prefix, and after it the keys up to its own position: k < prefix_len or k <= q.

    Args:
        prefix_len: positions of the prefix, 0 or more; it may be longer than the sequence.
    Raises:
        MaskError: when the number is not allowed.
    """
    return Mask((MaskTerm("prefix_lm", (check_integer("prefix_len", prefix_len, 0, MaskError),)),))


def _chunk_slices(q_len: int, k_len: int, size: int) -> Ints:
    start = np.arange(0, min(q_len, k_len), size, dtype=np.int64)
    return _block_slices(start, np.minimum(start + size, q_len), start, np.minimum(start + size, k_len))


@register_mask(_chunk_slices)
def chunked(size: int) -> Mask:
    """A query sees its own chunk of `size` positions, both ways: q // size == k // size.

    `chunked(size) & causal()` is the local attention of Llama 4.

    Args:
        size: positions in a chunk, 1 or more; the last chunk may be shorter.
    Raises:
        MaskError: when the number is not allowed.
    """
    return Mask((MaskTerm("chunked", (check_integer("size", size, 1, MaskError),)),))


def _key_range_slices(q_len: int, k_len: int, start: int, stop: int) -> Ints:
    return slice_table((0, q_len, min(start, k_len), min(stop, k_len), -UNBOUNDED, UNBOUNDED))


@register_mask(_key_range_slices)
def key_range(start: int, stop: int) -> Mask:
    """Every query sees the keys from `start` up to, not including, `stop`: start <= k < stop.

    It excludes padding. A query that sees no key gets 0. In cross-attention it describes the padding of the keys, where
    `documents` would constrain the queries, too.

    Args:
        start: the first key that is seen, 0 or more.
        stop: the position after the last key that is seen, `start` or more; it may exceed the number of keys.
    Raises:
        MaskError: when a number is not allowed.
    """
    start = check_integer("start", start, 0, MaskError)
    stop = check_integer("stop", stop, start, MaskError)
    return Mask((MaskTerm("key_range", (start, stop)),))


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
