"""Context parallelism: the tokens of a sequence sharded over the axes "ring" and "ulysses".

The model does not change. A layout shards the batch, and the decoder receives an attention function that sees the
whole sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringattn.attention.auto_attention import context_parallel_attention
from ringattn.attention.sharding import shard_batch
from ringattn.errors import ArgumentError, LayoutError
from ringattn.geometry.layout import Layout, check_layout
from ringattn.geometry.masks import Mask
from ringattn.parallel.decoder import AttentionFn
from ringattn.parallel.mesh import axis_size, context_mesh, data_parallel_rank
from ringattn.types import Masks

_DEFAULT_EXCHANGE = {("ring",): "ring", ("ulysses",): "ulysses", ("ring", "ulysses"): "hybrid"}


def make_cp_attention(
    mesh: DeviceMesh, layout: Layout, *, exchange: str | None = None, backend: str | None = None
) -> AttentionFn:
    """Returns the attention function of a decoder: local queries attend to the keys/values of all context ranks.

    Args:
        mesh: from `build_mesh`.
        layout: which context rank holds which positions.
        exchange: as in `context_parallel_attention`, for a mesh with one of the two context axes; None takes the axes'
            own exchange: "ring", "ulysses", or "hybrid" for both.
        backend: as in `ring_attention`.
    Returns:
        A function (q, k, v, mask) -> out over (B, S_local, heads, head_dim) tensors; with "tp", of this rank's heads.
    Raises:
        LayoutError: when the layout is for another number of ranks, or "tp" does not divide the rows of every rank.
    Communication: none here; each call of the result runs the exchange.
    """
    context = context_mesh(mesh)
    check_cp_layout(layout, mesh)
    chosen = _DEFAULT_EXCHANGE[context.mesh_dim_names or ()] if exchange is None else exchange

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Masks) -> Tensor:
        return context_parallel_attention(q, k, v, context, exchange=chosen, mask=mask, layout=layout, backend=backend)

    return attention


def local_batch(batch: Mapping[str, Any], mesh: DeviceMesh, layout: Layout) -> dict[str, Any]:
    """Returns this rank's part of a batch that every rank holds: some of the sequences, and some of their tokens.

    Sequences are split in order over dp_replicate x dp_shard, and tokens by the layout over ring x ulysses. Ranks along
    "tp" and "pp" receive the same part.

    Args:
        batch: as for `shard_batch`, such as {"input_ids": (B, S), "labels": (B, S), "position_ids": (B, S)}, and
            optionally "mask", which refers to global positions and is not sharded; a list has one mask per sequence.
        mesh: from `build_mesh`.
        layout: which context rank holds which positions; layout.seq_len == S.
    Returns:
        The result of `shard_batch` for B / (dp_replicate x dp_shard) sequences.
    Raises:
        ArgumentError: when dp_replicate x dp_shard does not divide the number of sequences.
        LayoutError: as in `make_cp_attention`.
    Communication: none.
    """
    check_cp_layout(layout, mesh)
    dp_rank, dp_size = data_parallel_rank(mesh)
    part = {name: _local_sequences(name, value, dp_rank, dp_size) for name, value in batch.items()}
    mask = {"mask": part.pop("mask")} if "mask" in part else {}
    return shard_batch(part, layout, context_mesh(mesh)) | mask


def check_cp_layout(layout: Layout, mesh: DeviceMesh) -> None:
    """Checks that a layout fits the context ranks, and that "tp" divides the number of rows of each.

    Raises:
        LayoutError: on every rank, also where another rank's rows do not divide.
    """
    check_layout(layout, "layout", context_mesh(mesh).size())
    tp = axis_size(mesh, "tp")
    for rank in range(layout.world_size):
        if layout.num_tokens(rank) % tp:
            raise LayoutError(
                f"layout={layout} gives rank {rank} {layout.num_tokens(rank)} rows, which tp={tp} must divide: "
                "sequence parallelism splits them evenly over tp; pad the sequence to a multiple of "
                f"{layout.world_size * tp}, or use another layout"
            )


def _local_sequences(name: str, value: object, dp_rank: int, dp_size: int) -> object:
    """Returns one data-parallel rank's sequences of a batch entry; an entry without a batch dimension as it is."""
    if isinstance(value, Tensor):
        num_sequences = value.shape[0] if value.ndim else 1
    elif isinstance(value, Sequence) and not isinstance(value, str | Mask):
        num_sequences = len(value)
    else:
        return value
    if name == "position_ids" and num_sequences == 1:
        return value
    if num_sequences % dp_size:
        raise ArgumentError(
            f"batch[{name!r}] has {num_sequences} sequences, which dp_replicate x dp_shard = {dp_size} must divide"
        )
    per_rank = num_sequences // dp_size
    return value[dp_rank * per_rank : (dp_rank + 1) * per_rank]
