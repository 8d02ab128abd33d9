"""Shards a batch along its sequence; documents, padding and labels are read from the whole sequence first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ringattn.attention.sharding import IGNORED_LABEL, shard
from ringattn.comm.topology import RankMesh
from ringattn.errors import ArgumentError, ArgumentTypeError, LayoutError
from ringattn.geometry.balance import balanced
from ringattn.geometry.layout import Layout, check_layout, contiguous, striped, zigzag
from ringattn.hf.causal_lm_loss import num_valid
from ringattn.hf.model_support import ModelFacts
from ringattn.hf.sequence_batch import (
    CuSeqlens,
    SequenceRows,
    ShardingContext,
    Span,
    documents_from_positions,
    real_token_spans,
)
from ringattn.types import Group

MakeLayout = Callable[[int, int], Layout]

LAYOUTS: Mapping[str, MakeLayout] = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}

CONTEXT_KEY = "ringattn"  # name of the ShardingContext among the arguments of a model and its attention

# Arguments of the encoder of an encoder-decoder.
_ENCODER_INPUTS = ("input_ids", "inputs_embeds", "attention_mask")
_LABELS = ("labels", "shift_labels")


@dataclass(frozen=True, eq=False)
class BatchSharder:
    """Shards the batches of one model over the ranks of a group.

    Args:
        facts: what sharding depends on in the model.
        rank_mesh: the ranks of `group`.
        group: the group or mesh, as given to `patch`.
        layout: a name in LAYOUTS, "balanced", or a function of (seq_len, world_size).
        exchange, backend: as in `context_parallel_attention`.
    Raises:
        ArgumentError: when the layout's name is unknown.
    """

    facts: ModelFacts
    rank_mesh: RankMesh
    group: Group
    layout: str | MakeLayout
    exchange: str
    backend: str | None

    def __post_init__(self) -> None:
        if not callable(self.layout) and self.layout not in (*LAYOUTS, "balanced"):
            raise ArgumentError(
                f"layout={self.layout!r}: must be one of {', '.join(map(repr, (*LAYOUTS, 'balanced')))}, or a function "
                "of (seq_len, world_size) that returns a Layout"
            )

    def shard(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns this rank's part of a batch, as arguments of the model; `Handle.shard` documents it."""
        if not isinstance(batch, Mapping):
            raise ArgumentTypeError(f"batch={batch!r:.100}: must be a mapping of names to tensors")
        inputs, local_batch = dict(batch), {}
        encoder_rows: SequenceRows | None = None
        if self.facts.make_decoder_ids is not None:
            encoder_inputs = self._take_encoder_inputs(inputs, self.facts.make_decoder_ids)
            tokens, encoder_rows = self._read_sequence(encoder_inputs)
            local_batch = self._shard_tensors(encoder_inputs, tokens.shape, encoder_rows.layout)
        is_multimodal, padding = self.facts.is_multimodal, inputs.get("attention_mask")
        tokens, rows = self._read_sequence(inputs, "" if encoder_rows is None else "decoder_")
        self._add_labels(inputs)
        if encoder_rows is None and not is_multimodal and inputs.get("position_ids") is None:
            inputs["position_ids"] = self.facts.default_position_ids(tokens)
        inputs.setdefault("use_cache", False)  # a cache would hold this rank's rows only
        position_ids = inputs.get("position_ids")
        if is_multimodal:
            local_batch = {name: value for name, value in inputs.items() if name not in _LABELS}
            if padding is not None:
                local_batch["attention_mask"] = padding  # some of these models count positions by it
            inputs = {name: inputs[name] for name in _LABELS if name in inputs}
            position_ids = None
        local_batch |= self._shard_tensors(inputs, tokens.shape, rows.layout)
        local_batch[CONTEXT_KEY] = ShardingContext(
            self.group,
            rows,
            tokens.shape[1],
            self.exchange,
            self.backend,
            encoder_rows,
            max_position=None if position_ids is None else position_ids.max(),
            shards_in_text_model=is_multimodal,
        )
        return local_batch

    def _take_encoder_inputs(
        self, inputs: dict[str, Any], make_decoder_ids: Callable[[Tensor], Tensor]
    ) -> dict[str, Any]:
        """Removes the encoder's arguments from the inputs, and returns them; adds decoder ids made of the labels."""
        packed = sorted({"position_ids", "cu_seq_lens_q", "cu_seq_lens_k"} & inputs.keys())
        if packed:
            raise ArgumentError(
                f"batch has {packed}: an encoder-decoder counts positions from 0 in every row, so documents cannot be "
                "packed; put each document into a row of its own"
            )
        encoder_inputs = {name: inputs.pop(name) for name in _ENCODER_INPUTS if name in inputs}
        if "decoder_input_ids" not in inputs and "labels" in inputs:
            inputs["decoder_input_ids"] = make_decoder_ids(inputs["labels"])
        return encoder_inputs

    def _read_sequence(self, inputs: dict[str, Any], prefix: str = "") -> tuple[Tensor, SequenceRows]:
        """Returns the ids or embeddings of a sequence, and how it is sharded.

        Arguments that describe documents and padding are removed from the inputs.
        """
        names = [prefix + "input_ids", prefix + "inputs_embeds"]
        tokens = next((inputs[name] for name in names if inputs.get(name) is not None), None)
        if not isinstance(tokens, Tensor) or tokens.ndim < 2:
            raise ArgumentError(f"batch has {sorted(inputs)}: must have {' or '.join(names)}, (B, S) or (B, S, hidden)")
        padding = inputs.pop(prefix + "attention_mask", None)
        documents = _pop_documents(inputs, tokens, read_position_ids=padding is None)
        return tokens, self.sequence_rows(tokens.shape[1], documents, _token_spans(padding, tokens))

    def sequence_rows(
        self, length: int, documents: tuple[CuSeqlens, ...] = (), token_spans: tuple[Span, ...] = ()
    ) -> SequenceRows:
        """Returns the rows of a sequence with these documents and this padding.

        A sequence with fewer tokens than ranks is padded at its end to one position per rank.

        Raises:
            LayoutError: when a rank would have no position; models cannot run on empty tensors.
        """
        world_size = self.rank_mesh.size
        padded_length = max(length, world_size)
        if padded_length > length:
            documents = tuple((*cu_seqlens, padded_length) for cu_seqlens in documents)
            token_spans = token_spans or ((0, length),)
        if callable(self.layout):
            layout = check_layout(self.layout(padded_length, world_size), "layout", world_size)
        elif self.layout == "balanced":
            mask = self.facts.mask_pattern.to_mask(documents[0] if documents else None)
            layout = balanced(mask, padded_length, world_size)
        else:
            layout = LAYOUTS[self.layout](padded_length, world_size)
        empty = [rank for rank in range(world_size) if not layout.num_tokens(rank)]
        if empty or layout.seq_len != padded_length:
            raise LayoutError(
                f"layout={layout}: must have {padded_length} positions, and at least one on each rank; ranks {empty} "
                "have none"
            )
        return SequenceRows(layout, documents, token_spans)

    def _add_labels(self, inputs: dict[str, Any]) -> None:
        """Shifts the labels if the model predicts the next token, and adds the number of valid labels."""
        labels = inputs.get("labels")
        if labels is not None and self.facts.shifts_labels and "shift_labels" not in inputs:
            inputs["shift_labels"] = torch.full_like(labels, IGNORED_LABEL)
            inputs["shift_labels"][:, :-1] = labels[:, 1:]
        targets = inputs.get("shift_labels", labels)
        if targets is None:
            return
        inputs.setdefault("num_items_in_batch", num_valid(targets))
        if self.facts.shifts_labels:
            inputs["labels"] = inputs["shift_labels"]  # without labels, models compute no loss
        if not self.facts.takes_num_items:
            inputs["shift_labels"] = targets
            inputs.pop("labels", None)

    def _shard_tensors(self, values: Mapping[str, Any], shape: torch.Size, layout: Layout) -> dict[str, Any]:
        return {name: self.shard_tensor(name, value, shape, layout) for name, value in values.items()}

    def shard_tensor(self, name: str, value: Any, shape: torch.Size, layout: Layout) -> Any:
        """Returns this rank's rows of a tensor with a sequence dim; other values unchanged.

        Args:
            name: of the argument.
            value: of the argument.
            shape: (B, S, ...) of the whole sequence's ids or embeddings.
            layout: of the sequence.
        """
        dim = sequence_dim(name, value, shape)
        if dim is None:
            return value
        num_padding = layout.seq_len - shape[1]
        if num_padding:
            padding_shape = list(value.shape)
            padding_shape[dim] = num_padding
            fill = IGNORED_LABEL if name in _LABELS else 0
            value = torch.cat([value, value.new_full(padding_shape, fill)], dim)
        return shard(value, layout, self.group, dim)


def sequence_dim(name: str, value: Any, shape: torch.Size) -> int | None:
    """Returns the sequence dim of an argument in a batch of ids or embeddings (B, S, ...); None if it has none."""
    if not isinstance(value, Tensor):
        return None
    dim = 2 if name == "position_ids" and value.ndim == 3 else 1  # (axes, B, S): positions in time, height, width
    has_sequence = value.ndim > dim and value.shape[dim] == shape[1] and value.shape[dim - 1] in (1, shape[0])
    return dim if has_sequence else None


def _token_spans(padding: Any, tokens: Tensor) -> tuple[Span, ...]:
    """Returns the span of the tokens of each row by its attention_mask; () if there is no padding."""
    if padding is None:
        return ()
    if not isinstance(padding, Tensor) or padding.shape != tokens.shape[:2]:
        raise ArgumentError(
            f"attention_mask has shape {tuple(getattr(padding, 'shape', ()))}: must be {tuple(tokens.shape[:2])}, 1 "
            "for tokens and 0 for padding. Mask patterns follow from the model; give packed documents as position_ids "
            "that restart, or as cu_seq_lens_q/k"
        )
    return real_token_spans(padding)


def _pop_documents(inputs: dict[str, Any], tokens: Tensor, *, read_position_ids: bool) -> tuple[CuSeqlens, ...]:
    """Removes the arguments that describe packed documents from the inputs, and returns the documents.

    As in transformers, position_ids describe documents only if there is no attention_mask.
    """
    batch, length = tokens.shape[:2]
    given = [inputs.pop(name, None) for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
    for name in ("max_length_q", "max_length_k"):
        inputs.pop(name, None)
    distinct = {tuple(int(end) for end in cu_seqlens) for cu_seqlens in given if cu_seqlens is not None}
    if distinct:
        (first, *others) = distinct
        if others or batch != 1 or first[:1] != (0,) or first[-1] != length:
            raise ArgumentError(
                f"cu_seq_lens_q={given[0]!r:.100} and cu_seq_lens_k={given[1]!r:.100}: must be equal, start at 0 and "
                f"end at {length}, in a batch of 1 row, not {batch}"
            )
        return (first,)
    position_ids = inputs.get("position_ids")
    if position_ids is not None and position_ids.ndim == 3 and len(position_ids) == 4:
        position_ids = position_ids[0]  # text positions come before those in time, height and width
    if position_ids is None or position_ids.ndim != 2 or not read_position_ids:
        return ()
    return documents_from_positions(position_ids)
