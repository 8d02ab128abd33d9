"""Plans of a forward pass on a cache: which rank computes which of the new tokens.

Every rank gets the same new tokens. `ReplicatedForward` is for few of them: every rank computes all new tokens, attends
to the part of the cache that it holds, and the results are merged. `ShardedForward` is for many: a layout shards the
new tokens of each row over the ranks.
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
    """One forward pass over the new tokens of a batch."""

    @property
    def computed_rows(self) -> tuple[int, ...]:
        """For each row, the row that is computed in its place: the first one with the same tokens, or itself."""
        ...

    def model_inputs(self) -> dict[str, Any]:
        """Returns the tokens and positions that this rank's model gets, as keyword arguments."""
        ...

    def extend(self, store: DistributedKVCache, sequences: Sequence[int]) -> None:
        """Allocates slots in the store for the new tokens of the computed rows.

        Args:
            store: the keys and values.
            sequences: the sequence of each row.
        """
        ...

    def attend(self, call: LayerCall, store: DistributedKVCache, layer: int) -> Tensor:
        """Returns the attention output (B, rows, heads, v_dim) of the tokens that this rank computes."""
        ...

    def gather_logits(self, local_logits: Tensor) -> Tensor:
        """Returns the logits of the logit columns, (B, columns, vocabulary), bitwise equal on every rank."""
        ...


class ReplicatedForward:
    """Every rank computes all new tokens. No row may have padding among them.

    Args:
        inputs: the new tokens.
    """

    def __init__(self, inputs: GenerationInputs) -> None:
        self._inputs = inputs
        self.computed_rows = tuple(range(inputs.num_rows))
        self._slots: SlotAllocation | None = None

    def model_inputs(self) -> dict[str, Any]:
        return {self._inputs.name: self._inputs.values, "position_ids": self._inputs.position_ids}

    def extend(self, store: DistributedKVCache, sequences: Sequence[int]) -> None:
        self._slots = store.extend(sequences, self._inputs.num_columns)

    def attend(self, call: LayerCall, store: DistributedKVCache, layer: int) -> Tensor:
        assert self._slots is not None
        return decode_attention(
            call.q, call.k, call.v, store, layer, self._slots, mask=call.pattern.to_mask(None), **call.score.options()
        )

    def gather_logits(self, local_logits: Tensor) -> Tensor:
        return local_logits


class ShardedForward:
    """Each rank computes its part of every row. The parts are concatenated to one packed batch row without padding.

    One token that nobody attends to is appended, at the largest position of the batch: many models fail on empty
    inputs, and the frequencies of dynamic rotary embeddings depend on the largest position.

    Tokens are numbered row * num_columns + column in the batch.

    Args:
        inputs: the new tokens.
        num_past_columns: columns of the batch in the cache.
        computed_rows: for each row, the row that is computed in its place.
        make_layout: returns the layout of a number of tokens.
        rank_mesh: the ranks.
        takes_logits_to_keep: whether the model's forward has the argument `logits_to_keep`.
    """

    def __init__(
        self,
        inputs: GenerationInputs,
        num_past_columns: int,
        computed_rows: tuple[int, ...],
        make_layout: Callable[[int], Layout],
        rank_mesh: RankMesh,
        *,
        takes_logits_to_keep: bool,
    ) -> None:
        self._inputs, self._num_past_columns, self._rank_mesh = inputs, num_past_columns, rank_mesh
        self._takes_logits_to_keep = takes_logits_to_keep
        self.computed_rows = computed_rows
        num_tokens = inputs.num_tokens
        self._layouts = {row: make_layout(num_tokens[row]) for row in sorted(set(computed_rows)) if num_tokens[row]}
        self._slots: dict[int, SlotAllocation] = {}
        needs_logits = np.zeros(inputs.num_columns, dtype=bool)
        needs_logits[inputs.logit_columns] = True
        tokens_by_rank = [self._tokens_of_rank(rank) for rank in range(rank_mesh.size)]
        logit_tokens = [tokens[needs_logits[tokens % inputs.num_columns]] for tokens in tokens_by_rank]
        self._num_logits_by_rank = [len(tokens) for tokens in logit_tokens]
        self._local_tokens = tokens_by_rank[rank_mesh.rank]
        self._local_logit_rows = np.flatnonzero(needs_logits[self._local_tokens % inputs.num_columns])
        self._logit_index = self._index_logits(np.concatenate(logit_tokens))

    def _tokens_of_rank(self, rank: int) -> Ints:
        """Returns the numbers of the tokens that a rank computes, in its order."""
        num_columns, left_padding = self._inputs.num_columns, self._inputs.left_padding
        tokens = [
            row * num_columns + left_padding[row] + layout.positions(rank) for row, layout in self._layouts.items()
        ]
        return np.concatenate([np.empty(0, dtype=np.int64), *tokens])

    def _index_logits(self, logit_tokens: Ints) -> Ints:
        """Returns for each row and logit column, (B, columns), the index of its token in `logit_tokens`.

        Padding has the index len(logit_tokens).
        """
        inputs = self._inputs
        index = np.full(inputs.num_rows * inputs.num_columns, len(logit_tokens), dtype=np.int64)
        index[logit_tokens] = np.arange(len(logit_tokens))
        by_row: Ints = index.reshape(inputs.num_rows, inputs.num_columns)[list(self.computed_rows)]
        return by_row[:, inputs.logit_columns]

    def model_inputs(self) -> dict[str, Any]:
        inputs = self._inputs
        tokens = torch.as_tensor(self._local_tokens, device=inputs.values.device)
        values, positions = inputs.values.flatten(0, 1), inputs.position_ids.flatten()
        local_inputs: dict[str, Any] = {
            inputs.name: torch.cat([values[tokens], values[-1:]])[None],
            "position_ids": torch.cat([positions[tokens.to(positions.device)], positions.max()[None]])[None],
        }
        if self._takes_logits_to_keep:
            local_inputs["logits_to_keep"] = torch.as_tensor(self._local_logit_rows, device=inputs.values.device)
        return local_inputs

    def extend(self, store: DistributedKVCache, sequences: Sequence[int]) -> None:
        for row, layout in self._layouts.items():
            self._slots[row] = store.extend([sequences[row]], layout)

    def attend(self, call: LayerCall, store: DistributedKVCache, layer: int) -> Tensor:
        out = call.q.new_zeros(*call.q.shape[:3], call.v.shape[3])
        # Models that derive positions from the number of rows count columns, padding included.
        columns = self._num_past_columns + np.append(self._local_tokens % self._inputs.num_columns, 0)
        q = rescale_queries(call.module, call.q, columns, first_position=self._num_past_columns)
        mask, start = call.pattern.to_mask(None), 0
        for row, layout in self._layouts.items():
            tokens = slice(start, start + layout.num_tokens(self._rank_mesh.rank))
            out[:, tokens] = prefill_attention(
                q[:, tokens], call.k[:, tokens], call.v[:, tokens], store, layer, self._slots[row],
                mask=mask, **call.score.options(),
            )  # fmt: skip
            start = tokens.stop
        return out

    def gather_logits(self, local_logits: Tensor) -> Tensor:
        logits = local_logits[0]
        if not self._takes_logits_to_keep:
            logits = logits[torch.as_tensor(self._local_logit_rows, device=logits.device)]
        if self._rank_mesh.size > 1:
            logits = all_gather_mesh_rows(logits.contiguous(), self._num_logits_by_rank, self._rank_mesh)
        logits = torch.cat([logits, logits.new_zeros(1, logits.shape[1])])  # of padding
        return logits[torch.as_tensor(self._logit_index, device=logits.device)]
