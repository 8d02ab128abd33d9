"""Moving whole tensors to their shards and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ringattn.comm.agreement import agree
from ringattn.comm.topology import RankMesh, rank_mesh
from ringattn.comm.uneven_all_gather import all_gather_mesh_rows
from ringattn.errors import ArgumentError, ArgumentTypeError, LayoutError
from ringattn.geometry.layout import Layout, check_layout
from ringattn.types import Group

IGNORED_LABEL = -100


def shard(x: Tensor, layout: Layout, group: Group = None, dim: int = 1) -> Tensor:
    """Returns this rank's rows of a tensor that every rank has, in the order of its local rows.

    Args:
        x: the whole tensor, layout.seq_len long along `dim`; any dtype.
        layout: which rank holds which rows.
        group: a ProcessGroup, a DeviceMesh of one or two dims, or None for the default group.
        dim: which dim is the sequence.
    Returns:
        x with layout.num_tokens(rank) rows along `dim`, contiguous. Differentiable: x gets the gradients of this
        rank's rows, and zeros elsewhere.
    Raises:
        LayoutError: when the layout is for another number of ranks, or another length.
        ArgumentError: when an argument has another type or `dim` does not exist.
    Communication: none.
    """
    mesh = rank_mesh(group)
    _check(x, layout, mesh, dim)
    length = x.shape[dim]
    if length != layout.seq_len:
        raise LayoutError(f"x has {length} rows along dim {dim}, but layout={layout} has {layout.seq_len} positions")
    return _take(x, layout, mesh.rank, dim)


def unshard(x: Tensor, layout: Layout, group: Group = None, dim: int = 1) -> Tensor:
    """Returns the whole tensor, in global order, on every rank.

    All ranks of the group call it together. It is assumed that every rank computes the same from the result, as one
    process would: backward gives each rank the gradient of its own rows, without communication and without a factor of
    the world size.

    Args:
        x: this rank's rows, layout.num_tokens(rank) along `dim`; any dtype.
        layout: which rank holds which rows.
        group: a ProcessGroup, a DeviceMesh of one or two dims, or None for the default group.
        dim: which dim is the sequence.
    Returns:
        x with layout.seq_len rows along `dim`. Differentiable.
    Raises:
        LayoutError: when the layout is for another number of ranks, or does not give this rank so many rows.
        ArgumentError: when an argument has another type or `dim` does not exist.
        DisagreementError: when the ranks' other dims, dtypes or layouts differ. All of them on every rank.
    Communication: each rank sends its rows to each other rank.
    """
    mesh = rank_mesh(group)

    def prepare() -> tuple[Mapping[str, str], None]:
        _check(x, layout, mesh, dim)
        rows, expected = x.shape[dim], layout.num_tokens(mesh.rank)
        if rows != expected:
            raise LayoutError(
                f"x has {rows} rows along dim {dim}, but layout={layout} gives rank {mesh.rank} {expected}"
            )
        others = [size for index, size in enumerate(x.shape) if index != dim % x.ndim]
        fingerprint = {"dtype": str(x.dtype), "dim": str(dim % x.ndim), "the other dims": str(others)}
        return {**fingerprint, "layout": f"{layout} #{layout.digest}"}, None

    key = ("unshard", x.shape, x.dtype, layout, dim) if isinstance(x, Tensor) and _hashable(layout, dim) else None
    agree(mesh, key, prepare)
    return cast(Tensor, _Unshard.apply(x, layout, mesh, dim))  # type: ignore[no-untyped-call]


def shard_batch(batch: Mapping[str, Any], layout: Layout, group: Group = None) -> dict[str, Any]:
    """Returns this rank's shard of a training batch that every rank has.

    Every tensor (B, seq_len, ...) is sharded along dim 1. `labels` become `shift_labels`: shifted by one BEFORE they
    are sharded, so that the last token of a shard predicts the first of the next; the very last position
    predicts nothing (-100). `position_ids` are added if they are missing: the global positions of the local
    rows, (1, S_local). Values that are no tensors, and tensors without dims, pass unchanged.

    Args:
        batch: such as {"input_ids": (B, S), "labels": (B, S)}.
        layout: which rank holds which positions; layout.seq_len == S.
        group: a ProcessGroup, a DeviceMesh of one or two dims, or None for the default group.
    Raises:
        ArgumentError: when a tensor has no dim 1 of seq_len (a 4-D mask has two such dims: give it as `mask=`), or
            both `labels` and `shift_labels` are given.
        LayoutError: when the layout is for another number of ranks.
    Communication: none.
    """
    mesh = rank_mesh(group)
    layout = check_layout(layout, "layout", mesh.size)
    if not isinstance(batch, Mapping):
        raise ArgumentTypeError(f"batch={batch!r:.100}: must be a mapping of names to tensors")
    if "labels" in batch and "shift_labels" in batch:
        raise ArgumentError("batch has both labels and shift_labels: give one of them")
    whole = dict(batch)
    if "labels" in whole:
        labels = whole.pop("labels")
        _check_sequence("labels", labels, layout)
        whole["shift_labels"] = torch.full_like(labels, IGNORED_LABEL)
        whole["shift_labels"][:, :-1] = labels[:, 1:]
    shards: dict[str, Any] = {}
    for name, value in whole.items():
        if isinstance(value, Tensor) and value.ndim:
            _check_sequence(name, value, layout)
            shards[name] = _take(value, layout, mesh.rank, 1)
        else:
            shards[name] = value
    if "position_ids" not in shards:
        device = next((value.device for value in shards.values() if isinstance(value, Tensor)), None)
        shards["position_ids"] = position_ids(layout, mesh.rank, device=device)[None]
    return shards


def position_ids(layout: Layout, rank: int, *, device: torch.device | str | int | None = None) -> Tensor:
    """Returns the global positions of a rank's rows, in the order of its local rows: `layout.positions` as a tensor.

    Args:
        layout: which rank holds which positions.
        rank: a rank of the layout.
        device: where the tensor is; None is the default device of torch.
    Returns:
        (layout.num_tokens(rank),) int64. Models take `position_ids(...)[None]`, one row for the whole batch.
    Raises:
        LayoutError: when the layout has no such rank.
    Communication: none.
    """
    return torch.tensor(layout.positions(rank), device=device)


def _check_sequence(name: str, x: object, layout: Layout) -> None:
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(f"batch[{name!r}]={x!r:.100}: must be a tensor, not {type(x).__name__}")
    square = x.ndim >= 4 and x.shape[-2:] == (layout.seq_len, layout.seq_len)
    if x.ndim < 2 or x.shape[1] != layout.seq_len or square:
        raise ArgumentError(
            f"batch[{name!r}] has shape {tuple(x.shape)}: must be (batch, {layout.seq_len}, ...), the sequence along "
            "dim 1; leave out what is not sharded, and describe masks by a Mask"
        )


def _check(x: Tensor, layout: Layout, mesh: RankMesh, dim: int) -> None:
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(f"x={x!r:.100}: must be a tensor, not {type(x).__name__}")
    if isinstance(dim, bool) or not isinstance(dim, int) or not -x.ndim <= dim < x.ndim:
        raise ArgumentError(f"dim={dim!r}: x has {x.ndim} dims, so it must lie in [{-x.ndim}, {x.ndim - 1}]")
    check_layout(layout, "layout", mesh.size)


def _hashable(*values: object) -> bool:
    try:
        hash(values)
    except TypeError:
        return False
    return True


def _take(x: Tensor, layout: Layout, rank: int, dim: int) -> Tensor:
    """The rows of a rank, copied range by range."""
    dim %= x.ndim
    before = (slice(None),) * dim
    parts = [x[(*before, slice(r.start, r.stop, r.step))] for r in layout.ranges(rank)]
    if not parts:
        return x.narrow(dim, 0, 0)
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, mesh: RankMesh, dim: int) -> Tensor:
        ctx.layout, ctx.rank, ctx.dim = layout, mesh.rank, dim
        counts = [layout.num_tokens(rank) for rank in range(layout.world_size)]
        rows = all_gather_mesh_rows(x.movedim(dim, 0).contiguous(), counts, mesh)
        order = np.concatenate([layout.positions(rank) for rank in range(layout.world_size)])
        whole = torch.empty_like(rows)
        whole[torch.as_tensor(order, device=x.device)] = rows
        return whole.movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _take(grad, ctx.layout, ctx.rank, ctx.dim), None, None, None
