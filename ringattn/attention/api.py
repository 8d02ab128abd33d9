"""The public operations: what each promises. What was asked for is checked in request.py, and run by executor.py."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringattn.attention.request import Masks, Request, attend
from ringattn.comm.group import team_of
from ringattn.geometry.layout import Layout

Group = dist.ProcessGroup | DeviceMesh | None

_DOUBLE_RING = ("outer", "inner")


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group = None,
    *,
    mask: Masks = None,
    layout: Layout | None = None,
    kv_layout: Layout | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of this rank's queries over the keys/values of all ranks, which go round in a ring.

    The result is exact: that of one process that holds the whole sequence. All ranks of the group call it
    together, forward and backward. Gradients are those of the sum of what the ranks compute from their outputs.
    Inside autocast the inputs are cast as torch's own attention casts them.

    Args:
        q: local queries, (B, S_local, H, D), float64, float32, bfloat16 or float16.
        k: local keys, (B, S_kv_local, H_kv, D), H % H_kv == 0, dtype of q.
        v: local values, (B, S_kv_local, H_kv, Dv), dtype of q.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the default group.
        mask: who may attend to whom, in global positions; a list gives each batch row its own; None is full.
        layout: the positions of the local queries; None is contiguous with equal shards on all ranks.
        kv_layout: the positions of the local keys/values (cross-attention); None is the queries' layout.
        scale: softmax scale, dimensionless; D ** -0.5 if None.
        softcap: scores become softcap * tanh(score / softcap); positive; None leaves them.
        sink: (H,) learned logits that take part in each row's denominator; the same on all ranks. Its gradient is
            this rank's share, to be summed over the group like that of every replicated parameter.
        backend: a name out of `ringattn info`, which then runs or raises; None takes the first that can.
    Returns:
        (B, S_local, H, Dv) in q.dtype; accumulated in fp32 (float64 for float64). Rows that may attend to nothing
        are 0.
    Raises:
        ArgumentError: when an argument is not allowed; LayoutError, MaskError when a layout or a mask does not fit.
        BackendError: when the backend cannot run this call.
        DisagreementError: when the ranks do not ask for the same. All of these on every rank, before anything is
            sent, on the first call of a signature (shapes, dtypes, options); later calls of it are not compared.
    Communication: per rank and hop the block at hand, rows x H_kv x (D + Dv) elements per batch row; a block stops
        at the last rank that needs it, W - 1 hops away at most. In backward the same again; and the block's
        gradients in the accumulation dtype, one transfer more, as they go home.
    Source: Liu et al. 2023, arXiv:2310.01889.
    """
    request = Request("ring_attention", q, k, v, mask, layout, kv_layout, scale, softcap, sink, backend)
    return attend(request, team_of(group, _DOUBLE_RING))[0]


def ring_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group = None,
    *,
    mask: Masks = None,
    layout: Layout | None = None,
    kv_layout: Layout | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The output of `ring_attention` and the log-sum-exp of each row's scores, both differentiable.

    Args, errors and communication are those of `ring_attention`.

    Returns:
        out, (B, S_local, H, Dv) in q.dtype, and lse, (B, H, S_local), natural log, fp32 (float64 for float64);
        lse takes in the sink, and is -inf for rows that attend to nothing.
    """
    request = Request(
        "ring_attention", q, k, v, mask, layout, kv_layout, scale, softcap, sink, backend, returns_lse=True
    )
    return attend(request, team_of(group, _DOUBLE_RING))
