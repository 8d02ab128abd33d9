"""The keys and values of many sequences, in pages, spread over the ranks of a group."""

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
    """What keys and values look like: the same on every rank, and for as long as a cache lives."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    page_size: int
    dtype: torch.dtype

    def check(self) -> None:
        """Raises ArgumentError if something is not allowed."""
        for name in ("num_layers", "num_kv_heads", "head_dim", "v_head_dim", "page_size"):
            check_integer(name, getattr(self, name), 1)
        if self.dtype not in _DTYPES:
            raise ArgumentError(f"dtype={self.dtype}: must be one of {', '.join(map(str, _DTYPES))}")

    def shapes(self, num_pages: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the shapes of so many pages of keys, and of values: heads before slots, as kernels read them."""
        first = (num_pages, self.num_kv_heads, self.page_size)
        return (*first, self.head_dim), (*first, self.v_head_dim)


class DistributedKVCache:
    """Keys and values of many sequences and layers, each token of them on one rank.

    Every rank makes the same calls in the same order. Which rank keeps which token, and whether there is room, is
    decided on every rank alike, without communication: see pages.Pages. What the ranks were asked for is compared
    when the cache is made, when tokens are added by a layout, and in every attention to the cache. On CUDA, where
    no attention waits for the host, whatever builds on the cache's state first raises what attention has found since:
    DisagreementError, once, and before anything is changed. That waits for the device, if anything was decoded.

    Pools are allocated once, and never filled: a CPU commits memory as pages are first written, lowest first.
    Nothing is ever concatenated.

    Args:
        num_layers: layers of the model.
        num_kv_heads: heads of the keys and values.
        head_dim: dim of a key.
        v_head_dim: dim of a value; head_dim if None.
        num_pages: pages of each rank.
        page_size: tokens of a page.
        dtype: of keys and values: float64, float32, bfloat16 or float16.
        device: where they are.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the default group.
    Raises:
        ArgumentError: when an argument is not allowed; DisagreementError when the ranks' differ. On every rank.
    Communication: one all-gather of a few hundred bytes, here.
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
        form = CacheSpec(num_layers, num_kv_heads, head_dim, v_head_dim, page_size, dtype)
        team = rank_mesh(resolve_group(group))

        def prepare() -> tuple[Mapping[str, str], PagePools]:
            form.check()
            return {"the cache": f"{form}, num_pages={num_pages}"}, PagePools(team.size, num_pages, page_size)

        pages = agree(team, None, prepare)
        self._set_up(form, pages, team, torch.device(device))

    @classmethod
    def of(cls, form: CacheSpec, pages: PagePools, team: RankMesh, device: torch.device) -> DistributedKVCache:
        """Returns a cache of these tables, whose pages are still to be filled in."""
        made = cls.__new__(cls)
        made._set_up(form, pages, team, device)
        return made

    def _set_up(self, form: CacheSpec, pages: PagePools, team: RankMesh, device: torch.device) -> None:
        self.form, self.pages, self.team, self.device = form, pages, team, device
        self._prefixes = PrefixIndex(form.page_size)
        self._tables: tuple[SlotAllocation, PageTables] | None = None
        self._layout: tuple[SlotAllocation, Layout] | None = None
        self._places: tuple[SlotAllocation, tuple[Tensor, ...]] | None = None
        self.agreement = mark_check_on(device)
        self._meeting: tuple[Hashable, PersistentCollective] | None = None
        shapes = form.shapes(pages.num_pages)
        self._layers = [
            tuple(torch.empty(shape, dtype=form.dtype, device=device) for shape in shapes)
            for _ in range(form.num_layers)
        ]

    @property
    def sequences(self) -> tuple[int, ...]:
        """The sequences that there are."""
        return self.pages.sequences

    @property
    def num_free_pages(self) -> tuple[int, ...]:
        """How many pages of each rank nobody uses."""
        return tuple(self.pages.num_free(rank) for rank in range(self.team.size))

    def length(self, sequence: int) -> int:
        """Returns the position of a sequence's next token: how many there have been, those evicted included."""
        return self.pages.length(sequence)

    def new(self) -> int:
        """Returns a new sequence, which has no tokens."""
        return self.pages.new()

    def extend(self, sequences: Sequence[int], tokens: int | Layout = 1) -> SlotAllocation:
        """Finds places for new tokens of each sequence; for all of them, or for none.

        Args:
            sequences: which, each once.
            tokens: how many, if every rank computes all of them (decoding): each goes to one rank, which is filled
                by pages, the one with the fewest tokens of the sequence first. Or, for a prefill, a layout of the new
                tokens alone: they stay with who computes them.
        Returns:
            What `decode_attention`, `prefill_attention` and `write` take; good until the sequences change again.
        Raises:
            OutOfPagesError: when there is no room; SequenceError when there is no such sequence; LayoutError when the
                layout is for other ranks. Nothing has changed then.
            DisagreementError: with a layout, when the ranks' calls, now or before, were not the same. With a number
                that is found by the attention that follows; on CUDA, by what comes after that.
        Communication: none for a number; one all-gather of a few hundred bytes for a layout.
        """
        self.agreement.settle()
        if isinstance(tokens, Layout):
            self._compare(f"extend {list(sequences)}", check_layout(tokens, "tokens", self.team.size))
        extension = self.pages.extend(sequences, tokens)
        for rank, old, new in extension.copies:
            if rank == self.team.rank:
                for layer in self._layers:
                    for pool in layer:
                        pool[new] = pool[old]
        return extension

    def write(self, layer: int, extension: SlotAllocation, k: Tensor, v: Tensor) -> None:
        """Puts the new tokens' keys and values in their places; each rank keeps its own.

        `decode_attention` and `prefill_attention` do this themselves.

        Args:
            layer: which, from 0.
            extension: the last one of its sequences.
            k: keys of the tokens that this rank computes, (sequences, tokens, H_kv, D), in the cache's dtype.
            v: their values, (sequences, tokens, H_kv, Dv).
        Raises:
            ArgumentError: when something does not fit; nothing is written then.
        Communication: none.
        """
        self.check(layer, extension)
        self.check_new("k", k, extension, self.form.head_dim)
        self.check_new("v", v, extension, self.form.v_head_dim)
        rows, pages, slots = self._own_places(extension)
        if not len(rows):
            return
        for pool, x in zip(self._layers[layer], (k, v), strict=True):
            pool[pages, :, slots] = x.detach().flatten(0, 1)[rows]

    def fork(self, sequence: int) -> int:
        """Returns a new sequence of the same tokens. They share pages; one that either writes to is copied then."""
        self.agreement.settle()
        return self.pages.fork(sequence)

    def truncate(self, sequence: int, length: int) -> None:
        """Forgets a sequence's tokens from position `length` on, such as speculated ones that were refused."""
        self.agreement.settle()
        self.pages.truncate(sequence, length)
        self._prefixes.keep(sequence, length)

    def evict(self, sequence: int, *, sinks: int, window: int) -> None:
        """Forgets all but the first `sinks` and the last `window` tokens of a sequence; positions stay as they are.

        Source: Xiao et al. 2023, arXiv:2309.17453.
        """
        self.agreement.settle()
        evicts = self.length(sequence) - window > sinks
        self.pages.evict(sequence, sinks, window)
        if evicts:
            self._prefixes.keep(sequence, sinks)

    def free(self, sequence: int) -> None:
        """Forgets a sequence. Pages that no other one shares are free."""
        self.agreement.settle()
        self.pages.free(sequence)
        self._prefixes.keep(sequence, 0)

    def remember(self, sequence: int, tokens: Sequence[int]) -> None:
        """Lets `start` find this sequence by its beginning, for as long as it is in the cache.

        Args:
            sequence: one of which nothing was evicted.
            tokens: what it consists of, from its first token on; the same on every rank.
        Raises:
            ArgumentError: when there are more of them than the sequence has, or some of its are not held any more.
        """
        self.agreement.settle()
        length = self.length(sequence)
        held = sum(self.pages.table(sequence, rank).num_tokens for rank in range(self.team.size))
        if len(tokens) > length or held < length:
            raise ArgumentError(
                f"tokens: {len(tokens)} of them, but sequence {sequence} holds {held} of {length}: it must hold all"
            )
        self._prefixes.record(sequence, tokens)

    def start(self, tokens: Sequence[int]) -> PrefixMatch:
        """Returns a new sequence, which shares the longest beginning that a remembered one has in common with `tokens`.

        Args:
            tokens: of the new sequence; the same on every rank.
        Returns:
            (sequence, num_tokens): num_tokens are there already, in whole pages' worth, and fewer than len(tokens): a
            model needs at least one new token to go on from. 0 if nothing is known of them.
        """
        self.agreement.settle()
        found = self._prefixes.longest(tokens[: max(len(tokens) - 1, 0)])
        if found is None:
            return PrefixMatch(self.new(), 0)
        sequence = self.fork(found.sequence)
        self.pages.truncate(sequence, found.num_tokens)
        return PrefixMatch(sequence, found.num_tokens)

    def note(self, what: str) -> None:
        """Takes down something else that all ranks must have in common, such as the tokens themselves.

        It is compared with what is asked of the cache: see `agree`, `extend` by a layout, and `decode_attention`.
        """
        self.pages.note(what)

    def agree(self) -> None:
        """Compares what the ranks have asked of the cache so far; DisagreementError on every rank if it differs.

        Communication: one all-gather of a few hundred bytes.
        """
        self.agreement.settle()
        self._compare("agree", None)

    def pools(self, layer: int) -> tuple[Tensor, Tensor]:
        """Returns this rank's keys and values of a layer, (pages, page_size, H_kv, D) and (..., Dv): views."""
        k, v = self._layers[layer]
        return k.transpose(1, 2), v.transpose(1, 2)

    def storage(self, layer: int) -> tuple[Tensor, Tensor]:
        """Returns the same as they lie in memory, (pages, H_kv, page_size, D): views."""
        k, v = self._layers[layer]
        return k, v

    def page_tables(self, extension: SlotAllocation) -> PageTables:
        """Returns where this rank keeps the tokens of an extension's sequences; made once for all layers."""
        if self._tables is None or self._tables[0] is not extension:
            held = [self.pages.table(sequence, self.team.rank) for sequence in extension.sequences]
            pages = np.concatenate([np.array(table.pages, dtype=np.int32) for table in held])
            slots = np.concatenate([table.slots for table in held])
            starts = np.cumsum([0, *(len(table.pages) for table in held)], dtype=np.int32)
            made = PageTables(*(torch.from_numpy(x).to(self.device) for x in (pages, slots, starts)))
            self._tables = extension, made
        return self._tables[1]

    def _own_places(self, extension: SlotAllocation) -> tuple[Tensor, ...]:
        """Returns which new rows this rank keeps, and the page and slot of each; made once for all layers."""
        if self._places is None or self._places[0] is not extension:
            rank, size = self.team.rank, self.form.page_size
            found = (extension.rows[rank], extension.places[rank] // size, extension.places[rank] % size)
            self._places = extension, tuple(torch.as_tensor(x, device=self.device) for x in found)
        return self._places[1]

    def meeting(self, key: Hashable, make: Callable[[], PersistentCollective]) -> PersistentCollective:
        """Returns the last meeting if it was made under this key, or makes one: the same for all layers and steps."""
        if self._meeting is None or self._meeting[0] != key:
            self._meeting = key, make()
        return self._meeting[1]

    def key_layout(self, extension: SlotAllocation) -> Layout:
        """Returns who holds which keys of an extension's one sequence; made once for all layers."""
        if self._layout is None or self._layout[0] is not extension:
            self._layout = extension, self.pages.layout(extension.sequences[0])
        return self._layout[1]

    def held(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """Returns this rank's keys and values of a sequence, (1, rows, H_kv, D) and (..., Dv), by position: copies."""
        _, places = self.pages.table(sequence, self.team.rank).held()
        where, size = torch.as_tensor(places, device=self.device), self.form.page_size
        k, v = (pool[where // size, where % size][None] for pool in self.pools(layer))
        return k, v

    def check(self, layer: int, extension: SlotAllocation) -> None:
        """Raises ArgumentError unless there is such a layer and nothing came after the extension."""
        if check_integer("layer", layer, 0) >= self.form.num_layers:
            raise ArgumentError(f"layer={layer}: the cache has layers 0 to {self.form.num_layers - 1}")
        if not isinstance(extension, SlotAllocation):
            raise ArgumentTypeError(f"extension={extension!r:.100}: must be what cache.extend returned")
        if not self.pages.is_last(extension):
            raise ArgumentError(
                f"extension of sequences {list(extension.sequences)}: they have changed since; use the one that the "
                "last cache.extend returned"
            )

    def check_new(self, name: str, x: Tensor, extension: SlotAllocation, dim: int) -> None:
        """Raises ArgumentError unless `x` has the keys or values of the tokens that this rank computes."""
        layout = extension.layout
        tokens = extension.num_tokens if layout is None else layout.num_tokens(self.team.rank)
        wanted = (len(extension.sequences), tokens, self.form.num_kv_heads, dim)
        if not isinstance(x, Tensor) or tuple(x.shape) != wanted:
            raise ArgumentError(f"{name} has shape {tuple(getattr(x, 'shape', ()))}: must be {wanted}")
        if x.dtype != self.form.dtype or x.device.type != self.device.type:
            raise ArgumentError(f"{name} is {x.dtype} on {x.device}: the cache is {self.form.dtype} on {self.device}")

    def _compare(self, what: str, layout: Layout | None) -> None:
        told = {
            "what is asked of the cache": what if layout is None else f"{what} by {layout} #{layout.digest}",
            "what was asked of the cache so far": f"#{self.pages.digest:x}",
        }
        agree(self.team, None, lambda: (told, None))
