"""A rank's share of a batch: what is cut along the sequence, and what must be read from the whole of it before."""

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

BATCH = "ringattn"  # the name of the Batch among a model's arguments

# What goes to the encoder of an encoder-decoder.
_SOURCE = ("input_ids", "inputs_embeds", "attention_mask")
_LABELS = ("labels", "shift_labels")


@dataclass(frozen=True, eq=False)
class BatchSharder:
    """How the batches of a model are shared out.

    Args:
        facts: about the model.
        team, group: the ranks, and as the user named them.
        layout: a name out of LAYOUTS, "balanced", or a function of (seq_len, world_size).
        exchange, backend: as in `context_parallel_attention`.
    """

    facts: ModelFacts
    team: RankMesh
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

    def share(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns this rank's share of a batch that every rank has; see `Handle.shard`."""
        if not isinstance(batch, Mapping):
            raise ArgumentTypeError(f"batch={batch!r:.100}: must be a mapping of names to tensors")
        whole, encoder, share = dict(batch), None, {}
        if self.facts.decoder_ids is not None:
            packed = sorted({"position_ids", "cu_seq_lens_q", "cu_seq_lens_k"} & whole.keys())
            if packed:
                raise ArgumentError(
                    f"batch has {packed}: an encoder-decoder counts positions from 0 in every row, so documents cannot "
                    "be packed into one; give each a row of its own"
                )
            source = {name: whole.pop(name) for name in _SOURCE if name in whole}
            if "decoder_input_ids" not in whole and "labels" in whole:
                whole["decoder_input_ids"] = self.facts.decoder_ids(whole["labels"])
            tokens, encoder = self._read(source)
            share = {name: self.cut(name, value, tokens.shape, encoder.layout) for name, value in source.items()}
        merges, padding = self.facts.merges, whole.get("attention_mask")
        tokens, rows = self._read(whole, "" if encoder is None else "decoder_")
        self._add_labels(whole)
        if encoder is None and not merges and whole.get("position_ids") is None:
            whole["position_ids"] = self.facts.positions(tokens)
        whole.setdefault("use_cache", False)  # what a rank has seen is of no use to a later call
        if merges:
            share = whole | ({} if padding is None else {"attention_mask": padding})  # some count positions by it
            whole = {name: whole[name] for name in _LABELS if name in whole}
        share |= {name: self.cut(name, value, tokens.shape, rows.layout) for name, value in whole.items()}
        last = None if whole.get("position_ids") is None else whole["position_ids"].max()
        share[BATCH] = ShardingContext(
            self.group, rows, tokens.shape[1], self.exchange, self.backend, encoder, last, merges
        )
        return share

    def _read(self, whole: dict[str, Any], prefix: str = "") -> tuple[Tensor, SequenceRows]:
        """Returns the tokens of a sequence and where they lie; takes out what tells of its documents and padding."""
        names = [prefix + "input_ids", prefix + "inputs_embeds"]
        tokens = next((whole[name] for name in names if whole.get(name) is not None), None)
        if not isinstance(tokens, Tensor) or tokens.ndim < 2:
            raise ArgumentError(f"batch has {sorted(whole)}: must have {' or '.join(names)}, (B, S) or (B, S, hidden)")
        padding = whole.pop(prefix + "attention_mask", None)
        documents = _documents(whole, tokens, restarts=padding is None)
        return tokens, self.rows(tokens.shape[1], documents, _real_spans(padding, tokens))

    def rows(self, length: int, documents: tuple[CuSeqlens, ...] = (), spans: tuple[Span, ...] = ()) -> SequenceRows:
        """Returns where a sequence of these documents and this padding lies; it gets more, if it is too short.

        Raises:
            LayoutError: when a rank would have no position: models cannot run on none.
        """
        world_size = self.team.size
        whole = max(length, world_size)
        if whole > length:
            documents = tuple((*row, whole) for row in documents)
            spans = spans or ((0, length),)
        if callable(self.layout):
            layout = check_layout(self.layout(whole, world_size), "layout", world_size)
        elif self.layout == "balanced":
            layout = balanced(self.facts.pattern.within(documents[0] if documents else None), whole, world_size)
        else:
            layout = LAYOUTS[self.layout](whole, world_size)
        empty = [rank for rank in range(world_size) if not layout.num_tokens(rank)]
        if empty or layout.seq_len != whole:
            raise LayoutError(
                f"layout={layout}: must have {whole} positions, and one or more for each rank; ranks {empty} have none"
            )
        return SequenceRows(layout, documents, spans)

    def _add_labels(self, whole: dict[str, Any]) -> None:
        """Shifts the labels where the model predicts the next token, and counts those of the whole batch."""
        labels = whole.get("labels")
        if labels is not None and self.facts.predicts_next and "shift_labels" not in whole:
            whole["shift_labels"] = torch.full_like(labels, IGNORED_LABEL)
            whole["shift_labels"][:, :-1] = labels[:, 1:]
        targets = whole.get("shift_labels", labels)
        if targets is None:
            return
        whole.setdefault("num_items_in_batch", num_valid(targets))
        if self.facts.predicts_next:
            whole["labels"] = whole["shift_labels"]  # without labels, models compute no loss
        if not self.facts.counts_items:
            whole["shift_labels"] = targets
            whole.pop("labels", None)

    def cut(self, name: str, value: Any, sizes: torch.Size, layout: Layout) -> Any:
        """Cuts out this rank's rows of a tensor along the sequence; anything else as it is."""
        dim = dim_of_rows(name, value, sizes)
        if dim is None:
            return value
        missing = layout.seq_len - sizes[1]
        if missing:
            more = list(value.shape)
            more[dim] = missing
            fill = IGNORED_LABEL if name in _LABELS else 0
            value = torch.cat([value, value.new_full(more, fill)], dim)
        return shard(value, layout, self.group, dim)


def dim_of_rows(name: str, value: Any, sizes: torch.Size) -> int | None:
    """Returns along which dim a value of a batch of these sizes has the sequence; None if along none."""
    if not isinstance(value, Tensor):
        return None
    dim = 2 if name == "position_ids" and value.ndim == 3 else 1  # a position for each of several axes
    of_the_batch = value.ndim > dim and value.shape[dim] == sizes[1] and value.shape[dim - 1] in (1, sizes[0])
    return dim if of_the_batch else None


def _real_spans(padding: Any, tokens: Tensor) -> tuple[Span, ...]:
    """Where the tokens of each row lie."""
    if padding is None:
        return ()
    if not isinstance(padding, Tensor) or padding.shape != tokens.shape[:2]:
        raise ArgumentError(
            f"attention_mask has shape {tuple(getattr(padding, 'shape', ()))}: must be {tuple(tokens.shape[:2])}, 1 "
            "for tokens and 0 for padding; masks of the layers follow from the model, and documents from position_ids "
            "that restart or cu_seq_lens_q/k"
        )
    return real_token_spans(padding)


def _documents(whole: dict[str, Any], tokens: Tensor, *, restarts: bool) -> tuple[CuSeqlens, ...]:
    """Takes out what tells the documents of the whole sequence, and returns them.

    As in transformers, positions that restart tell of documents only where there is no attention_mask.
    """
    batch, length = tokens.shape[:2]
    given = [whole.pop(name, None) for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
    for name in ("max_length_q", "max_length_k"):
        whole.pop(name, None)
    ends = {tuple(int(end) for end in lens) for lens in given if lens is not None}
    if ends:
        (first, *others) = ends
        if others or batch != 1 or first[:1] != (0,) or first[-1] != length:
            raise ArgumentError(
                f"cu_seq_lens_q={given[0]!r:.100} and cu_seq_lens_k={given[1]!r:.100}: must be the same, from 0 to "
                f"{length}, and of a batch of 1 row, not {batch}"
            )
        return (first,)
    positions = whole.get("position_ids")
    if positions is not None and positions.ndim == 3 and len(positions) == 4:
        positions = positions[0]  # the tokens', before those of time, height and width
    if positions is None or positions.ndim != 2 or not restarts:
        return ()
    return documents_from_positions(positions)
