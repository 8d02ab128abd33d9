"""RingCache: the KV cache of transformers' `generate`, distributed over the ranks of a patched model's group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache

from ringattn.cache.kv_cache import DistributedKVCache
from ringattn.comm.topology import resolve_group
from ringattn.errors import ArgumentError, DisagreementError, check_integer
from ringattn.geometry.layout import Layout, contiguous
from ringattn.hf.attention_call import LayerCall
from ringattn.hf.cache_io import load_rows, save_rows
from ringattn.hf.forward_plan import ForwardPlan, ReplicatedForward, ShardedForward
from ringattn.hf.generation_inputs import GenerationInputs, PastTokens
from ringattn.hf.handle import Handle
from ringattn.hf.model_support import num_decoder_layers, unwrap_model


@dataclass
class _Step:
    """A forward pass in progress.

    Args:
        plan: which rank computes which tokens.
        inputs: the new tokens.
        past: what the cache held before.
        sequences: the sequence of each row; None until the slots of the new tokens are allocated.
        lengths: tokens of each row before.
        layer: the layer whose `update` was called last, and whose `attend` comes next; else None.
    """

    plan: ForwardPlan
    inputs: GenerationInputs
    past: PastTokens
    sequences: tuple[int, ...] | None = None
    lengths: tuple[int, ...] = ()
    layer: int | None = None


class RingCache(Cache):
    """The KV cache of `model.generate(ids, past_key_values=cache)`; each token's keys and values are on one rank.

    Every rank calls `generate` with the same ids and options and, when sampling, with the same seed. A prompt of
    `shard_from` or more tokens is sharded by the handle's layout. Fewer new tokens are computed by every rank, and the
    partial attention over each rank's part of the cache is merged. Logits are bitwise equal on all ranks. Padding is
    not stored. Rows with the same ids, such as beams, are computed once and share their pages.

    Pages are allocated in the first forward pass, when the number of heads is known.

    Args:
        handle: what `patch` returned for the model.
        num_pages: pages of each rank.
        page_size: tokens per page.
        shard_from: smallest number of new tokens in a row that is sharded; 1 or more.
    Raises:
        ArgumentError: when an argument is out of range, or the model cannot generate from a RingCache.
    Communication: as `prefill_attention` or `decode_attention` in each layer; after a prefill, each rank also
        sends the logits that it computed to all others.
    """

    def __init__(self, handle: Handle, *, num_pages: int, page_size: int = 16, shard_from: int = 64) -> None:
        super().__init__(layers=[])
        for name, value in (("num_pages", num_pages), ("page_size", page_size), ("shard_from", shard_from)):
            check_integer(name, value, 1)
        self._num_layers = num_decoder_layers(unwrap_model(handle.model))
        self._handle, self._num_pages, self._page_size, self._shard_from = handle, num_pages, page_size, shard_from
        self._group = resolve_group(handle.group)
        self._store: DistributedKVCache | None = None
        self._sequences: tuple[int, ...] = ()  # the sequence of each batch row
        self._left_padding: tuple[int, ...] = ()  # columns of padding at the start of each batch row
        self._step: _Step | None = None

    @property
    def handle(self) -> Handle:
        """The handle of the model."""
        return self._handle

    @property
    def store(self) -> DistributedKVCache | None:
        """The keys and values; None before the first forward pass."""
        return self._store

    @property
    def past(self) -> PastTokens:
        """The tokens in the cache; during a forward pass, those before it."""
        if self._step is not None:
            return self._step.past
        if self._store is None or not self._sequences:
            return PastTokens(0, ())
        return PastTokens(self._left_padding[0] + self._store.length(self._sequences[0]), self._left_padding)

    # One forward pass: begin_forward; update and attend in each layer; finish_forward, or abort_forward if it failed.

    def begin_forward(self, inputs: GenerationInputs, *, takes_logits_to_keep: bool) -> dict[str, Any]:
        """Begins a forward pass; returns the tokens and positions that this rank's model gets, as arguments.

        Args:
            inputs: the new tokens, equal on every rank.
            takes_logits_to_keep: whether the model's forward has the argument `logits_to_keep`.
        """
        plan: ForwardPlan
        past = self.past
        if max(inputs.num_tokens) < self._shard_from and not any(inputs.left_padding):
            plan = ReplicatedForward(inputs)
        else:
            computed_rows = tuple(range(inputs.num_rows)) if self._sequences else inputs.first_equal_rows()
            plan = ShardedForward(
                inputs,
                past.num_columns,
                computed_rows,
                self._make_layout,
                self._handle.rank_mesh,
                takes_logits_to_keep=takes_logits_to_keep,
            )
        self._step = _Step(plan, inputs, past)
        return plan.model_inputs()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Notes the layer, and returns its keys and values unchanged; `attend` stores them."""
        if self._step is None:
            raise ArgumentError(
                "past_key_values: a RingCache works with the model of its handle, while that is patched and called as "
                "a whole, as model.generate does; call the model, not a part of it, inside the patch"
            )
        self._step.layer = layer_idx
        return key_states, value_states

    def attend(self, call: LayerCall) -> Tensor:
        """Stores the keys and values of the new tokens, and returns their attention to all tokens of their rows.

        Raises:
            ArgumentError: when the layer needs something that a RingCache does not support.
            OutOfPagesError: when the tokens do not fit, on every rank; the cache is then as before the pass.
            DisagreementError: when the ranks have different tokens; on every rank.
        """
        layer_name, step = type(call.module).__name__, self._step
        if step is None or step.layer is None:
            raise ArgumentError(
                f"past_key_values: {layer_name} attends without storing its keys; cross-attention, and layers that "
                "share the keys of others, are not supported with a RingCache; use a cache of transformers"
            )
        if call.pattern.right != 0:
            raise ArgumentError(
                f"past_key_values: {layer_name} sees tokens after its own; only causal layers are supported with a "
                "RingCache"
            )
        if torch.is_grad_enabled() and call.q.requires_grad:
            raise ArgumentError(
                "past_key_values: a forward pass on a RingCache has no gradients; call the model under torch.no_grad()"
            )
        try:
            store = self._allocate_slots(step, call)
            layer, step.layer = step.layer, None
            return step.plan.attend(call, store, layer)
        except DisagreementError as error:
            raise DisagreementError(
                f"{error}. Every rank must call generate with the same ids and options and, when sampling, after the "
                "same torch.manual_seed; call cache.reset() and start again"
            ) from error

    def finish_forward(self, local_logits: Tensor) -> Tensor:
        """Ends a forward pass; returns the logits (B, columns, vocabulary), bitwise equal on every rank.

        Args:
            local_logits: the logits of this rank's model.
        """
        step, store = self._step, self._store
        assert step is not None
        assert step.sequences is not None
        assert store is not None
        logits = step.plan.gather_logits(local_logits)
        computed_rows = step.plan.computed_rows
        pairs = enumerate(step.sequences)
        sequences = [number if computed_rows[row] == row else store.fork(number) for row, number in pairs]
        stored = self._left_padding or (0,) * len(sequences)
        self._left_padding = tuple(old + new for old, new in zip(stored, step.inputs.left_padding, strict=True))
        self._sequences, self._step = tuple(sequences), None
        return logits

    def abort_forward(self) -> None:
        """Restores the cache to its state before a forward pass that failed; does nothing if none is in progress."""
        step, store, self._step = self._step, self._store, None
        if step is None or step.sequences is None or store is None:
            return
        for sequence in dict.fromkeys(step.sequences):
            if sequence in self._sequences:
                store.truncate(sequence, step.lengths[self._sequences.index(sequence)])
            else:
                store.free(sequence)

    def _make_layout(self, num_tokens: int) -> Layout:
        """Returns the layout of the new tokens of a row; unlike in training, a rank may have none."""
        world_size = self._handle.rank_mesh.size
        if num_tokens < world_size:
            return contiguous(num_tokens, world_size)
        return self._handle.sharder.sequence_rows(num_tokens).layout

    def _allocate_slots(self, step: _Step, call: LayerCall) -> DistributedKVCache:
        """Returns the store, with slots for the new tokens; the first layer of a pass allocates them."""
        if self._store is None:
            self._store = DistributedKVCache(
                num_layers=self._num_layers,
                num_kv_heads=call.k.shape[2],
                head_dim=call.k.shape[3],
                v_head_dim=call.v.shape[3],
                num_pages=self._num_pages,
                page_size=self._page_size,
                dtype=call.k.dtype,
                device=call.k.device,
                group=self._group,
            )
        if step.sequences is None:
            store, computed_rows = self._store, step.plan.computed_rows
            store.add_to_history(f"tokens {step.inputs.digest}")
            new = {} if self._sequences else {row: store.new() for row in sorted(set(computed_rows))}
            step.sequences = self._sequences or tuple(new[row] for row in computed_rows)
            step.lengths = tuple(map(store.length, self._sequences))
            step.plan.extend(store, step.sequences)
        return self._store

    # The interface that `generate` reads.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of columns of the batch in the cache, padding included."""
        return self.past.num_columns

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """Returns (cached plus new columns, 0). No mask tensor of that size is made."""
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.past.num_columns + new, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Returns -1: the capacity depends on how rows share pages."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Returns -1; the name of `get_max_length` in older versions."""
        return -1

    @property
    def batch_size(self) -> int:
        """Number of rows; -1 before the first forward pass."""
        return len(self._sequences) or -1

    @property
    def is_compileable(self) -> bool:
        """False: shapes and page tables change with every token."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether the cache holds tokens."""
        return bool(self._sequences)

    def __len__(self) -> int:
        return self._num_layers

    def __repr__(self) -> str:
        past = self.past
        return f"RingCache({len(past.left_padding)} rows of {past.num_columns} columns, {self._num_layers} layers)"

    # Changing the rows and tokens that the cache holds.

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last columns, for example rejected tokens of assisted decoding.

        Args:
            tokens_to_remove: -n removes the last n columns; a positive n keeps the first n, as in older versions.
        Raises:
            ArgumentError: when there are fewer columns.
        """
        past = self.past
        kept = tokens_to_remove if tokens_to_remove > 0 else past.num_columns + tokens_to_remove
        if kept < 0:
            raise ArgumentError(f"tokens_to_remove={tokens_to_remove}: the cache has only {past.num_columns} columns")
        if self._store is None or kept >= past.num_columns:
            return
        for sequence, padding in zip(self._sequences, past.left_padding, strict=True):
            self._store.truncate(sequence, max(kept - padding, 0))
        self._left_padding = tuple(min(padding, kept) for padding in past.left_padding)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Replaces the rows by a selection of them. A row may be selected several times; the copies share its pages."""
        if self._sequences:
            self._select_rows(torch.arange(len(self._sequences))[indices.cpu()].tolist())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Selects the row of each beam, as `batch_select_indices` does."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times, next to each other; the copies share its pages."""
        self._select_rows([row for row in range(len(self._sequences)) for _ in range(repeats)])

    def fork(self) -> RingCache:
        """Returns a second cache with the same tokens. Both share pages; a page is copied before a write to it.

        Call `reset` on it, on every rank, when it is no longer needed: its pages are in use until then.
        """
        fork = RingCache(
            self._handle, num_pages=self._num_pages, page_size=self._page_size, shard_from=self._shard_from
        )
        if self._store is not None:
            fork._store, fork._left_padding = self._store, self._left_padding
            fork._sequences = tuple(map(self._store.fork, self._sequences))
        return fork

    def __deepcopy__(self, memo: dict[int, object]) -> RingCache:
        return self.fork()

    def reset(self) -> None:
        """Removes all tokens and frees their pages; also frees the memory of all pages, if no fork uses them."""
        if self._store is not None:
            for sequence in self._sequences:
                self._store.free(sequence)
            if not self._store.sequences:
                self._store = None
        self._sequences, self._left_padding, self._step = (), (), None

    def _select_rows(self, indices: Sequence[int]) -> None:
        """Replaces the rows by those at `indices`; a row that is selected again is forked."""
        if self._store is None:
            return
        selected: set[int] = set()
        sequences = []
        for index in indices:
            sequence = self._sequences[index]
            sequences.append(self._store.fork(sequence) if sequence in selected else sequence)
            selected.add(sequence)
        for sequence in self._sequences:
            if sequence not in selected:
                self._store.free(sequence)
        self._sequences = tuple(sequences)
        self._left_padding = tuple(self._left_padding[index] for index in indices)

    # Saving and loading.

    def save(self, folder: str | Path) -> None:
        """Writes the cache to a folder on a file system that all ranks share; all ranks call it together.

        The folder has the format of `save_cache`, and a file with the sequence of each row.

        Raises:
            ArgumentError: when the cache is empty.
            SnapshotError: when files cannot be written; on every rank.
        """
        if self._store is None or not self._sequences:
            raise ArgumentError("the cache is empty: generate with it before it is saved")
        save_rows(self._store, self._sequences, self._left_padding, folder)

    @classmethod
    def load(cls, handle: Handle, folder: str | Path, *, num_pages: int, shard_from: int = 64) -> RingCache:
        """Returns a saved cache, over any number of ranks; all ranks of the handle's group call it together.

        Args:
            handle: what `patch` returned for the model.
            folder: where `save` wrote it.
            num_pages, shard_from: as for a new cache.
        Raises:
            SnapshotError: when the snapshot is missing or incomplete, or of another model; on every rank.
            OutOfPagesError: when the tokens do not fit into the pages; on every rank.
        """
        cache = cls(handle, num_pages=num_pages, shard_from=shard_from)
        device = next(handle.model.parameters()).device
        cache._store, cache._sequences, cache._left_padding = load_rows(
            folder, num_layers=cache._num_layers, num_pages=num_pages, device=device, group=cache._group
        )
        cache._page_size = cache._store.spec.page_size
        return cache

    # States of layers other than attention.

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> NoReturn:
        """Raises ArgumentError."""
        self._raise_stateful(layer_idx)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> NoReturn:
        """Raises ArgumentError."""
        self._raise_stateful(layer_idx)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> NoReturn:
        """Raises ArgumentError."""
        self._raise_stateful(layer_idx)

    def _raise_stateful(self, layer: int) -> NoReturn:
        raise ArgumentError(
            f"past_key_values: layer {layer} keeps a state besides keys and values, which a RingCache does not store; "
            "use a cache of transformers"
        )
