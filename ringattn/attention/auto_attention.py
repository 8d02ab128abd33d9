"""The public operation that chooses an exchange by its predicted time, and what explains the choice."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ringattn.attention.auto_exchange import choose_exchange
from ringattn.attention.dispatch import dispatch
from ringattn.attention.validate import (
    AUTO,
    AttentionCall,
    ExchangePreference,
    check_tensors,
    layouts_of,
    mesh_for,
    shape_of,
)
from ringattn.cost.cost_model import CostModel
from ringattn.cost.select_exchange import Choice, ExchangeProblem
from ringattn.errors import ArgumentError
from ringattn.geometry.layout import Layout, check_layout, contiguous
from ringattn.geometry.masks import normalize_masks
from ringattn.types import Group, Masks


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_or_mesh: Group = None,
    *,
    exchange: str = "auto",
    stages: int | None = None,
    model: CostModel | None = None,
    mask: Masks = None,
    layout: Layout | None = None,
    kv_layout: Layout | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of this rank's queries over the keys/values of all ranks, by the exchange that is predicted fastest.

    On the first call of a signature the time of each exchange is predicted from its plan's bytes, messages and work,
    forward and, where gradients are wanted, backward. Nothing is measured. Later calls of that signature take what was
    chosen. The result, its gradients and the way of calling are those of `ring_attention`.

    Args are those of `ring_attention`, but for these. `group_or_mesh` is a ProcessGroup, a 1-D DeviceMesh, or
    None for the default group, for one of "ring", "gather" and "ulysses"; or a 2-D DeviceMesh, the slow axis
    first, for "double ring" or "hybrid". `exchange` is "auto", or one of these names, which is then the only
    one looked at. `stages` is how many a staged exchange has ("gather", "ulysses", "hybrid"); None lets it be
    chosen, too. `model` has the links, compute and memory to predict by, the same on all ranks; None is
    constants by the type of device, as in `attention.models.default_model`.

    Returns:
        (B, S_local, H, Dv) in q.dtype, as in `ring_attention`.
    Raises:
        ArgumentError: as in `ring_attention`; and when no exchange can do what is asked, with every reason.
        DisagreementError: when the ranks do not ask for the same, the model and the choice included.
    Communication: that of the exchange which is chosen; `explain` tells which.
    """
    request = AttentionCall(
        AUTO,
        q,
        k,
        v,
        mask,
        layout,
        kv_layout,
        scale,
        softcap,
        sink,
        backend,
        stages,
        asked=ExchangePreference(exchange, model),
    )
    return dispatch(request, group_or_mesh)[0]


def context_parallel_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_or_mesh: Group = None,
    *,
    exchange: str = "auto",
    stages: int | None = None,
    model: CostModel | None = None,
    mask: Masks = None,
    layout: Layout | None = None,
    kv_layout: Layout | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The output of `context_parallel_attention` and the log-sum-exp of each row's scores, both differentiable.

    Args, errors and communication are those of `context_parallel_attention`.

    Returns:
        out and lse, as in `ring_attention_with_lse`.
    """
    asked = ExchangePreference(exchange, model)
    request = AttentionCall(
        AUTO, q, k, v, mask, layout, kv_layout, scale, softcap, sink, backend, stages, returns_lse=True, asked=asked
    )
    return dispatch(request, group_or_mesh)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_or_mesh: Group | int | tuple[int, ...] = None,
    *,
    exchange: str = "auto",
    stages: int | None = None,
    model: CostModel | None = None,
    mask: Masks = None,
    layout: Layout | None = None,
    kv_layout: Layout | None = None,
) -> Choice:
    """What `context_parallel_attention` chooses, and the times, bytes, messages and buffers predicted of each exchange.

    A rank may call it alone. With a number of ranks in place of a group no process group is needed, and tensors on the
    device "meta" will do: only shapes and dtypes count, and whether gradients are required.

    Args are those of `context_parallel_attention`, but that `group_or_mesh` may also be the number of ranks, or
    their numbers along the two axes of a mesh.

    Returns:
        a Choice, whose text is a table.
    Raises:
        ArgumentError: as in `context_parallel_attention`.
    Communication: none.
    """
    request = AttentionCall("explain", q, k, v, mask, layout, kv_layout, None, None, None, None)
    mesh = _shape(group_or_mesh)
    check_tensors(q, k, v, None)
    if mesh is None:
        team = mesh_for(AUTO, group_or_mesh)
        mesh, layouts = team.shape, layouts_of(request, team)
    else:
        size = prod(mesh)
        queries = contiguous(q.shape[1] * size, size) if layout is None else check_layout(layout, "layout", size)
        keys = queries if kv_layout is None else check_layout(kv_layout, "kv_layout", size)
        layouts = queries, keys
    grads = [torch.is_grad_enabled() and t.requires_grad for t in (q, k, v)]
    wanted = grads[0], grads[1] or grads[2]
    setting = ExchangeProblem(shape_of(q, k, v), normalize_masks(mask, q.shape[0]), *layouts, mesh, wanted)
    return choose_exchange(setting, q.device.type, exchange, stages, model)


def _shape(mesh: object) -> tuple[int, ...] | None:
    """The shape of a mesh that is given in numbers; None if it is not."""
    if isinstance(mesh, bool) or not isinstance(mesh, int | tuple):
        return None
    shape = mesh if isinstance(mesh, tuple) else (mesh,)
    if len(shape) not in (1, 2) or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape):
        raise ArgumentError(f"group_or_mesh={mesh!r:.100}: in numbers it is that of the ranks, or two along the axes")
    return shape
