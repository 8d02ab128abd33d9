"""The public function that takes any exchange, or selects one by its least time; and the report of that selection."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ringattn.attention.api import attention
from ringattn.attention.auto_exchange import choose_exchange
from ringattn.attention.validate import AUTO, AttentionCall, check_tensors, layouts_of, mesh_for, spec_of
from ringattn.cost.cost_model import CostModel
from ringattn.errors import ArgumentError
from ringattn.geometry.layout import Layout, check_layout, contiguous
from ringattn.geometry.masks import normalize_masks
from ringattn.plan.exchanges import Exchange
from ringattn.plan.select_exchange import Choice, ExchangeProblem
from ringattn.score import Score
from ringattn.types import Group, Masks


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_or_mesh: Group = None,
    *,
    exchange: Exchange | str = "auto",
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
    """Attention of this rank's queries over the keys/values of all ranks, by a given or selected exchange.

    On the first call of a signature a lower bound of the time of each exchange is computed from its bytes, messages and
    work, forward and, where gradients are wanted, backward. Nothing is measured. Later calls of the signature take the
    same exchange. The result and its gradients are the same as with `ring_attention`.

    It takes the arguments of `ring_attention`, and

    Args:
        group_or_mesh: a ProcessGroup, a 1-D DeviceMesh, or None for the default group, for one of "ring", "gather" and
            "ulysses"; or a 2-D DeviceMesh, the slow axis first, for "double ring" or "hybrid".
        exchange: "auto"; or one of these names, which is then the only candidate; or a value, Ring(), Gather(stages=n),
            Ulysses(stages=n, then=Ring()), which runs as it is.
        stages: of a named exchange ("gather", "ulysses", "hybrid"); None selects it, too.
        model: links, compute and memory by which times are computed, the same on all ranks; None is constants by the
            type of device, `attention.calibration.default_model`.

    Returns:
        (B, S_local, H, Dv) in q.dtype, as in `ring_attention`.
    Raises:
        ArgumentError: as in `ring_attention`; and when no exchange can run the call, with every reason.
        DisagreementError: when the ranks' arguments differ, the model and the selected exchange included.
    Communication: as the selected exchange; `explain` returns which one it is.
    """
    return attention(
        AUTO, q, k, v, group_or_mesh, exchange, Score(scale, softcap, sink),
        mask=mask, layout=layout, kv_layout=kv_layout, backend=backend, stages=stages, model=model,
    )[0]  # fmt: skip


def context_parallel_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_or_mesh: Group = None,
    *,
    exchange: Exchange | str = "auto",
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
    """Returns the output of `context_parallel_attention` and the log-sum-exp of each row's scores, both differentiable.

    It has the arguments, errors and communication of `context_parallel_attention`.

    Returns:
        out and lse, as in `ring_attention_with_lse`.
    """
    return attention(
        AUTO, q, k, v, group_or_mesh, exchange, Score(scale, softcap, sink),
        mask=mask, layout=layout, kv_layout=kv_layout, backend=backend, stages=stages, model=model, returns_lse=True,
    )  # fmt: skip


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
    """Returns what `context_parallel_attention` selects, with the times, bytes, messages and buffers of each exchange.

    A rank may call it alone. With a number of ranks instead of a group no process group is needed, and tensors on the
    device "meta" suffice: only shapes and dtypes count, and whether gradients are required.

    It takes the arguments of `context_parallel_attention`, and

    Args:
        group_or_mesh: may also be the number of ranks, or their numbers along the two axes of a mesh.

    Returns:
        a Choice, whose text is a table.
    Raises:
        ArgumentError: as in `context_parallel_attention`.
    Communication: none.
    """
    mesh = _shape(group_or_mesh)
    check_tensors(q, k, v, None)
    if mesh is None:
        ranks = mesh_for(AUTO, exchange, group_or_mesh)
        call = AttentionCall("explain", q, k, v, Score(), mask, layout, kv_layout, None, exchange)
        mesh, layouts = ranks.shape, layouts_of(call, ranks)
    else:
        size = prod(mesh)
        queries = contiguous(q.shape[1] * size, size) if layout is None else check_layout(layout, "layout", size)
        keys = queries if kv_layout is None else check_layout(kv_layout, "kv_layout", size)
        layouts = queries, keys
    grads = [torch.is_grad_enabled() and t.requires_grad for t in (q, k, v)]
    wanted = grads[0], grads[1] or grads[2]
    problem = ExchangeProblem(spec_of(q, k, v).shape, normalize_masks(mask, q.shape[0]), *layouts, mesh, wanted)
    return choose_exchange(problem, q.device.type, exchange, stages, model)


def _shape(mesh: object) -> tuple[int, ...] | None:
    """The shape of a mesh that is given in numbers; None if it is not."""
    if isinstance(mesh, bool) or not isinstance(mesh, int | tuple):
        return None
    shape = mesh if isinstance(mesh, tuple) else (mesh,)
    if len(shape) not in (1, 2) or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape):
        raise ArgumentError(
            f"group_or_mesh={mesh!r:.100}: must be a number of ranks, 1 or more, or two, one for each axis of a mesh"
        )
    return shape
