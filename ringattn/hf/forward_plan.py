"""One forward pass on a cache: who computes which of the new tokens.

Every rank is given the same ones. A few are computed by every rank, each attends to the part of the cache that it
holds, and the results are merged: `ReplicatedForward`. Many are dealt out by a layout: `ShardedForward`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ringattn.cache.decode import decode_attention
from ringattn.cache.kv_cache import DistributedKVCache
from ringattn.cache.pages import SlotAllocation
from ringattn.cache.prefill import prefill_attention
from ringattn.comm.topology import RankMesh
from ringattn.comm.uneven_all_gather import all_gather_mesh_rows
from ringattn.geometry.layout import Layout
from ringattn.hf.attention_call import LayerCall
from ringattn.hf.generation_inputs import GenerationInputs
from ringattn.hf.implicit_positions import rescale_queries
from ringattn.types import Ints


class ForwardPlan(Protocol):
    """One forward pass: the new tokens of every row, and who computes which."""

    @property
    def same(self) -> tuple[int, ...]:
        """For each row the first one of the same tokens, which is computed in its place."""
        ...

    def arguments(self) -> dict[str, Any]:
        """Returns what the model's forward is given on this rank in place of its arguments."""
        ...

    def extend(self, store: DistributedKVCache, rows: Sequence[int]) -> None:
        """Finds places for the new tokens of the rows that are computed; `rows` are the sequences."""
        ...

    def attend(self, call: LayerCall, store: DistributedKVCache, layer: int) -> Tensor:
        """Returns the attention of what this rank computes, (B, rows, heads, v_dim)."""
        ...

    def logits(self, local: Tensor) -> Tensor:
        """Returns the logits that were asked for, (B, columns, V), the same to the bit on every rank."""
        ...


class ReplicatedForward:
    """Every rank computes all new tokens; no row has padding among them.

    Args:
        tokens: what the model is asked for.
    """

    def __init__(self, tokens: GenerationInputs) -> None:
        self._tokens = tokens
        self.same = tuple(range(tokens.num_rows))
        self._extension: SlotAllocation | None = None

    def arguments(self) -> dict[str, Any]:
        """See Pass."""
        return {self._tokens.name: self._tokens.values, "position_ids": self._tokens.positions}

    def extend(self, store: DistributedKVCache, rows: Sequence[int]) -> None:
        """See Pass."""
        self._extension = store.extend(rows, self._tokens.width)

    def attend(self, call: LayerCall, store: DistributedKVCache, layer: int) -> Tensor:
        """See Pass."""
        assert self._extension is not None
        return decode_attention(
            call.q, call.k, call.v, store, layer, self._extension,
            mask=call.pattern.to_mask(None), **call.score.options(),
        )  # fmt: skip

    def logits(self, local: Tensor) -> Tensor:
        """See Pass."""
        return local


class ShardedForward:
    """Each rank computes its share of every row, one after the other in a single packed row without padding.

    Behind them comes a token that nobody sees, at the last position of all: a forward of no tokens fails in many
    models, and rotary embeddings that grow with the sequence look at the largest position.

    Args:
        tokens: what the model is asked for.
        past: how many columns the batch had before.
        same: for each row, the first one of the same tokens; only that is computed.
        layout_of: who computes which of a number of tokens.
        team: the ranks.
        keeps: whether the model's forward takes `logits_to_keep`.
    """

    def __init__(
        self,
        tokens: GenerationInputs,
        past: int,
        same: tuple[int, ...],
        layout_of: Callable[[int], Layout],
        team: RankMesh,
        *,
        keeps: bool,
    ) -> None:
        self._tokens, self._past, self._team, self._keeps = tokens, past, team, keeps
        self.same = same
        self._layouts = {row: layout_of(tokens.counts[row]) for row in sorted(set(same)) if tokens.counts[row]}
        self._extensions: dict[int, SlotAllocation] = {}
        kept = np.zeros(tokens.width, dtype=bool)
        kept[tokens.columns] = True
        # Of each rank, the places in the batch of what it computes and somebody wants the logits of.
        wanted = [places[kept[places % tokens.width]] for places in map(self._places, range(team.size))]
        self._counts = [len(places) for places in wanted]
        self._own = self._places(team.rank)
        self._own_kept = np.flatnonzero(kept[self._own % tokens.width])
        self._found = self._rows_of(np.concatenate(wanted))

    def _places(self, rank: int) -> Ints:
        """Returns where in the batch, row * width + column, the tokens are that a rank computes, in its order."""
        width, pads = self._tokens.width, self._tokens.pads
        own = [row * width + pads[row] + layout.positions(rank) for row, layout in self._layouts.items()]
        return np.concatenate([np.empty(0, dtype=np.int64), *own])

    def _rows_of(self, places: Ints) -> Ints:
        """Returns which of the gathered logits a row's wanted columns have, (B, columns); padding has those after."""
        tokens = self._tokens
        found = np.full(tokens.num_rows * tokens.width, len(places), dtype=np.int64)
        found[places] = np.arange(len(places))
        table: Ints = found.reshape(tokens.num_rows, tokens.width)[list(self.same)]
        return table[:, tokens.columns]

    def arguments(self) -> dict[str, Any]:
        """See Pass."""
        tokens = self._tokens
        own = torch.as_tensor(self._own, device=tokens.values.device)
        values, positions = tokens.values.flatten(0, 1), tokens.positions.flatten()
        given: dict[str, Any] = {
            tokens.name: torch.cat([values[own], values[-1:]])[None],
            "position_ids": torch.cat([positions[own.to(positions.device)], positions.max()[None]])[None],
        }
        if self._keeps:
            given["logits_to_keep"] = torch.as_tensor(self._own_kept, device=tokens.values.device)
        return given

    def extend(self, store: DistributedKVCache, rows: Sequence[int]) -> None:
        """See Pass."""
        for row, layout in self._layouts.items():
            self._extensions[row] = store.extend([rows[row]], layout)

    def attend(self, call: LayerCall, store: DistributedKVCache, layer: int) -> Tensor:
        """See Pass."""
        out = call.q.new_zeros(*call.q.shape[:3], call.v.shape[3])
        # Models that count their own rows count columns, padding included.
        columns = self._past + np.append(self._own % self._tokens.width, 0)
        q = rescale_queries(call.module, call.q, columns, first_position=self._past)
        mask, start = call.pattern.to_mask(None), 0
        for row, layout in self._layouts.items():
            here = slice(start, start + layout.num_tokens(self._team.rank))
            out[:, here] = prefill_attention(
                q[:, here], call.k[:, here], call.v[:, here], store, layer, self._extensions[row],
                mask=mask, **call.score.options(),
            )  # fmt: skip
            start = here.stop
        return out

    def logits(self, local: Tensor) -> Tensor:
        """See Pass."""
        rows = local[0] if self._keeps else local[0, torch.as_tensor(self._own_kept, device=local.device)]
        if self._team.size > 1:
            rows = all_gather_mesh_rows(rows.contiguous(), self._counts, self._team)
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        return rows[torch.as_tensor(self._found, device=rows.device)]
