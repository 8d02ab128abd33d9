"""The values that kernels take, and hand on: NamedTuples, which triton takes apart at a launch.

Fields hold tensors and numbers on the host, and what triton makes of them in a kernel, where a tensor is a pointer. A
number that is 1 is a constant there. So is None, which stands for what a launch does not have: its code is left out.

Two things stay arguments of their own. Tensor descriptors: launchers of triton 3.6 look for them nowhere else. And
constants: they would become variables where a kernel gives a name to the tuple that they are in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ringattn.score import Score


class StridedRows(NamedTuple):
    """The rows of all heads of a tensor: its address, and its strides. A row's own numbers are next to each other."""

    pointer: Any
    batch: Any
    row: Any
    head: Any

    @classmethod
    def of(cls, x: Tensor) -> StridedRows:
        """Returns those of a tensor of (batch, rows, heads), or (batch, rows, heads, dim)."""
        return cls(x, *x.stride()[:3])

    @classmethod
    def of_entries(cls, x: Tensor) -> StridedRows:
        """Returns those of a tensor of (batch, heads, rows), as an lse is: a row is one number."""
        batch, head, row = x.stride()
        return cls(x, batch, row, head)


class HeadRows(NamedTuple):
    """The rows of one head."""

    pointer: Any
    stride: Any


class LoadSource(NamedTuple):
    """What steps over the rows of one head are loaded from: by a descriptor of the whole tensor, if there is one."""

    described: Any
    rows: Any
    batch: Any
    head: Any


class QueryArgs(NamedTuple):
    """What the backward needs of queries: they themselves, their gradients of out, and an lse and a delta for each."""

    q: Any
    dout: Any
    lse: Any
    delta: Any


class WorkArgs(NamedTuple):
    """The work list of a launch, see schedule.Schedule, and what it is a list of.

    num_rows, num_heads: on the side whose blocks programs own.
    group: query heads that share a kv head.
    section: heads that programs run through at a time.
    """

    items: Any
    runs: Any
    num_rows: Any
    num_heads: Any
    group: Any
    section: Any


class RowRange(NamedTuple):
    """The first and the last row of the other side that each own row sees; none if last < first."""

    first: Any
    last: Any


class ScoreArgs(NamedTuple):
    """How q·k becomes a score: q·k * factor or, with softcapping, tanh(q·k * inner) * factor.

    inner: None without softcapping.
    scale: the derivative of a score by q·k, before what a tanh takes of it.
    """

    inner: Any
    factor: Any
    scale: Any

    @classmethod
    def of(cls, score: Score) -> ScoreArgs:
        """Returns the arguments for a resolved score."""
        if score.softcap is None:
            return cls(None, score.factor, score.factor)
        return cls(score.factor / score.softcap, score.softcap, score.factor)


class OnlineSoftmax(NamedTuple):
    """An online softmax under way: weighted values, the sum of the weights, and the score that they are relative to."""

    acc: Any
    total: Any
    most: Any


class PageArgs(NamedTuple):
    """The slots of all kv heads of a pool of pages: its address, and its strides."""

    pointer: Any
    page: Any
    slot: Any
    head: Any

    @classmethod
    def of(cls, x: Tensor) -> PageArgs:
        """Returns those of a pool of (pages, page_size, kv heads, dim)."""
        return cls(x, *x.stride()[:3])


class HeadSlots(NamedTuple):
    """Those of one head."""

    pointer: Any
    page: Any
    slot: Any


class SlotRun(NamedTuple):
    """Slots of a sequence that follow one another: the pages they are in, their positions, and how many there are."""

    pages: Any
    slots: Any
    count: Any


class PartialArgs(NamedTuple):
    """What chunks of a paged launch found, until it is merged: (parts, kv heads, rows), out with its dim behind."""

    out: Any
    lse: Any


class PagedSizes(NamedTuple):
    """How many a paged launch has of everything.

    group: query heads that share a kv head.
    rows: of a kv head: a sequence's new tokens, times the group.
    """

    sequences: Any
    chunks: Any
    kv_heads: Any
    group: Any
    rows: Any
