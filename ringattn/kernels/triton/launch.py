"""From tensors to launches: the schedule on its device, the configuration, and what a kernel takes."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ringattn.geometry.tiles import Tiles
from ringattn.kernels.contract import BackwardQueries, Gradients, Keys, Queries, State
from ringattn.kernels.triton.args import QueryArgs, ScoreArgs, StridedRows, WorkArgs
from ringattn.kernels.triton.backward_kernels import dkdv_kernel, dq_kernel
from ringattn.kernels.triton.configs import INTERPRETER, Config, Pass, architecture, config, described, padded
from ringattn.kernels.triton.forward_kernel import forward_kernel
from ringattn.kernels.triton.work_list import build, heads_together, transposed
from ringattn.score import Score

# What heads that run together may read: well within the second-level cache of any data centre's GPU.
CACHE_BYTES = 24 << 20


def forward(queries: Queries, keys: Keys, tiles: Tiles, score: Score, state: State) -> None:
    """Merges attention over the tiles into the state: `BlockKernel.forward` in one launch."""
    (q, _), (k, v, _), (out, lse) = queries, keys, state
    chosen = _config(q, v, score, "forward")
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    section = heads_together(heads, group, _bytes_per_head(k) + _bytes_per_head(v), CACHE_BYTES)
    items, runs = _tables(tiles, q.shape[1], q.shape[0], chosen.block_m, chosen.block_n, False, q.device)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        forward_kernel[(len(items) * heads,)](
            StridedRows.of(q), StridedRows.of(k), StridedRows.of(v), *_described(chosen.block_n, k, v),
            StridedRows.of(out), StridedRows.of_entries(lse),
            WorkArgs(items, runs, q.shape[1], heads, group, section), ScoreArgs.of(score), **_constants(q, v, chosen),
        )  # fmt: skip


def backward(queries: BackwardQueries, keys: Keys, tiles: Tiles, score: Score, gradients: Gradients) -> None:
    """Adds the gradients over the tiles: `BlockKernel.backward` in two launches."""
    q, dout, lse, delta = queries[:4]
    (k, v, _), (dq, dk, dv) = keys, gradients
    batch, heads, kv_heads = q.shape[0], q.shape[2], k.shape[2]
    group = heads // kv_heads
    query_rows = QueryArgs(
        StridedRows.of(q), StridedRows.of(dout), StridedRows.of_entries(lse), StridedRows.of_entries(delta)
    )
    key_rows, value_rows, scores = StridedRows.of(k), StridedRows.of(v), ScoreArgs.of(score)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        chosen = _config(q, v, score, "dq")
        section = heads_together(heads, group, _bytes_per_head(k) + _bytes_per_head(v), CACHE_BYTES)
        items, runs = _tables(tiles, q.shape[1], batch, chosen.block_m, chosen.block_n, False, q.device)
        dq_kernel[(len(items) * heads,)](
            query_rows, key_rows, value_rows, *_described(chosen.block_n, k, v), StridedRows.of(dq),
            WorkArgs(items, runs, q.shape[1], heads, group, section), scores, **_constants(q, v, chosen),
        )  # fmt: skip
        chosen = _config(q, v, score, "dkdv")
        section = heads_together(kv_heads, 1, group * (_bytes_per_head(q) + _bytes_per_head(dout)), CACHE_BYTES)
        items, runs = _tables(tiles, k.shape[1], batch, chosen.block_n, chosen.block_m, True, q.device)
        dkdv_kernel[(len(items) * kv_heads,)](
            query_rows, key_rows, value_rows, *_described(chosen.block_m, q, dout),
            StridedRows.of(dk), StridedRows.of(dv), WorkArgs(items, runs, k.shape[1], kv_heads, group, section),
            scores, **_constants(q, v, chosen),
        )  # fmt: skip


@lru_cache(maxsize=512)
def _tables(
    tiles: Tiles, num_rows: int, batch: int, block: int, step: int, of_keys: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The schedule's tables on a device."""
    table = transposed(tiles.table) if of_keys else tiles.table
    items, runs = build(table, num_rows, batch, block, step)
    return torch.from_numpy(items).to(device), torch.from_numpy(runs).to(device)


def arch_of(device: torch.device) -> str:
    """Returns the key of a device in the tables of configurations."""
    arch = architecture(device) if device.type == "cuda" else INTERPRETER
    assert arch is not None, "a device that TritonKernel.available refuses"
    return arch


def _describable(*tensors: Tensor) -> bool:
    """Whether tensors can be loaded by descriptors: addresses and strides of whole 16 bytes, within 40 bits."""
    if not described(arch_of(tensors[0].device), tensors[0].element_size()):
        return False
    offsets = [stride * x.element_size() for x in tensors for stride in x.stride()[:3]]
    return all(x.data_ptr() % 16 == 0 for x in tensors) and all(n % 16 == 0 and 0 < n < 1 << 40 for n in offsets)


def _described(rows: int, *tensors: Tensor) -> list[TensorDescriptor | None]:
    """What whole steps of so many rows are loaded by: descriptors, where they are of use."""
    if not _describable(*tensors):
        return [None for _ in tensors]
    return [TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, padded(x.shape[3])]) for x in tensors]


def _config(q: Tensor, v: Tensor, score: Score, which: Pass) -> Config:
    widths = padded(q.shape[3]), padded(v.shape[3])
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
