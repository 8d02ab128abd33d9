"""Programs on a cache: every rank runs them and compares with dense keys and values in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import ringattn
from ringattn import DistributedKVCache, OutOfPagesError, contiguous, striped, zigzag
from ringattn.cache.page_tables import EMPTY_SLOT
from tests.cache.model import check_invariants
from tests.harness.compare import assert_close
from tests.harness.oracle import dense_attention

LAYOUTS = (contiguous, zigzag, striped)


class Setting(NamedTuple):
    """What a program runs on."""

    page_size: int
    num_pages: int
    heads: int = 4
    kv_heads: int = 2
    dim: int = 4
    v_dim: int = 6
    num_layers: int = 2
    folder: str = ""


class Op(NamedTuple):
    """One operation and its numbers, which are taken modulo what there is."""

    name: str
    a: int = 0
    b: int = 0
    c: int = 0


@dataclass
class Dense:
    """One sequence as a single process would store it: (layers, tokens, H_kv, dims), and its evicted positions."""

    k: Tensor
    v: Tensor
    tokens: list[int] = field(default_factory=list)
    gone: set[int] = field(default_factory=set)

    def copy(self, length: int | None = None) -> Dense:
        n = len(self.tokens) if length is None else length
        return Dense(self.k[:, :n], self.v[:, :n], self.tokens[:n], {p for p in self.gone if p < n})

    def allowed(self, start: int, window: int | None) -> Tensor:
        """Which keys the queries from `start` on see."""
        n = len(self.tokens)
        q, k = torch.arange(start, n)[:, None], torch.arange(n)[None, :]
        seen = (k <= q) & torch.tensor([p not in self.gone for p in range(n)], dtype=torch.bool)[None, :]
        return seen if window is None else seen & (k >= q - window)


class Runner:
    """Runs one program on one rank."""

    def __init__(self, group: dist.ProcessGroup, setting: Setting) -> None:
        self.group, self.setting = group, setting
        s = setting
        self.cache = DistributedKVCache(
            num_layers=s.num_layers, num_kv_heads=s.kv_heads, head_dim=s.dim, v_head_dim=s.v_dim,
            num_pages=s.num_pages, page_size=s.page_size, dtype=torch.float64, group=group,
        )  # fmt: skip
        self.dense: dict[int, Dense] = {}
        self.generator = torch.Generator().manual_seed(1)
        self.compared = self.grown = 0

    def run(self, program: list[Op]) -> int:
        for number, op in enumerate(program):
            self.do(op)
            self.poison(number)
            self.check()
        self.finish()
        return self.compared

    def do(self, op: Op) -> None:
        if op.name == "new" or self.dense:
            getattr(self, f"do_{op.name}")(op)

    def finish(self) -> None:
        """Frees all sequences, and checks that all pages are free."""
        for sequence in list(self.dense):
            self.do_free(Op("free", sorted(self.dense).index(sequence)))
        assert self.cache.num_free_pages == (self.cache.pages.num_pages,) * self.group.size()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def pick(self, number: int) -> int:
        return sorted(self.dense)[number % len(self.dense)]

    def do_new(self, op: Op) -> None:
        s = self.setting
        empty = torch.zeros(s.num_layers, 0, s.kv_heads, 1, dtype=torch.float64)
        self.dense[self.cache.new()] = Dense(empty.expand(-1, -1, -1, s.dim), empty.expand(-1, -1, -1, s.v_dim))

    def grow(self, sequences: list[int], count: int, tokens: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Adds random keys and values to the dense sequences; returns (k, v) of each layer, each (B, T, ...).

        The first token id is new, because equal token ids must have equal keys and values.
        """
        s = self.setting
        k = self.normal(s.num_layers, len(sequences), count, s.kv_heads, s.dim)
        v = self.normal(s.num_layers, len(sequences), count, s.kv_heads, s.v_dim)
        for index, sequence in enumerate(sequences):
            d = self.dense[sequence]
            d.k, d.v = torch.cat([d.k, k[:, index]], 1), torch.cat([d.v, v[:, index]], 1)
            self.grown += 1
            d.tokens = d.tokens + [9 + self.grown, *tokens[1:]][: len(tokens)]
        return list(k), list(v)

    def options(self, op: Op) -> dict[str, object]:
        softcap = 2.0 if op.c % 3 == 1 else None
        sink = self.normal(self.setting.heads) if op.c % 5 == 1 else None
        return {"softcap": softcap, "sink": sink, "scale": 0.4 if op.c % 2 else None}

    def window(self, op: Op) -> int | None:
        return op.c % 9 if op.c % 4 == 2 else None

    def compare(self, name: str, found: Tensor, q: Tensor, layer: int, sequence: int, start: int, op: Op, o: dict[str, object]) -> None:  # fmt: skip  # noqa: E501
        d = self.dense[sequence]
        allowed = d.allowed(start, self.window(op))
        expected, _ = dense_attention(q, d.k[layer][None], d.v[layer][None], allowed, **o)  # type: ignore[arg-type]
        assert_close(found, expected, atol=1e-10, name=name)
        self.compared += found.numel()

    def do_decode(self, op: Op) -> None:
        several = {self.pick(op.a), self.pick(op.a + op.b)} if op.b % 2 else {self.pick(op.a)}
        sequences, count = sorted(several, reverse=bool(op.c % 2)), 1 + op.b % 3
        try:
            extension = self.cache.extend(sequences, count)
        except OutOfPagesError:
            return
        starts = [len(self.dense[sequence].tokens) for sequence in sequences]
        k, v = self.grow(sequences, count, [op.c % 2] * count)
        o, window = self.options(op), self.window(op)
        mask = None if window is None else ringattn.sliding_window(window)
        for layer in range(self.setting.num_layers):
            q = self.normal(len(sequences), count, self.setting.heads, self.setting.dim)
            attend = ringattn.decode_attention_by_heads if op.a % 3 == 2 else ringattn.decode_attention
            out = attend(q, k[layer], v[layer], self.cache, layer, extension, mask=mask, **o)  # type: ignore[arg-type]
            if attend is ringattn.decode_attention_by_heads:
                own = contiguous(self.setting.heads, self.group.size()).positions(self.group.rank())
                out = self.all_heads(out, own.tolist())
            for index, sequence in enumerate(sequences):
                here = slice(index, index + 1)
                self.compare("decode", out[here], q[here], layer, sequence, starts[index], op, o)

    def all_heads(self, out: Tensor, own: list[int]) -> Tensor:
        whole = torch.zeros(*out.shape[:2], self.setting.heads, out.shape[3], dtype=out.dtype)
        whole[:, :, own] = out
        dist.all_reduce(whole, group=self.group)
        return whole

    def do_prefill(self, op: Op) -> None:
        sequence, layout = self.pick(op.a), LAYOUTS[op.b % 3](op.b % 23, self.group.size())
        try:
            extension = self.cache.extend([sequence], layout)
        except OutOfPagesError:
            return
        start = len(self.dense[sequence].tokens)
        k, v = self.grow([sequence], layout.seq_len, [op.c % 2] * layout.seq_len)
        o, window, mine = self.options(op), self.window(op), layout.positions(self.group.rank())
        mask = None if window is None else ringattn.sliding_window(window)
        for layer in range(self.setting.num_layers):
            q = self.normal(1, layout.seq_len, self.setting.heads, self.setting.dim)
            new = q[:, mine], k[layer][:, mine], v[layer][:, mine]
            out = ringattn.prefill_attention(*new, self.cache, layer, extension, mask=mask, **o)  # type: ignore[arg-type]
            whole = ringattn.unshard(out, layout, self.group)
            self.compare("prefill", whole, q, layer, sequence, start, op, o)

    def do_fork(self, op: Op) -> None:
        parent = self.pick(op.a)
        self.dense[self.cache.fork(parent)] = self.dense[parent].copy()

    def do_truncate(self, op: Op) -> None:
        sequence = self.pick(op.a)
        length = max(0, len(self.dense[sequence].tokens) - op.b % 12)
        self.cache.truncate(sequence, length)
        self.dense[sequence] = self.dense[sequence].copy(length)

    def do_evict(self, op: Op) -> None:
        sequence, sinks, window = self.pick(op.a), op.b % 4, op.c % 30
        self.cache.evict(sequence, sinks=sinks, window=window)
        d = self.dense[sequence]
        d.gone |= set(range(sinks, len(d.tokens) - window))

    def do_free(self, op: Op) -> None:
        sequence = self.pick(op.a)
        self.cache.free(sequence)
        del self.dense[sequence]

    def do_share(self, op: Op) -> None:
        """A new sequence that shares a cached prefix, and differs from it at one token."""
        donor = self.pick(op.a)
        d = self.dense[donor]
        if not d.tokens or d.gone:
            return
        self.cache.cache_prefix(donor, d.tokens)
        cut = op.b % len(d.tokens)
        wanted = [*d.tokens[:cut], 7, *d.tokens[cut + 1 :]]
        sequence, count = self.cache.match_prefix(wanted)
        assert count <= cut
        assert count % self.setting.page_size == 0
        if count:
            self.dense[sequence] = d.copy(count)
        else:
            self.cache.free(sequence)

    def do_save(self, op: Op) -> None:
        folder = str(Path(self.setting.folder) / f"{self.group.size()}")
        ringattn.save_cache(self.cache, folder)
        num_pages = self.cache.pages.num_pages
        self.cache = ringattn.load_cache(folder, num_pages=num_pages, group=self.group)

    def do_reshard(self, op: Op) -> None:
        num_pages = self.cache.pages.num_pages
        made = ringattn.reshard(self.cache, num_pages=num_pages, group=self.group, over=self.group)
        assert made is not None
        self.cache = made

    def poison(self, number: int) -> None:
        """Fills unused slots with NaN, or with keys and values of other tokens."""
        cache, rank, size = self.cache, self.group.rank(), self.setting.page_size
        live = torch.zeros(cache.pages.num_pages, size, dtype=torch.bool)
        for sequence in cache.sequences:
            table = cache.pages.table(sequence, rank)
            for page, positions in zip(table.pages, table.positions, strict=True):
                live[page] |= torch.from_numpy(positions != EMPTY_SLOT)
        for layer in range(self.setting.num_layers):
            for pool in cache.pools(layer):
                spare = pool[live][:1] if number % 2 and live.any() else torch.nan
                pool[~live] = spare

    def check(self) -> None:
        """Every key and value is in the slot that the tables say, and every page is accounted for."""
        check_invariants(self.cache.pages)
        assert set(self.cache.sequences) == set(self.dense)
        rank, size = self.group.rank(), self.setting.page_size
        for sequence, d in self.dense.items():
            stored = sum(self.cache.pages.table(sequence, r).num_tokens for r in range(self.group.size()))
            assert stored == len(d.tokens) - len(d.gone)
            positions, slots = (torch.from_numpy(x) for x in self.cache.pages.table(sequence, rank).stored_tokens())
            assert not d.gone & set(positions.tolist())
            for layer in range(self.setting.num_layers):
                for pool, dense in zip(self.cache.pools(layer), (d.k, d.v), strict=True):
                    assert torch.equal(pool[slots // size, slots % size], dense[layer][positions])


def run_program(group: dist.ProcessGroup, setting: Setting, program: list[Op]) -> int:
    return Runner(group, setting).run(program)
