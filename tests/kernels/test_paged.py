"""Every kernel over pages keeps the promises of kernels/paged/contract.py."""

from __future__ import annotations

import pytest
import torch

from ringattn.kernels.contract import Call, Spec
from ringattn.kernels.native import instruction_sets
from ringattn.kernels.paged import PagedKernel, PageTables, Sight
from ringattn.kernels.paged.native import NativePaged
from ringattn.kernels.paged.reference import ReferencePaged
from tests.harness.compare import assert_close, assert_within_rule
from tests.harness.oracle import dense_attention, plain_attention

LENGTHS = (0, 1, 75, 9, 4203)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def kernels(dtype: torch.dtype) -> list[PagedKernel]:
    found: list[PagedKernel] = [ReferencePaged()]
    if dtype != torch.float64 and not NativePaged().available():
        found += [NativePaged(isa) for isa in instruction_sets(dtype)]
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim", "v_dim", "page_size", "softcap"),
    [(1, 4, 1, 128, 128, 16, None), (3, 6, 2, 7, 5, 4, None), (2, 3, 3, 40, 65, 1, 2.0), (1, 10, 2, 64, 72, 64, None)],
)
def test_contract(
    dtype: torch.dtype,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    v_dim: int,
    page_size: int,
    softcap: float | None,
) -> None:
    """Sequences of several lengths, with holes, in shuffled pages; what nobody sees is NaN; merged into a state."""
    g = torch.Generator().manual_seed(3)
    counts = [-(-n // page_size) for n in LENGTHS]
    num_pages = sum(counts) + 3
    order = torch.randperm(num_pages, generator=g)
    k = torch.randn(num_pages, kv_heads, page_size, dim, generator=g).to(dtype).transpose(1, 2)
    v = torch.randn(num_pages, kv_heads, page_size, v_dim, generator=g).to(dtype).transpose(1, 2)
    q = torch.randn(len(LENGTHS), tokens, heads, dim, generator=g).to(dtype)
    slots = torch.full((sum(counts), page_size), -1, dtype=torch.int32)
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    for b, n in enumerate(LENGTHS):
        where = torch.randperm(counts[b] * page_size, generator=g)[: max(0, n - n // 7)]
        slots[starts[b] : starts[b + 1]].view(-1)[where] = torch.randperm(n, generator=g)[: len(where)].int()
    pages = order[: sum(counts)].int()
    stop = torch.tensor(LENGTHS)[:, None] - torch.arange(tokens).flip(0)[None, :]
    first = (stop - 60).clamp(min=0) * torch.tensor([0, 0, 1, 0, 1])[:, None]
    sight = Sight(first.int(), stop.clamp(min=0).int())
    live = torch.zeros(num_pages, page_size, dtype=torch.bool)
    for b in range(len(LENGTHS)):
        here = slots[starts[b] : starts[b + 1]]
        live[pages[starts[b] : starts[b + 1]].long()] = (here >= sight.first[b].min()) & (here < sight.stop[b].max())
    k[~live], v[~live] = torch.nan, torch.nan
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    spec = Spec(0.3, softcap)
    for kernel in kernels(dtype):
        call = Call("cpu", dtype, heads, kv_heads, dim, v_dim, False, spec)
        assert not kernel.unsupported(call)
        out = torch.zeros(len(LENGTHS), tokens, heads, v_dim, dtype=acc)
        lse = torch.full((len(LENGTHS), heads, tokens), -torch.inf, dtype=acc)
        half = [int(starts[b]) + (counts[b] + 1) // 2 for b in range(len(LENGTHS))]
        for low, high in ((starts[:-1].tolist(), half), (half, starts[1:].tolist())):  # merged in two calls
            index = torch.cat([torch.arange(a, z) for a, z in zip(low, high, strict=True)]).long()
            ends = torch.tensor([0, *(z - a for a, z in zip(low, high, strict=True))]).cumsum(0).int()
            kernel.forward(q, k, v, PageTables(pages[index], slots[index], ends), sight, spec, out, lse)
        for b in range(len(LENGTHS)):
            here, of = slots[starts[b] : starts[b + 1]], pages[starts[b] : starts[b + 1]].long()
            seen = (here.flatten() >= sight.first[b][:, None]) & (here.flatten() < sight.stop[b][:, None])
            keys, values = (torch.nan_to_num(pool[of].flatten(0, 1))[None] for pool in (k, v))
            given = (q[b : b + 1], keys, values, seen)
            expected, expected_lse = dense_attention(*given, scale=0.3, softcap=softcap)
            if dtype == torch.float64:
                assert_close(out[b : b + 1], expected, atol=1e-10, name="out")
                assert_close(lse[b : b + 1], expected_lse, atol=1e-10, name="lse")
                continue
            plain, plain_lse = plain_attention(*given, scale=0.3, softcap=softcap)
            assert_within_rule(out[b : b + 1], expected, plain, name=f"{kernel} out", check_dtype=False)
            assert_within_rule(lse[b : b + 1], expected_lse, plain_lse, name=f"{kernel} lse", check_dtype=False)
