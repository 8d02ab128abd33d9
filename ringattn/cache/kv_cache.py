"""The keys and values of many sequences, in pages, distributed over the ranks of a group."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ringattn.cache.call_marks import mark_check_on
from ringattn.cache.pages import PagePools, SlotAllocation
from ringattn.cache.prefix_cache import PrefixIndex, PrefixMatch
from ringattn.comm.agreement import agree
from ringattn.comm.collectives import PersistentCollective
from ringattn.comm.topology import RankMesh, rank_mesh, resolve_group
from ringattn.errors import ArgumentError, ArgumentTypeError, check_integer
from ringattn.geometry.layout import Layout, check_layout
from ringattn.kernels.paged import PageTables
from ringattn.types import Group

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CacheSpec:
    """The shapes and dtype of the keys and values; the same on every rank, and fixed for the life of a cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    page_size: int
    dtype: torch.dtype

    def check(self) -> None:
        """Raises ArgumentError if a value is not allowed."""
        for name in ("num_layers", "num_kv_heads", "head_dim", "v_head_dim", "page_size"):
            check_integer(name, getattr(self, name), 1)
        if self.dtype not in _DTYPES:
            raise ArgumentError(f"dtype={self.dtype}: must be one of {', '.join(map(str, _DTYPES))}")

    def pool_shapes(self, num_pages: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the shapes of a pool of keys and of a pool of values: (pages, H_kv, page_size, D) and (..., Dv)."""
        first = (num_pages, self.num_kv_heads, self.page_size)
        return (*first, self.head_dim), (*first, self.v_head_dim)


class DistributedKVCache:
    """The keys and values of many sequences and layers; each token is stored on one rank.

    Every rank makes the same calls in the same order. Each rank then decides alike, without communication, which rank
    stores which token, and whether there is room. The ranks' calls are compared when the cache is made, when tokens are
    added by a layout, and in every attention. On CUDA, attention does not wait for the host: a disagreement that it
    finds is raised once, as DisagreementError, by the next call that changes or saves the cache, before it changes
    anything. That call waits for the device.

    Pools are allocated once and not initialised: on a CPU, memory is committed as pages are first written, lowest page
    first.

    Args:
        num_layers: layers of the model.
        num_kv_heads: heads of the keys and values.
        head_dim: dim of a key.
        v_head_dim: dim of a value; None is head_dim.
        num_pages: pages per rank.
        page_size: tokens per page.
        dtype: of the keys and values: float64, float32, bfloat16 or float16.
        device: of the keys and values.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the default group.
    Raises:
        ArgumentError: if an argument is not allowed; on every rank.
        DisagreementError: if the arguments of the ranks differ; on every rank.
    Communication: one all-gather of a few hundred bytes, when the cache is made.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        num_pages: int,
        page_size: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        group: Group = None,
    ) -> None:
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        spec = CacheSpec(num_layers, num_kv_heads, head_dim, v_head_dim, page_size, dtype)
        mesh = rank_mesh(resolve_group(group))

        def prepare() -> tuple[Mapping[str, str], PagePools]:
            spec.check()
            return {"the cache": f"{spec}, num_pages={num_pages}"}, PagePools(mesh.size, num_pages, page_size)

        pages = agree(mesh, None, prepare)
        self._set_up(spec, pages, mesh, torch.device(device))

    @classmethod
    def from_pages(cls, spec: CacheSpec, pages: PagePools, mesh: RankMesh, device: torch.device) -> DistributedKVCache:
        """Returns a cache with these page tables, whose keys and values are still to be written."""
        cache = cls.__new__(cls)
        cache._set_up(spec, pages, mesh, device)
        return cache

    def _set_up(self, spec: CacheSpec, pages: PagePools, mesh: RankMesh, device: torch.device) -> None:
        self.spec, self.pages, self.mesh, self.device = spec, pages, mesh, device
        self.mark_check = mark_check_on(device)
        self._prefixes = PrefixIndex(spec.page_size)
        # Values for the last extension, and the last collective: the layers of a step share them.
        self._page_tables: tuple[SlotAllocation, PageTables] | None = None
        self._layout: tuple[SlotAllocation, Layout] | None = None
        self._local_slots: tuple[SlotAllocation, tuple[Tensor, ...]] | None = None
        self._collective: tuple[Hashable, PersistentCollective] | None = None
        shapes = spec.pool_shapes(pages.num_pages)
        self._layers = [
            tuple(torch.empty(shape, dtype=spec.dtype, device=device) for shape in shapes)
            for _ in range(spec.num_layers)
        ]

    @property
    def sequences(self) -> tuple[int, ...]:
        """All sequences in the cache."""
        return self.pages.sequences

    @property
    def num_free_pages(self) -> tuple[int, ...]:
        """The number of free pages of each rank."""
        return tuple(self.pages.num_free(rank) for rank in range(self.mesh.size))

    def length(self, sequence: int) -> int:
        """Returns the position of the next token of a sequence: its tokens so far, evicted tokens included."""
        return self.pages.length(sequence)

    def new(self) -> int:
        """Returns a new sequence without tokens."""
        return self.pages.new()

    def extend(self, sequences: Sequence[int], tokens: int | Layout = 1) -> SlotAllocation:
        """Allocates slots for new tokens of each sequence: for all tokens, or for none.

        Args:
            sequences: the sequences, each once.
            tokens: for decoding, the number of new tokens of each sequence. Every rank computes all of them, and each
                page of tokens is stored on the rank with the fewest tokens of the sequence. For a prefill, a layout
                of the new tokens alone; each token is stored on the rank that computes it.
        Returns:
            The argument `extension` of `decode_attention`, `prefill_attention` and `write`; valid until one of the
            sequences changes again.
        Raises:
            OutOfPagesError: if there are too few free pages; nothing has changed then.
            SequenceError: if the cache has no such sequence.
            LayoutError: if the layout is for another number of ranks.
            DisagreementError: with a layout, if the ranks' calls differ, this one or earlier ones. With a number, the
                next attention raises it; on CUDA, the next call that changes the cache.
        Communication: none for a number; one all-gather of a few hundred bytes for a layout.
        """
        self.mark_check.raise_pending()
        if isinstance(tokens, Layout):
            self._compare_ranks(f"extend {list(sequences)}", check_layout(tokens, "tokens", self.mesh.size))
        extension = self.pages.extend(sequences, tokens)
        for rank, source, target in extension.page_copies:
            if rank == self.mesh.rank:
                for layer in self._layers:
                    for pool in layer:
                        pool[target] = pool[source]
        return extension

    def write(self, layer: int, extension: SlotAllocation, k: Tensor, v: Tensor) -> None:
        """Writes the keys and values of new tokens; each rank writes the tokens that it stores.

        `decode_attention` and `prefill_attention` call this themselves.

        Args:
            layer: from 0.
            extension: the last extension of its sequences.
            k: keys of the tokens that this rank computes, (sequences, tokens, H_kv, D), in the cache's dtype.
            v: their values, (sequences, tokens, H_kv, Dv).
        Raises:
            ArgumentError: if an argument does not fit; nothing is written then.
        Communication: none.
        """
        self.check_extension(layer, extension)
        self.check_new_rows("k", k, extension, self.spec.head_dim)
        self.check_new_rows("v", v, extension, self.spec.v_head_dim)
        rows, pages, slots = self._slots_of(extension)
        if not len(rows):
            return
        for pool, x in zip(self._layers[layer], (k, v), strict=True):
            pool[pages, :, slots] = x.detach().flatten(0, 1)[rows]

    def read(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """Returns copies of this rank's keys and values of a sequence, in order of position.

        Returns:
            (k, v): (1, tokens, H_kv, D) and (1, tokens, H_kv, Dv).
        """
        _, slot_indices = self.pages.table(sequence, self.mesh.rank).stored_tokens()
        slots, size = torch.as_tensor(slot_indices, device=self.device), self.spec.page_size
        k, v = (pool[slots // size, slots % size][None] for pool in self.pools(layer))
        return k, v

    def fork(self, sequence: int) -> int:
        """Returns a new sequence with the same tokens. Both share pages; a page is copied before one writes to it."""
        self.mark_check.raise_pending()
        return self.pages.fork(sequence)

    def truncate(self, sequence: int, length: int) -> None:
        """Removes the tokens of a sequence from position `length` on, such as rejected speculative tokens.

        Raises:
            SequenceError: if the sequence is shorter, or not in the cache.
        """
        self.mark_check.raise_pending()
        self.pages.truncate(sequence, length)
        self._prefixes.truncate(sequence, length)

    def evict(self, sequence: int, *, sinks: int, window: int) -> None:
        """Removes all but the first `sinks` and the last `window` tokens of a sequence; these keep their positions.

        Source: Xiao et al. 2023, arXiv:2309.17453.
        """
        self.mark_check.raise_pending()
        evicts = self.length(sequence) - window > sinks
        self.pages.evict(sequence, sinks, window)
        if evicts:
            self._prefixes.truncate(sequence, sinks)

    def free(self, sequence: int) -> None:
        """Removes a sequence. Pages that no other sequence shares become free."""
        self.mark_check.raise_pending()
        self.pages.free(sequence)
        self._prefixes.truncate(sequence, 0)

    def cache_prefix(self, sequence: int, tokens: Sequence[int]) -> None:
        """Lets `match_prefix` find this sequence by its first tokens, for as long as it is in the cache.

        Args:
            sequence: a sequence from which nothing was evicted.
            tokens: the token ids of the sequence, from the first on; the same on every rank.
        Raises:
            ArgumentError: if there are more tokens than the sequence has, or some tokens of it were evicted.
        """
        self.mark_check.raise_pending()
        length = self.length(sequence)
        stored = sum(self.pages.table(sequence, rank).num_tokens for rank in range(self.mesh.size))
        if len(tokens) > length or stored < length:
            raise ArgumentError(
                f"tokens: {len(tokens)} of them, but sequence {sequence} stores {stored} of {length}: it must store all"
            )
        self._prefixes.insert(sequence, tokens)

    def match_prefix(self, tokens: Sequence[int]) -> PrefixMatch:
        """Returns a new sequence that shares the longest cached prefix of `tokens`.

        Args:
            tokens: the token ids of the new sequence; the same on every rank.
        Returns:
            (sequence, num_tokens): the sequence holds the first num_tokens tokens, which are whole pages, and fewer
            than len(tokens), because a model needs at least one new token to go on from. 0 if nothing matches.
        """
        self.mark_check.raise_pending()
        match = self._prefixes.longest_match(tokens[: max(len(tokens) - 1, 0)])
        if match is None:
            return PrefixMatch(self.new(), 0)
        sequence = self.fork(match.sequence)
        self.pages.truncate(sequence, match.num_tokens)
        return PrefixMatch(sequence, match.num_tokens)

    def add_to_history(self, text: str) -> None:
        """Adds a text, such as a digest of the token ids, to what all ranks must have in common.

        It is compared together with the earlier calls: in `check_agreement`, in `extend` by a layout, and in every
        `decode_attention`.
        """
        self.pages.add_to_history(text)

    def check_agreement(self) -> None:
        """Compares the calls that the ranks have made on the cache so far.

        Raises:
            DisagreementError: if they differ; on every rank.
        Communication: one all-gather of a few hundred bytes.
        """
        self.mark_check.raise_pending()
        self._compare_ranks("check_agreement", None)

    def pools(self, layer: int) -> tuple[Tensor, Tensor]:
        """Returns views of this rank's keys and values of a layer: (pages, page_size, H_kv, D) and (..., Dv)."""
        k, v = self._layers[layer]
        return k.transpose(1, 2), v.transpose(1, 2)

    def storage(self, layer: int) -> tuple[Tensor, Tensor]:
        """Returns the same pools in memory order: (pages, H_kv, page_size, D) and (..., Dv)."""
        k, v = self._layers[layer]
        return k, v

    def page_tables(self, extension: SlotAllocation) -> PageTables:
        """Returns this rank's page tables of the sequences of an extension, as tensors; all layers share them."""
        if self._page_tables is None or self._page_tables[0] is not extension:
            tables = [self.pages.table(sequence, self.mesh.rank) for sequence in extension.sequences]
            pages = np.concatenate([np.array(table.pages, dtype=np.int32) for table in tables])
            positions = np.concatenate([table.positions for table in tables])
            starts = np.cumsum([0, *(len(table.pages) for table in tables)], dtype=np.int32)
            tensors = PageTables(*(torch.from_numpy(x).to(self.device) for x in (pages, positions, starts)))
            self._page_tables = extension, tensors
        return self._page_tables[1]

    def _slots_of(self, extension: SlotAllocation) -> tuple[Tensor, ...]:
        """Returns (rows, pages, slots): the new rows that this rank stores, and where; all layers share them."""
        if self._local_slots is None or self._local_slots[0] is not extension:
            rank, size = self.mesh.rank, self.spec.page_size
            slot_indices = extension.slot_indices[rank]
            arrays = (extension.rows[rank], slot_indices // size, slot_indices % size)
            self._local_slots = extension, tuple(torch.as_tensor(x, device=self.device) for x in arrays)
        return self._local_slots[1]

    def collective(self, key: Hashable, create: Callable[[], PersistentCollective]) -> PersistentCollective:
        """Returns the last collective if it was created under this key, or creates one.

        All layers and all steps of equal shapes share it.
        """
        if self._collective is None or self._collective[0] != key:
            self._collective = key, create()
        return self._collective[1]

    def key_layout(self, extension: SlotAllocation) -> Layout:
        """Returns which rank stores which keys of the one sequence of an extension; all layers share the layout."""
        if self._layout is None or self._layout[0] is not extension:
            self._layout = extension, self.pages.layout(extension.sequences[0])
        return self._layout[1]

    def check_extension(self, layer: int, extension: SlotAllocation) -> None:
        """Raises ArgumentError unless the layer exists and the extension is the last one of its sequences."""
        if check_integer("layer", layer, 0) >= self.spec.num_layers:
            raise ArgumentError(f"layer={layer}: the cache has layers 0 to {self.spec.num_layers - 1}")
        if not isinstance(extension, SlotAllocation):
            raise ArgumentTypeError(f"extension={extension!r:.100}: must be a result of cache.extend")
        if not self.pages.is_current(extension):
            raise ArgumentError(
                f"extension of sequences {list(extension.sequences)}: they have changed since; use the result of the "
                "last cache.extend"
            )

    def check_new_rows(self, name: str, x: Tensor, extension: SlotAllocation, dim: int) -> None:
        """Raises ArgumentError unless `x` has one key or value for each new token that this rank computes."""
        layout = extension.layout
        tokens = extension.num_tokens if layout is None else layout.num_tokens(self.mesh.rank)
        expected = (len(extension.sequences), tokens, self.spec.num_kv_heads, dim)
        if not isinstance(x, Tensor) or tuple(x.shape) != expected:
            raise ArgumentError(f"{name} has shape {tuple(getattr(x, 'shape', ()))}: must be {expected}")
        if x.dtype != self.spec.dtype or x.device.type != self.device.type:
            raise ArgumentError(f"{name} is {x.dtype} on {x.device}: the cache is {self.spec.dtype} on {self.device}")

    def _compare_ranks(self, call: str, layout: Layout | None) -> None:
        fingerprint = {
            "this call on the cache": call if layout is None else f"{call} by {layout} #{layout.digest}",
            "the earlier calls on the cache": f"#{self.pages.history_digest:x}",
        }
        agree(self.mesh, None, lambda: (fingerprint, None))
