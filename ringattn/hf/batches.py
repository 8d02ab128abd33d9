"""A batch as one rank holds it: where its rows stand in the whole sequence, and which documents they belong to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.attention.api import Group
from ringattn.attention.context_parallel import context_parallel_attention
from ringattn.attention.request import Masks
from ringattn.errors import ArgumentError
from ringattn.geometry.layout import Layout
from ringattn.hf.calls import Call
from ringattn.hf.patterns import Pattern

Documents = tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """A sequence that is sharded, and its documents.

    Args:
        layout: who holds which positions.
        documents: cumulative lengths of the documents, of each batch row, or once for all of them; () is one document
            per row. Padding is a document, too: nothing else sees it.
    """

    layout: Layout
    documents: tuple[Documents, ...] = ()

    def mask(self, pattern: Pattern) -> Masks:
        """Returns what a layer with this pattern may see, of every batch row or of each."""
        masks = [pattern.within(cu_seqlens) for cu_seqlens in self.documents]
        if not masks:
            return pattern.within(None)
        return masks[0] if len(masks) == 1 else masks


@dataclass(frozen=True, eq=False)
class Batch:
    """What `handle.shard` says of a batch to the attention layers; it travels with the model's other arguments.

    Args:
        group: the ranks that hold the batch together.
        rows: the sequence.
        exchange, backend: as in `context_parallel_attention`.
        encoder: the encoder's sequence, of an encoder-decoder.
        num_tokens: of the sequence as it was given. Where it has fewer than ranks, `rows` has one more for each rank
            that would have none: a document of its own, which nothing sees.
    """

    group: Group
    rows: Rows
    num_tokens: int
    exchange: str = "auto"
    backend: str | None = None
    encoder: Rows | None = None

    def attend(self, call: Call) -> Tensor:
        """Attention over the whole sequence; see `Context`."""
        if call.padding is not None:
            raise ArgumentError(
                f"{type(call.module).__name__} was given an attention_mask with padding next to a batch: leave "
                "padding to handle.shard(batch), which takes it from the whole sequence"
            )
        return context_parallel_attention(
            call.q,
            call.k,
            call.v,
            self.group,
            exchange=self.exchange,
            mask=self.rows.mask(call.pattern),
            layout=self.rows.layout,
            scale=call.scale,
            softcap=call.softcap,
            sink=call.sink,
            backend=self.backend,
        )

    def __deepcopy__(self, memo: dict[int, object]) -> Batch:
        return self  # frozen; a group cannot be copied


def documents_of_positions(position_ids: Tensor) -> tuple[Documents, ...]:
    """Returns the documents of each batch row whose positions restart, (B, S) or (1, S); () if none does."""
    rows = position_ids.tolist()
    starts = [[0, *(i for i in range(1, len(row)) if row[i] != row[i - 1] + 1)] for row in rows]
    if all(len(row) == 1 for row in starts):
        return ()
    return tuple((*row, position_ids.shape[1]) for row in starts)


def documents_of_padding(attention_mask: Tensor) -> tuple[Documents, ...]:
    """Returns a document of the tokens of each batch row, and one or two of its padding; () if there is none.

    Raises:
        ArgumentError: when a row's tokens do not follow one another.
    """
    valid = attention_mask.to(torch.bool)
    if bool(valid.all()):
        return ()
    length = valid.shape[1]
    found = []
    for number, row in enumerate(valid.tolist()):
        first = row.index(True) if any(row) else 0
        stop = first + sum(row)
        if not all(row[first:stop]):
            raise ArgumentError(
                f"attention_mask has padding between the tokens of row {number}: padding must stand before or after "
                "them; move the tokens together, or run this batch unpatched"
            )
        found.append((0, first, stop, length))
    return tuple(found)


def lengthened(documents: tuple[Documents, ...], length: int, more: int) -> tuple[Documents, ...]:
    """Returns the documents of a sequence with so many tokens more, each of them a document of its own."""
    if not more:
        return documents
    return tuple((*row, *range(length + 1, length + more + 1)) for row in documents or ((0, length),))
