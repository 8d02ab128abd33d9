"""Arguments of the Triton kernels: NamedTuples, which triton unpacks at a launch.

On the host a field holds a tensor or a number; in a kernel a tensor is a pointer. A number that is 1 is a compile-time
constant. So is None, which marks an absent argument: code that depends on it is not compiled.

Tensor descriptors and constants are arguments of their own. Launchers of triton 3.6 look for descriptors nowhere else,
and a constant in a tuple becomes a variable once a kernel names the tuple.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ringattn.score import Score


class StridedRows(NamedTuple):
    """A tensor (batch, rows, heads, dim) as its address and strides. The last dim is contiguous."""

    pointer: Any
    batch: Any
    row: Any
    head: Any

    @classmethod
    def of(cls, x: Tensor) -> StridedRows:
        """Returns the rows of a tensor (batch, rows, heads), or (batch, rows, heads, dim)."""
        return cls(x, *x.stride()[:3])

    @classmethod
    def of_entries(cls, x: Tensor) -> StridedRows:
        """Returns the rows of a tensor (batch, heads, rows), such as an lse: a row is one number."""
        batch, head, row = x.stride()
        return cls(x, batch, row, head)


class HeadRows(NamedTuple):
    """The rows of one head: the address of the first, and the stride between rows."""

    pointer: Any
    stride: Any


class LoadSource(NamedTuple):
    """The rows of one head, for loads of whole steps: through a descriptor of the tensor if there is one."""

    descriptor: Any
    rows: Any
    batch: Any
    head: Any


class QueryArgs(NamedTuple):
    """The queries of a backward: q, dout, lse and delta, each as `StridedRows`."""

    q: Any
    dout: Any
    lse: Any
    delta: Any


class WorkArgs(NamedTuple):
    """The tables of a `WorkList`, and the sizes of the launch.

    num_rows, num_heads: of the side whose blocks the programs own.
    group: query heads that share a kv head.
    section: heads whose programs run side by side.
    """

    items: Any
    runs: Any
    num_rows: Any
    num_heads: Any
    group: Any
    section: Any


class RowRange(NamedTuple):
    """The first and last visible row of the other side, for each own row; none if last < first."""

    first: Any
    last: Any


class ScoreArgs(NamedTuple):
    """The factors of a score: q·k * factor or, with softcapping, tanh(q·k * inner) * factor.

    inner: None without softcapping.
    scale: the derivative of a score by q·k, without the derivative of tanh.
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
    """The running state of an online softmax: weighted values, sum of weights l_i, maximal score m_i (to base 2)."""

    acc: Any
    l_i: Any
    m_i: Any


class PageArgs(NamedTuple):
    """A pool (pages, page_size, kv heads, dim) as its address and strides."""

    pointer: Any
    page: Any
    slot: Any
    head: Any

    @classmethod
    def of(cls, x: Tensor) -> PageArgs:
        """Returns the arguments for a pool."""
        return cls(x, *x.stride()[:3])


class HeadSlots(NamedTuple):
    """The slots of one kv head of a pool."""

    pointer: Any
    page: Any
    slot: Any


class SlotRun(NamedTuple):
    """Consecutive slots of a sequence: their pages, their positions, and their number."""

    pages: Any
    slots: Any
    count: Any


class PartialArgs(NamedTuple):
    """Partial results of the chunks of a paged launch: lse (parts, kv heads, rows), out with the head dim behind."""

    out: Any
    lse: Any


class PagedSizes(NamedTuple):
    """The sizes of a paged launch.

    group: query heads that share a kv head.
    rows: query rows of a kv head: new tokens of a sequence, times the group.
    """

    sequences: Any
    chunks: Any
    kv_heads: Any
    group: Any
    rows: Any
