"""The two launches of paged decoding. The host reads nothing from the device."""

from __future__ import annotations

from functools import lru_cache

import torch

from ringattn.kernels.contract import Queries, State
from ringattn.kernels.paged.paged_contract import PageTables, Pools, VisibleKeys
from ringattn.kernels.triton.args import PageArgs, PagedSizes, PartialArgs, ScoreArgs, StridedRows
from ringattn.kernels.triton.configs import padded_dim, paged_config
from ringattn.kernels.triton.launch import arch_of
from ringattn.kernels.triton.paged_kernels import combine_kernel, paged_kernel
from ringattn.score import Score

# Slots of the smallest chunk: the part of a smaller one would have as many bytes as its keys.
MIN_SLOTS = 256
# Elements of parts per program of the merge: 32 per thread.
COMBINED, COMBINE_WARPS = 4096, 4


def forward(
    queries: Queries, pools: Pools, tables: PageTables, visible: VisibleKeys, score: Score, state: State
) -> None:
    """Merges attention to the visible keys into the state: `PagedKernel.forward` in two launches."""
    q, (k, v), (out, lse) = queries.q, pools, state
    (batch, tokens, heads, dim), v_dim, kv_heads = q.shape, v.shape[3], k.shape[2]
    group, page_size = heads // kv_heads, k.shape[1]
    num_rows = tokens * group
    chosen = paged_config(arch_of(q.device), q.dtype.itemsize, padded_dim(dim), padded_dim(v_dim))
    block_m = chosen.rows(num_rows)
    side_by_side = kv_heads * -(-num_rows // block_m)
    max_chunks = chosen.programs * _multiprocessors(q.device) // side_by_side
    num_chunks = max(1, min(max_chunks, len(tables.pages) * page_size // MIN_SLOTS))
    shape = (num_chunks + batch - 1, kv_heads, num_rows)
    part_out, part_lse = torch.empty((*shape, v_dim), device=q.device), torch.empty(shape, device=q.device)
    tables, visible = PageTables(*(x.contiguous() for x in tables)), VisibleKeys(*(x.contiguous() for x in visible))
    q = q if q.stride(3) == 1 else q.contiguous()
    parts, sizes = PartialArgs(part_out, part_lse), PagedSizes(batch, num_chunks, kv_heads, group, num_rows)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        paged_kernel[(num_chunks * side_by_side,)](
            StridedRows.of(q), PageArgs.of(k), PageArgs.of(v), tables, visible, parts, sizes, ScoreArgs.of(score),
            DIM=dim, V_DIM=v_dim, PAGE_SIZE=page_size, TOKENS=tokens, BLOCK_M=block_m, BLOCK_N=chosen.block_n,
            num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        )  # fmt: skip
        combine_kernel[(batch * kv_heads * num_rows,)](
            parts, tables.starts, StridedRows.of(out), StridedRows.of_entries(lse), sizes,
            V_DIM=v_dim, PARTS=COMBINED // padded_dim(v_dim), num_warps=COMBINE_WARPS,
        )  # fmt: skip


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors; 2 in the interpreter, so that small tests have several chunks of several steps."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
