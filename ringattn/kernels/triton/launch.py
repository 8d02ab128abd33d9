"""Launches of the forward and backward kernels: work list, configuration, arguments."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ringattn.geometry.tiles import Tiles
from ringattn.kernels.contract import BackwardQueries, Gradients, Keys, Queries, State
from ringattn.kernels.triton.args import QueryArgs, ScoreArgs, StridedRows, WorkArgs
from ringattn.kernels.triton.backward_kernels import dkdv_kernel, dq_kernel
from ringattn.kernels.triton.configs import (
    INTERPRETER,
    Config,
    Pass,
    architecture,
    config,
    padded_dim,
    uses_descriptors,
)
from ringattn.kernels.triton.forward_kernel import forward_kernel
from ringattn.kernels.triton.work_list import build_work_list, heads_per_section, transpose_tiles
from ringattn.score import Score

# Bytes that the heads of a section read: well within the second-level cache of any data-centre GPU.
CACHE_BYTES = 24 << 20


def forward(queries: Queries, keys: Keys, tiles: Tiles, score: Score, state: State) -> None:
    """Merges attention over the tiles into the state: `BlockKernel.forward` in one launch."""
    q, k, v, (out, lse) = queries.q, keys.k, keys.v, state
    chosen = _config(q, v, score, "forward")
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    section = heads_per_section(heads, group, _bytes_per_head(k) + _bytes_per_head(v), CACHE_BYTES)
    items, runs = _work_list(tiles, q.shape[1], q.shape[0], chosen.block_m, chosen.block_n, False, q.device)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        forward_kernel[(len(items) * heads,)](
            StridedRows.of(q), StridedRows.of(k), StridedRows.of(v), *_descriptors(chosen.block_n, k, v),
            StridedRows.of(out), StridedRows.of_entries(lse),
            WorkArgs(items, runs, q.shape[1], heads, group, section), ScoreArgs.of(score), **_constants(q, v, chosen),
        )  # fmt: skip


def backward(queries: BackwardQueries, keys: Keys, tiles: Tiles, score: Score, gradients: Gradients) -> None:
    """Adds the gradients over the tiles: `BlockKernel.backward` in two launches."""
    q, dout, lse, delta = queries[:4]
    k, v, (dq, dk, dv) = keys.k, keys.v, gradients
    batch, heads, kv_heads = q.shape[0], q.shape[2], k.shape[2]
    group = heads // kv_heads
    query_rows = QueryArgs(
        StridedRows.of(q), StridedRows.of(dout), StridedRows.of_entries(lse), StridedRows.of_entries(delta)
    )
    key_rows, value_rows, scores = StridedRows.of(k), StridedRows.of(v), ScoreArgs.of(score)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        chosen = _config(q, v, score, "dq")
        section = heads_per_section(heads, group, _bytes_per_head(k) + _bytes_per_head(v), CACHE_BYTES)
        items, runs = _work_list(tiles, q.shape[1], batch, chosen.block_m, chosen.block_n, False, q.device)
        dq_kernel[(len(items) * heads,)](
            query_rows, key_rows, value_rows, *_descriptors(chosen.block_n, k, v), StridedRows.of(dq),
            WorkArgs(items, runs, q.shape[1], heads, group, section), scores, **_constants(q, v, chosen),
        )  # fmt: skip
        chosen = _config(q, v, score, "dkdv")
        section = heads_per_section(kv_heads, 1, group * (_bytes_per_head(q) + _bytes_per_head(dout)), CACHE_BYTES)
        items, runs = _work_list(tiles, k.shape[1], batch, chosen.block_n, chosen.block_m, True, q.device)
        dkdv_kernel[(len(items) * kv_heads,)](
            query_rows, key_rows, value_rows, *_descriptors(chosen.block_m, q, dout),
            StridedRows.of(dk), StridedRows.of(dv), WorkArgs(items, runs, k.shape[1], kv_heads, group, section),
            scores, **_constants(q, v, chosen),
        )  # fmt: skip


@lru_cache(maxsize=512)
def _work_list(
    tiles: Tiles, num_rows: int, batch: int, block: int, step: int, of_keys: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The tables of a work list on a device."""
    table = transpose_tiles(tiles.table) if of_keys else tiles.table
    items, runs = build_work_list(table, num_rows, batch, block, step)
    return torch.from_numpy(items).to(device), torch.from_numpy(runs).to(device)


def arch_of(device: torch.device) -> str:
    """Returns the key of a device in the tables of configurations."""
    arch = architecture(device) if device.type == "cuda" else INTERPRETER
    assert arch is not None, "TritonKernel.available refuses this device"
    return arch


def _can_describe(*tensors: Tensor) -> bool:
    """Whether descriptors can load the tensors: addresses and strides are multiples of 16 bytes, below 2 ** 40."""
    if not uses_descriptors(arch_of(tensors[0].device), tensors[0].element_size()):
        return False
    offsets = [stride * x.element_size() for x in tensors for stride in x.stride()[:3]]
    return all(x.data_ptr() % 16 == 0 for x in tensors) and all(n % 16 == 0 and 0 < n < 1 << 40 for n in offsets)


def _descriptors(rows: int, *tensors: Tensor) -> list[TensorDescriptor | None]:
    """Descriptors for loads of `rows` whole rows, one per tensor; None where they cannot be used or do not pay."""
    if not _can_describe(*tensors):
        return [None for _ in tensors]
    return [TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, padded_dim(x.shape[3])]) for x in tensors]


def _config(q: Tensor, v: Tensor, score: Score, which: Pass) -> Config:
    widths = padded_dim(q.shape[3]), padded_dim(v.shape[3])
    return config(arch_of(q.device), q.dtype.itemsize, *widths, which, capped=score.softcap is not None)


def _constants(q: Tensor, v: Tensor, chosen: Config) -> dict[str, int]:
    return {
        "DIM": q.shape[3],
        "V_DIM": v.shape[3],
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "EDGE_STEP": chosen.edge_step,
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
    }


def _bytes_per_head(x: Tensor) -> int:
    return x.shape[0] * x.shape[1] * x.shape[3] * x.element_size()
