"""The public operation that chooses an exchange by its predicted time, and what explains the choice."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringattn.attention.api import Group
from ringattn.attention.attend import attend_with
from ringattn.attention.models import default_model
from ringattn.attention.request import (
    Masks,
    Request,
    autocast,
    check,
    check_stages,
    check_tensors,
    layouts_of,
    sizes_of,
)
from ringattn.comm.group import Team, agreed, team_of
from ringattn.errors import ArgumentError, ArgumentTypeError
from ringattn.geometry.choice import EXCHANGES, STAGED, Candidate, Choice, Setting, choose
from ringattn.geometry.cost import CostModel
from ringattn.geometry.layout import Layout, check_layout, contiguous
from ringattn.geometry.masks import check_mask

_OPERATIONS = {name: f"{name}_attention" for name in EXCHANGES} | {"double ring": "ring_attention"}
_AXES = (("outer", "inner"), ("ring", "ulysses"))


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
    request = Request("context_parallel_attention", q, k, v, mask, layout, kv_layout, scale, softcap, sink, backend)
    out: Tensor = _attend(request, group_or_mesh, exchange, stages, model)[0]
    return out


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
    request = Request(
        "context_parallel_attention", q, k, v, mask, layout, kv_layout, scale, softcap, sink, backend, returns_lse=True
    )
    found: tuple[Tensor, Tensor] = _attend(request, group_or_mesh, exchange, stages, model)
    return found


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
    request = Request("explain", q, k, v, mask, layout, kv_layout, None, None, None, None)
    mesh = _shape(group_or_mesh)
    check_tensors(q, k, v, None)
    if mesh is None:
        team = _team(group_or_mesh)
        mesh, layouts = team.shape, layouts_of(request, team)
    else:
        size = prod(mesh)
        queries = contiguous(q.shape[1] * size, size) if layout is None else check_layout(layout, "layout", size)
        keys = queries if kv_layout is None else check_layout(kv_layout, "kv_layout", size)
        layouts = queries, keys
    grads = [torch.is_grad_enabled() and t.requires_grad for t in (q, k, v)]
    wanted = grads[0], grads[1] or grads[2]
    setting = Setting(sizes_of(q, k, v), check_mask(mask, q.shape[0]), *layouts, mesh, wanted)
    return _choice(setting, q.device.type, exchange, stages, model)


# It decides in Python, and may ask the other ranks: nothing to be traced.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend(
    request: Request, group: Group, exchange: str, stages: int | None, model: CostModel | None
) -> tuple[Tensor, Tensor]:
    team = _team(group)
    request = autocast(request)
    options = (exchange, stages, model)
    key = _hashable((request.signature(), options, type(stages)))
    chosen = agreed(team, key, lambda: _decide(request, team, *options))
    operation = _OPERATIONS[chosen.exchange]
    return attend_with(replace(request, operation=operation, stages=chosen.stages), team)


def _decide(
    request: Request, team: Team, exchange: str, stages: int | None, model: CostModel | None
) -> tuple[Mapping[str, str], Candidate]:
    """Returns what the ranks must agree on, and the exchange."""
    found = check(request, team)
    sizes = sizes_of(request.q, request.k, request.v)
    setting = Setting(sizes, found.masks, found.layout, found.kv_layout, team.shape, found.wanted)
    choice = _choice(setting, request.q.device.type, exchange, stages, model)
    assert choice.chosen is not None
    asked = {"exchange": repr(exchange), "stages": repr(stages), "model": repr(choice.model)}
    return {**found.told, **asked, "the chosen exchange": str(choice.chosen)}, choice.chosen


def _choice(
    setting: Setting, device_type: str, exchange: object, stages: int | None, model: CostModel | None
) -> Choice:
    if not isinstance(exchange, str) or exchange not in ("auto", *EXCHANGES):
        raise ArgumentError(f"exchange={exchange!r:.100}: must be 'auto' or one of {', '.join(map(repr, EXCHANGES))}")
    if stages is not None:
        check_stages(stages)
        if stages > 1 and exchange not in ("auto", *STAGED):
            raise ArgumentError(f"stages={stages}: exchange={exchange!r} has no stages; pass None or 1")
    if model is not None and not isinstance(model, CostModel):
        raise ArgumentTypeError(f"model={model!r:.100}: must be a CostModel or None, not {type(model).__name__}")
    choice = choose(setting, default_model(device_type) if model is None else model, exchange, stages)
    if choice.chosen is None:
        told = "; ".join(dict.fromkeys(f"{c.exchange}: {c.refusal}" for c in choice.candidates))
        raise ArgumentError(f"exchange={exchange!r}, stages={stages}: no exchange can do it ({told})")
    return choice


def _team(group: object) -> Team:
    if isinstance(group, DeviceMesh) and group.ndim == 2:
        names = group.mesh_dim_names
        if names is not None and names[::-1] in _AXES:
            raise ArgumentError(f"group_or_mesh={group!r}: the axes must be {names[::-1]}, in this order, not {names}")
    return team_of(group)


def _shape(mesh: object) -> tuple[int, ...] | None:
    """The shape of a mesh that is given in numbers; None if it is not."""
    if isinstance(mesh, bool) or not isinstance(mesh, int | tuple):
        return None
    shape = mesh if isinstance(mesh, tuple) else (mesh,)
    if len(shape) not in (1, 2) or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape):
        raise ArgumentError(f"group_or_mesh={mesh!r:.100}: in numbers it is that of the ranks, or two along the axes")
    return shape


def _hashable(key: Hashable) -> Hashable | None:
    if isinstance(key, tuple) and key[0] is None:
        return None
    try:
        hash(key)
    except TypeError:
        return None
    return key
