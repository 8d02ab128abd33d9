"""The sharded sequences of a batch: layout, packed documents and padding; and the attention over them."""

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
    """The layout, the documents and the padding of the sequences of a batch.

    Args:
        layout: which rank holds which positions.
        documents: cumulative lengths of the packed documents, one tuple per batch row, or a single tuple for all rows;
            () if each row is one document.
        token_spans: (first, stop) positions of the tokens that are not padding, one span per batch row, or a single
            span for all rows; () if there is no padding. No query sees padding.
    """

    layout: Layout
    documents: tuple[CuSeqlens, ...] = ()
    token_spans: tuple[Span, ...] = ()

    def mask(self, pattern: MaskPattern) -> Masks:
        """Returns the mask of a layer with this pattern: one for all batch rows, or a list with one per row."""
        if not self.token_spans:
            return _one_or_many([pattern.to_mask(cu_seqlens) for cu_seqlens in self.documents or (None,)])
        length = self.layout.seq_len
        if self.documents:
            documents: list[CuSeqlens | None] = [
                self.documents[min(row, len(self.documents) - 1)] for row in range(len(self.token_spans))
            ]
        elif pattern.chunk is not None:
            documents = [(0, first, length) for first, _ in self.token_spans]  # chunks start at the first token
        else:
            documents = [None] * len(self.token_spans)
        pairs = zip(documents, self.token_spans, strict=True)
        return _one_or_many([pattern.to_mask(cu_seqlens) & key_range(*span) for cu_seqlens, span in pairs])

    def key_mask(self) -> Masks:
        """Returns the mask of cross-attention to this sequence: all keys but the padding."""
        return _one_or_many([key_range(*span) for span in self.token_spans] or [full()])


def _one_or_many(masks: list[Mask]) -> Masks:
    return masks[0] if len(masks) == 1 else masks


@dataclass(frozen=True, eq=False)
class ShardingContext:
    """How a batch is sharded. `Handle.shard` adds it to the model's arguments, and the attention layers receive it.

    Args:
        group: the ranks that share the sequences.
        rows: layout, documents and padding; of an encoder-decoder: of the decoder's sequences.
        num_tokens: length S of the whole sequence. With fewer tokens than ranks, `rows` has padding at the end, so that
            each rank has a position.
        exchange, backend: as in `context_parallel_attention`.
        encoder_rows: the same as `rows` for the encoder's sequences of an encoder-decoder; None for other models.
        max_position: largest position_ids of the whole batch, a scalar tensor; None if the batch has no position_ids.
        shards_in_text_model: whether the model's arguments hold the whole sequence, and the input of its text model is
            sharded instead, after images are merged into it.
    """

    group: Group
    rows: SequenceRows
    num_tokens: int
    exchange: str = "auto"
    backend: str | None = None
    encoder_rows: SequenceRows | None = None
    max_position: Tensor | None = None
    shards_in_text_model: bool = False

    def attend(self, call: LayerCall) -> Tensor:
        """Returns the attention output (B, rows, heads, v_dim) of this rank's rows over the whole sequence.

        Raises:
            ArgumentError: when the layer got other padding than the batch has.
        Communication: as `context_parallel_attention`; all ranks call it together.
        """
        if call.padding is not None:
            raise ArgumentError(
                f"attention_mask: {type(call.module).__name__} got one with padding, of this rank's rows alone; leave "
                "attention_mask to handle.shard(batch), which reads the padding of the whole sequence"
            )
        query_rows, key_rows = self._query_and_key_rows(call)
        return context_parallel_attention(
            rescale_queries(call.module, call.q, query_rows.layout.positions(rank_mesh(self.group).rank)),
            call.k,
            call.v,
            self.group,
            exchange=self.exchange,
            mask=query_rows.mask(call.pattern) if key_rows is query_rows else key_rows.key_mask(),
            layout=query_rows.layout,
            kv_layout=key_rows.layout,
            backend=self.backend,
            **call.score.options(),
        )

    def _query_and_key_rows(self, call: LayerCall) -> tuple[SequenceRows, SequenceRows]:
        """Returns the sequences of the queries and of the keys; attention in a decoder that is not causal is cross-
        attention to the encoder.
        """
        if self.encoder_rows is None:
            return self.rows, self.rows
        if not call.module.is_decoder:
            return self.encoder_rows, self.encoder_rows
        return self.rows, self.rows if call.pattern.right == 0 else self.encoder_rows

    def __deepcopy__(self, memo: dict[int, object]) -> ShardingContext:
        return self  # immutable, and a group cannot be copied


def documents_from_positions(position_ids: Tensor) -> tuple[CuSeqlens, ...]:
    """Returns the documents of each batch row, whose position_ids restart at each document; () if none restarts.

    Args:
        position_ids: (B, S) or (1, S).
    """
    breaks = (position_ids[:, 1:] != position_ids[:, :-1] + 1).cpu()
    if not bool(breaks.any()):
        return ()
    length = position_ids.shape[1]
    return tuple((0, *(row.nonzero()[:, 0] + 1).tolist(), length) for row in breaks)


def real_token_spans(attention_mask: Tensor) -> tuple[Span, ...]:
    """Returns the span (first, stop) of the tokens of each batch row; () if there is no padding.

    Args:
        attention_mask: (B, S), 0 for padding.
    Raises:
        ArgumentError: when a row has padding between its tokens.
    """
    valid = attention_mask.to(torch.bool).cpu()
    if bool(valid.all()):
        return ()
    begins = valid.clone()
    begins[:, 1:] &= ~valid[:, :-1]
    if bool((begins.sum(1) > 1).any()):
        row = int((begins.sum(1) > 1).nonzero()[0])
        raise ArgumentError(
            f"attention_mask: has padding between the tokens of row {row}; padding must be at the start or the end of "
            "a row: move the tokens together, or run this batch unpatched"
        )
    counts = valid.sum(1)
    first = valid.to(torch.uint8).argmax(1) if valid.shape[1] else counts
    return tuple(zip(first.tolist(), (first + counts).tolist(), strict=True))
