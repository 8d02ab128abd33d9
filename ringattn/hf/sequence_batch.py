"""A batch as one rank holds it: where its rows stand in the whole sequence, and which documents they belong to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.attention.auto_attention import context_parallel_attention
from ringattn.comm.topology import rank_mesh
from ringattn.errors import ArgumentError
from ringattn.geometry.layout import Layout
from ringattn.geometry.masks import Mask, full, key_range
from ringattn.hf.attention_call import LayerCall
from ringattn.hf.implicit_positions import rescale_queries
from ringattn.hf.mask_patterns import MaskPattern
from ringattn.types import Group, Masks

CuSeqlens = tuple[int, ...]
Span = tuple[int, int]


@dataclass(frozen=True)
class SequenceRows:
    """A sequence that is sharded, its documents and its padding.

    Args:
        layout: who holds which positions.
        documents: cumulative lengths of the documents, of each batch row, or once for all of them; () is one document
            per row.
        spans: of each batch row, or once for all of them, the first of its tokens and the first position behind them:
            the rest is padding, which nobody sees; () is no padding.
    """

    layout: Layout
    documents: tuple[CuSeqlens, ...] = ()
    spans: tuple[Span, ...] = ()

    def mask(self, pattern: MaskPattern) -> Masks:
        """Returns what a layer with this pattern may see of this sequence: one mask, or one for each batch row."""
        if not self.spans:
            return _one_or_many([pattern.within(row) for row in self.documents or (None,)])
        length = self.layout.seq_len
        if self.documents:
            rows: list[CuSeqlens | None] = [
                self.documents[min(i, len(self.documents) - 1)] for i in range(len(self.spans))
            ]
        elif pattern.chunk is not None:
            rows = [(0, first, length) for first, _ in self.spans]  # chunks are counted from the first token
        else:
            rows = [None] * len(self.spans)
        pairs = zip(rows, self.spans, strict=True)
        return _one_or_many([pattern.within(row) & key_range(*span) for row, span in pairs])

    def mask_of_keys(self) -> Masks:
        """Returns what another sequence may see of this one: all but the padding."""
        return _one_or_many([key_range(*span) for span in self.spans] or [full()])


def _one_or_many(masks: list[Mask]) -> Masks:
    return masks[0] if len(masks) == 1 else masks


@dataclass(frozen=True, eq=False)
class ShardingContext:
    """What `handle.shard` says of a batch to the attention layers; it travels with the model's other arguments.

    Args:
        group: the ranks that hold the batch together.
        rows: the sequence.
        exchange, backend: as in `context_parallel_attention`.
        encoder: the encoder's sequence, of an encoder-decoder.
        num_tokens: of the sequence as it was given. Where it has fewer than ranks, `rows` has padding behind it, so
            that each rank has a position.
        last: the largest of the whole sequence's position_ids, a scalar; None if it has none.
        merges: whether the model is given the whole sequence, and merges more than text into it, before the rows of a
            rank are cut out; see `merging`.
    """

    group: Group
    rows: SequenceRows
    num_tokens: int
    exchange: str = "auto"
    backend: str | None = None
    encoder: SequenceRows | None = None
    last: Tensor | None = None
    merges: bool = False

    def attend(self, call: LayerCall) -> Tensor:
        """Attention over the whole sequence; see `Context`."""
        if call.padding is not None:
            raise ArgumentError(
                f"{type(call.module).__name__} was given an attention_mask with padding next to a batch: leave "
                "padding to handle.shard(batch), which takes it from the whole sequence"
            )
        queries, keys = self._sides(call)
        return context_parallel_attention(
            rescale_queries(call.module, call.q, queries.layout.positions(rank_mesh(self.group).rank)),
            call.k,
            call.v,
            self.group,
            exchange=self.exchange,
            mask=queries.mask(call.pattern) if keys is queries else keys.mask_of_keys(),
            layout=queries.layout,
            kv_layout=keys.layout,
            backend=self.backend,
            **call.score.options(),
        )

    def _sides(self, call: LayerCall) -> tuple[SequenceRows, SequenceRows]:
        """Returns where queries and keys come from: what is not causal in a decoder looks at the encoder."""
        if self.encoder is None:
            return self.rows, self.rows
        if not call.module.is_decoder:
            return self.encoder, self.encoder
        return self.rows, self.rows if call.pattern.right == 0 else self.encoder

    def __deepcopy__(self, memo: dict[int, object]) -> ShardingContext:
        return self  # frozen; a group cannot be copied


def documents_from_positions(position_ids: Tensor) -> tuple[CuSeqlens, ...]:
    """Returns the documents of each batch row whose positions restart, (B, S) or (1, S); () if none does."""
    breaks = (position_ids[:, 1:] != position_ids[:, :-1] + 1).cpu()
    if not bool(breaks.any()):
        return ()
    length = position_ids.shape[1]
    return tuple((0, *(row.nonzero()[:, 0] + 1).tolist(), length) for row in breaks)


def real_token_spans(attention_mask: Tensor) -> tuple[Span, ...]:
    """Returns where the tokens of each batch row lie, of (B, S) with 0 for padding; () if there is none.

    Raises:
        ArgumentError: when a row's tokens do not follow one another.
    """
    valid = attention_mask.to(torch.bool).cpu()
    if bool(valid.all()):
        return ()
    begins = valid.clone()
    begins[:, 1:] &= ~valid[:, :-1]
    if bool((begins.sum(1) > 1).any()):
        row = int((begins.sum(1) > 1).nonzero()[0])
        raise ArgumentError(
            f"attention_mask has padding between the tokens of row {row}: padding must stand before or after them; "
            "move the tokens together, or run this batch unpatched"
        )
    counts = valid.sum(1)
    first = valid.to(torch.uint8).argmax(1) if valid.shape[1] else counts
    return tuple(zip(first.tolist(), (first + counts).tolist(), strict=True))
