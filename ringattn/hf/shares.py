"""A rank's share of a batch: what is cut along the sequence, and what must be read from the whole of it before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ringattn.attention.api import Group
from ringattn.attention.sharding import IGNORED_LABEL, shard
from ringattn.comm.group import Team
from ringattn.errors import ArgumentError, ArgumentTypeError, LayoutError
from ringattn.geometry.balance import balanced
from ringattn.geometry.layout import Layout, check_layout, contiguous, striped, zigzag
from ringattn.hf.batches import Batch, Documents, Rows, documents_of_padding, documents_of_positions, lengthened
from ringattn.hf.loss import num_valid
from ringattn.hf.models import Facts

MakeLayout = Callable[[int, int], Layout]

LAYOUTS: Mapping[str, MakeLayout] = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}

BATCH = "ringattn"  # the name of the Batch among a model's arguments


@dataclass(frozen=True, eq=False)
class Sharding:
    """How the batches of a model are shared out.

    Args:
        facts: about the model.
        team, group: the ranks, and as the user named them.
        layout: a name out of LAYOUTS, "balanced", or a function of (seq_len, world_size).
        exchange, backend: as in `context_parallel_attention`.
    """

    facts: Facts
    team: Team
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
        whole = dict(batch)
        tokens = _tokens(whole)
        documents = _documents(whole, tokens)
        self._add_labels(whole)
        length = tokens.shape[1]
        if whole.get("position_ids") is None:
            whole["position_ids"] = torch.arange(length, device=tokens.device)[None]
        missing = max(0, self.team.size - length)
        rows = self.rows(length + missing, lengthened(documents, length, missing))
        share = {name: self._cut(name, value, tokens.shape, missing, rows.layout) for name, value in whole.items()}
        share[BATCH] = Batch(self.group, rows, length, self.exchange, self.backend)
        return share

    def rows(self, length: int, documents: tuple[Documents, ...] = ()) -> Rows:
        """Returns where a sequence of these documents lies.

        Raises:
            LayoutError: when a rank would have no position: models cannot run on none.
        """
        world_size = self.team.size
        if callable(self.layout):
            layout = check_layout(self.layout(length, world_size), "layout", world_size)
        elif self.layout == "balanced":
            pattern = self.facts.pattern
            layout = balanced(pattern.within(documents[0] if documents else None), length, world_size)
        else:
            layout = LAYOUTS[self.layout](length, world_size)
        empty = [rank for rank in range(world_size) if not layout.num_tokens(rank)]
        if empty or layout.seq_len != length:
            raise LayoutError(
                f"layout={layout}: must have {length} positions, and one or more for each rank; ranks {empty} have none"
            )
        return Rows(layout, documents)

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
            del whole["labels"]

    def _cut(self, name: str, value: Any, sizes: torch.Size, missing: int, layout: Layout) -> Any:
        """Cuts out this rank's rows of a tensor along the sequence; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        batch, length = sizes[:2]
        dim = 2 if name == "position_ids" and value.ndim == 3 else 1  # a position for each of three axes
        if value.ndim <= dim or value.shape[dim] != length or value.shape[dim - 1] not in (1, batch):
            return value
        if missing:
            more = list(value.shape)
            more[dim] = missing
            fill = IGNORED_LABEL if name in ("labels", "shift_labels") else 0
            value = torch.cat([value, value.new_full(more, fill)], dim)
        return shard(value, layout, self.group, dim)


def _tokens(whole: Mapping[str, Any]) -> Tensor:
    for name in ("input_ids", "inputs_embeds"):
        value = whole.get(name)
        if isinstance(value, Tensor) and value.ndim >= 2:
            return value
    raise ArgumentError(f"batch has {sorted(whole)}: must have input_ids (B, S) or inputs_embeds (B, S, hidden)")


def _documents(whole: dict[str, Any], tokens: Tensor) -> tuple[Documents, ...]:
    """Takes out what tells the documents of the whole sequence, and returns them."""
    batch, length = tokens.shape[:2]
    q_lens, k_lens = whole.pop("cu_seq_lens_q", None), whole.pop("cu_seq_lens_k", None)
    for name in ("max_length_q", "max_length_k"):
        whole.pop(name, None)
    padding = whole.pop("attention_mask", None)
    if padding is not None and (not isinstance(padding, Tensor) or padding.shape != (batch, length)):
        raise ArgumentError(
            f"attention_mask has shape {tuple(getattr(padding, 'shape', ()))}: must be ({batch}, {length}), 1 for "
            "tokens and 0 for padding; masks by the layers follow from the model, and documents from position_ids"
        )
    if q_lens is not None or k_lens is not None:
        q_lens, k_lens = (k_lens if q_lens is None else q_lens), (q_lens if k_lens is None else k_lens)
        ends = tuple(int(end) for end in q_lens)
        if ends != tuple(int(end) for end in k_lens) or batch != 1 or ends[:1] != (0,) or ends[-1] != length:
            raise ArgumentError(
                f"cu_seq_lens_q={q_lens!r:.100} and cu_seq_lens_k={k_lens!r:.100}: must be the same, from 0 to "
                f"{length}, of a batch of 1 row, not {batch}"
            )
        return (ends,)
    if padding is not None:
        # As in transformers: next to an attention_mask, positions that restart are those of padding.
        return documents_of_padding(padding)
    positions = whole.get("position_ids")
    if positions is None or positions.ndim == 3:
        return ()
    return documents_of_positions(positions)
