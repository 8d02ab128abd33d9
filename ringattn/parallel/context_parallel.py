"""Context parallelism: the tokens of a sequence spread over the axes "ring" and "ulysses".

Nothing of a model is changed. A batch is sharded by a layout, and the decoder is given an attention that sees the whole
sequence.
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

_OWN_EXCHANGE = {("ring",): "ring", ("ulysses",): "ulysses", ("ring", "ulysses"): "hybrid"}


def make_cp_attention(
    mesh: DeviceMesh, layout: Layout, *, exchange: str | None = None, backend: str | None = None
) -> AttentionFn:
    """The attention of a decoder on this mesh: of local queries over the keys/values of all ranks of the sequence.

    Args:
        mesh: from `build_mesh`.
        layout: who of them holds which positions.
        exchange: as in `context_parallel_attention`, for a mesh that has one of the two axes; None is what the axes
            are called: "ring", "ulysses", or "hybrid" over both.
        backend: as in `ring_attention`.
    Returns:
        a function of (q, k, v, mask); with "tp", of this rank's heads.
    Raises:
        LayoutError: when the layout is for another number of ranks, or "tp" does not divide a rank's rows.
    Communication: none here; that of the exchange at each call.
    """
    context = context_mesh(mesh)
    check_rows(layout, mesh)
    chosen = _OWN_EXCHANGE[context.mesh_dim_names or ()] if exchange is None else exchange

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Masks) -> Tensor:
        return context_parallel_attention(q, k, v, context, exchange=chosen, mask=mask, layout=layout, backend=backend)

    return attend


def local_batch(batch: Mapping[str, Any], mesh: DeviceMesh, layout: Layout) -> dict[str, Any]:
    """Returns this rank's share of a batch that every rank has: some of the sequences, and some of their tokens.

    Sequences are dealt in order over dp_replicate x dp_shard, tokens by the layout over ring x ulysses. Ranks along
    "tp" and "pp" get the same share.

    Args:
        batch: as for `shard_batch`, such as {"input_ids": (B, S), "labels": (B, S), "position_ids": (B, S)}; and
            "mask", which stays whole: it is for global positions. A list of masks has one for each sequence.
        mesh: from `build_mesh`.
        layout: who of the ranks of a sequence holds which positions; layout.seq_len == S.
    Returns:
        what `shard_batch` returns, for B / (dp_replicate x dp_shard) sequences.
    Raises:
        ArgumentError: when the sequences cannot be dealt evenly; LayoutError, as in `make_cp_attention`.
    Communication: none.
    """
    check_rows(layout, mesh)
    place, count = data_parallel_rank(mesh)
    dealt = {name: _local_part(name, value, place, count) for name, value in batch.items()}
    mask = {"mask": dealt.pop("mask")} if "mask" in dealt else {}
    return shard_batch(dealt, layout, context_mesh(mesh)) | mask


def check_rows(layout: Layout, mesh: DeviceMesh) -> None:
    """Checks that a layout fits the ranks that hold a sequence, and that "tp" can split the rows of each.

    Raises:
        LayoutError: when it does not; on every rank, whoever's rows they are.
    """
    check_layout(layout, "layout", context_mesh(mesh).size())
    tp = axis_size(mesh, "tp")
    for rank in range(layout.world_size):
        if layout.num_tokens(rank) % tp:
            raise LayoutError(
                f"layout={layout} gives rank {rank} {layout.num_tokens(rank)} rows, which tp={tp} must divide: between "
                "its weights each rank along tp keeps as many rows; pad the sequence to a multiple of "
                f"{layout.world_size * tp}, or take another layout"
            )


def _local_part(name: str, value: object, place: int, count: int) -> object:
    """Some of the sequences of one entry of a batch. What all sequences share stays as it is."""
    if isinstance(value, Tensor):
        num_sequences = value.shape[0] if value.ndim else 1
    elif isinstance(value, Sequence) and not isinstance(value, str | Mask):
        num_sequences = len(value)
    else:
        return value
    if name == "position_ids" and num_sequences == 1:
        return value
    if num_sequences % count:
        raise ArgumentError(
            f"batch[{name!r}] has {num_sequences} sequences, which dp_replicate x dp_shard = {count} must divide"
        )
    each = num_sequences // count
    return value[place * each : (place + 1) * each]
