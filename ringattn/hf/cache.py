"""A cache for `generate` of transformers whose keys and values are spread over the ranks of a patched model's group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

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
from ringattn.hf.model_support import unwrap_model

if TYPE_CHECKING:
    from ringattn.hf.handle import Handle


@dataclass
class _Step:
    """A forward pass under way.

    Args:
        work: who computes what.
        tokens: the new ones.
        past: what was held before.
        rows: the sequence of each row, once the new tokens have their places.
        lengths: how long the rows were before.
        layer: which has come with its keys and values, and will ask for its attention.
    """

    work: ForwardPlan
    tokens: GenerationInputs
    past: PastTokens
    rows: tuple[int, ...] | None = None
    lengths: tuple[int, ...] = ()
    layer: int | None = None


class RingCache(Cache):
    """What `model.generate(ids, past_key_values=cache)` keeps of a batch, each token of it on one rank.

    Every rank calls `generate`, with the same ids and options, and with the same seed if it draws. A prompt of
    `shard_from` tokens or more is dealt out to the ranks by the handle's layout. Fewer new tokens are computed by every
    rank, and what the ranks find in their parts of the cache is merged. Logits are the same to the bit on all ranks.
    Padding is not stored; rows of the same ids, as beams are, are computed once and share their pages.

    Pages are allocated in the first forward pass, when the heads are known.

    Args:
        handle: what `patch` returned for the model.
        num_pages: pages of each rank.
        page_size: tokens of a page.
        shard_from: as many new tokens in a row, or more, are dealt out to the ranks; 1 or more.
    Raises:
        ArgumentError: when an argument is not allowed, or the model cannot generate from such a cache.
    Communication: that of `prefill_attention` and `decode_attention` in each layer; after a prefill, the logits that
        were asked for, from their rank to each other one.
    """

    def __init__(self, handle: Handle, *, num_pages: int, page_size: int = 16, shard_from: int = 64) -> None:
        super().__init__(layers=[])
        for name, value in (("num_pages", num_pages), ("page_size", page_size), ("shard_from", shard_from)):
            check_integer(name, value, 1)
        self._num_layers = _num_layers(handle)
        self._handle, self._num_pages, self._page_size, self._shard_from = handle, num_pages, page_size, shard_from
        self._group = resolve_group(handle.group)
        self._store: DistributedKVCache | None = None
        self._rows: tuple[int, ...] = ()  # the sequence of each row of the batch
        self._pads: tuple[int, ...] = ()  # how many columns of padding each row begins with
        self._turn: _Step | None = None

    @property
    def handle(self) -> Handle:
        """Of the model that this is for."""
        return self._handle

    @property
    def store(self) -> DistributedKVCache | None:
        """Where the keys and values are; None before the first forward pass."""
        return self._store

    @property
    def past(self) -> PastTokens:
        """What it holds, as a model's forward counts it; during a pass, what it held before, in every layer."""
        if self._turn is not None:
            return self._turn.past
        if self._store is None or not self._rows:
            return PastTokens(0, ())
        return PastTokens(self._pads[0] + self._store.length(self._rows[0]), self._pads)

    # A forward pass: begin; update and attend in each layer; finish, or abandon if it failed.

    def begin(self, tokens: GenerationInputs, *, keeps: bool) -> dict[str, Any]:
        """Starts a pass over new tokens; returns what the model's forward is given on this rank.

        Args:
            tokens: the same on every rank.
            keeps: whether the forward takes `logits_to_keep`.
        """
        work: ForwardPlan
        past = self.past
        if max(tokens.counts) < self._shard_from and not any(tokens.pads):
            work = ReplicatedForward(tokens)
        else:
            same = tuple(range(tokens.num_rows)) if self._rows else tokens.same()
            work = ShardedForward(tokens, past.length, same, self._layout_of, self._handle.team, keeps=keeps)
        self._turn = _Step(work, tokens, past)
        return work.arguments()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes note of a layer that is about to attend; its keys and values are stored when it does."""
        if self._turn is None:
            raise ArgumentError(
                "past_key_values: a RingCache is for the model of its handle, while that is patched and called as a "
                "whole, as model.generate does; this call did not come from there"
            )
        self._turn.layer = layer_idx
        return key_states, value_states

    def attend(self, call: LayerCall) -> Tensor:
        """Attention of the new tokens to all that is cached of their rows; see `Context`.

        Raises:
            ArgumentError: when the layer asks for something that a cache cannot give.
            OutOfPagesError: when there is no room; on every rank. The cache is then as it was before the pass.
            DisagreementError: when the ranks were given different tokens, or have drawn different ones; on every rank.
        """
        name, turn = type(call.module).__name__, self._turn
        if turn is None or turn.layer is None:
            raise ArgumentError(
                f"{name} attends to keys that it has not given to the cache: layers that share those of others, and "
                "cross-attention, have no place in a RingCache"
            )
        if call.pattern.right != 0:
            raise ArgumentError(f"{name} sees tokens after its own: such attention cannot go on from a cache")
        if torch.is_grad_enabled() and call.q.requires_grad:
            raise ArgumentError("a forward pass on a RingCache has no gradients: call the model under torch.no_grad()")
        try:
            store = self._extended(turn, call)
            layer, turn.layer = turn.layer, None
            return turn.work.attend(call, store, layer)
        except DisagreementError as error:
            raise DisagreementError(
                f"{error}. Every rank must call generate with the same ids and options and, if tokens are drawn, after "
                "the same torch.manual_seed; go on with cache.reset()"
            ) from error

    def finish(self, logits: Tensor) -> Tensor:
        """Ends a pass; returns the logits that were asked for, (B, columns, V), the same to the bit on every rank."""
        turn, store = self._turn, self._store
        assert turn is not None
        assert turn.rows is not None
        assert store is not None
        found = turn.work.logits(logits)
        first = turn.work.same
        rows = [row if first[i] == i else store.fork(row) for i, row in enumerate(turn.rows)]
        pads = self._pads or (0,) * len(rows)
        self._pads = tuple(old + new for old, new in zip(pads, turn.tokens.pads, strict=True))
        self._rows, self._turn = tuple(rows), None
        return found

    def abandon(self) -> None:
        """Takes back a pass that failed; does nothing if none is under way."""
        turn, store, self._turn = self._turn, self._store, None
        if turn is None or turn.rows is None or store is None:
            return
        for row in dict.fromkeys(turn.rows):
            if row in self._rows:
                store.truncate(row, turn.lengths[self._rows.index(row)])
            else:
                store.free(row)

    def _layout_of(self, num_tokens: int) -> Layout:
        """Who computes which of a row's new tokens; here, unlike in training, a rank may have none."""
        team = self._handle.team
        if num_tokens < team.size:
            return contiguous(num_tokens, team.size)
        return self._handle.sharding.rows(num_tokens).layout

    def _extended(self, turn: _Step, call: LayerCall) -> DistributedKVCache:
        """Returns the store, in which the new tokens have their places."""
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
        if turn.rows is None:
            store = self._store
            store.add_to_history(f"tokens {turn.tokens.digest}")
            new = {} if self._rows else {first: store.new() for first in sorted(set(turn.work.same))}
            turn.rows = self._rows or tuple(new[first] for first in turn.work.same)
            turn.lengths = tuple(map(store.length, self._rows))
            turn.work.extend(store, turn.rows)
        return self._store

    # What generate asks.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns how many columns the batch has so far, padding included."""
        return self.past.length

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """Returns (columns with the new ones, 0); no mask of that size is ever made."""
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.past.length + new, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Returns -1: how much there is room for depends on how rows share pages."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Returns -1; the name of `get_max_length` in older versions."""
        return -1

    @property
    def batch_size(self) -> int:
        """How many rows there are; -1 before the first forward pass."""
        return len(self._rows) or -1

    @property
    def is_compileable(self) -> bool:
        """False: shapes and page tables change with every token."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether it holds anything."""
        return bool(self._rows)

    def __len__(self) -> int:
        return self._num_layers

    def __repr__(self) -> str:
        past = self.past
        return f"RingCache({len(past.pads)} rows of {past.length} columns, {self._num_layers} layers)"

    # Changing what is held.

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last columns: -n of them if it is negative; all after the first n if it is positive, as in older
        versions. Speculated tokens that were refused are forgotten like this.
        """
        past = self.past
        kept = tokens_to_remove if tokens_to_remove > 0 else past.length + tokens_to_remove
        if kept < 0:
            raise ArgumentError(f"tokens_to_remove={tokens_to_remove}: the cache has only {past.length} columns")
        if self._store is None or kept >= past.length:
            return
        for row, pad in zip(self._rows, past.pads, strict=True):
            self._store.truncate(row, max(kept - pad, 0))
        self._pads = tuple(min(pad, kept) for pad in past.pads)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Takes these rows in place of those that there are; what is taken several times shares its pages."""
        if self._rows:
            self._select(torch.arange(len(self._rows))[indices.cpu()].tolist())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes these rows, one for each beam; see `batch_select_indices`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Takes each row so many times, one after the other; they share their pages."""
        self._select([row for row in range(len(self._rows)) for _ in range(repeats)])

    def fork(self) -> RingCache:
        """Returns a cache of the same tokens, to go on from twice. They share pages; one that is written to is copied.

        Call `reset` on it when it is no longer needed, on every rank: its pages are in use until then.
        """
        made = RingCache(
            self._handle, num_pages=self._num_pages, page_size=self._page_size, shard_from=self._shard_from
        )
        if self._store is not None:
            made._store, made._rows, made._pads = self._store, tuple(map(self._store.fork, self._rows)), self._pads
        return made

    def __deepcopy__(self, memo: dict[int, object]) -> RingCache:
        return self.fork()

    def reset(self) -> None:
        """Forgets everything. Pages are free again, and so is the memory, if no fork uses it."""
        if self._store is not None:
            for row in self._rows:
                self._store.free(row)
            if not self._store.sequences:
                self._store = None
        self._rows, self._pads, self._turn = (), (), None

    def _select(self, chosen: Sequence[int]) -> None:
        """Rows are handed on as they are the first time, and forked after that."""
        if self._store is None:
            return
        taken: set[int] = set()
        rows = []
        for index in chosen:
            row = self._rows[index]
            rows.append(self._store.fork(row) if row in taken else row)
            taken.add(row)
        for row in self._rows:
            if row not in taken:
                self._store.free(row)
        self._rows, self._pads = tuple(rows), tuple(self._pads[index] for index in chosen)

    # To files and back.

    def save(self, folder: str | Path) -> None:
        """Writes the cache into a folder that all ranks reach. All of them call it together; see `save_cache`.

        Raises:
            ArgumentError: when it is empty. SnapshotError: when files cannot be written. On every rank.
        """
        if self._store is None or not self._rows:
            raise ArgumentError("the cache is empty: there is nothing to be saved")
        save_rows(self._store, self._rows, self._pads, folder)

    @classmethod
    def load(cls, handle: Handle, folder: str | Path, *, num_pages: int, shard_from: int = 64) -> RingCache:
        """Returns a cache as it was saved, over the ranks of a handle's group, however many they are.

        All of them call it together.

        Args:
            handle: what `patch` returned for the model.
            folder: where `save` wrote it.
            num_pages, shard_from: as for a new one.
        Raises:
            SnapshotError: when it is not there, not whole, or of another model; OutOfPagesError when it does not fit.
                On every rank.
        """
        made = cls(handle, num_pages=num_pages, shard_from=shard_from)
        device = next(handle.model.parameters()).device
        made._store, made._rows, made._pads = load_rows(
            folder, num_layers=made._num_layers, num_pages=num_pages, device=device, group=made._group
        )
        made._page_size = made._store.spec.page_size
        return made

    # What layers that do not attend would keep.

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> NoReturn:
        """Raises ArgumentError."""
        self._refuse_state(layer_idx)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> NoReturn:
        """Raises ArgumentError."""
        self._refuse_state(layer_idx)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> NoReturn:
        """Raises ArgumentError."""
        self._refuse_state(layer_idx)

    def _refuse_state(self, layer: int) -> NoReturn:
        raise ArgumentError(f"layer {layer} keeps more than keys and values: a RingCache has no place for it")


def _num_layers(handle: Handle) -> int:
    """Returns how many layers of a handle's model attend to a cache.

    Raises:
        ArgumentError: when it cannot generate from a RingCache.
    """
    model = unwrap_model(handle.model)
    config, name = model.config, type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ArgumentError(f"{name} has an encoder: a RingCache is for models that are decoders alone")
    found = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if not isinstance(found, int) or found < 1:
        raise ArgumentError(f"{name}: its config does not tell num_hidden_layers, so nobody knows what to cache")
    return found
