"""The public operations: what each promises. What was asked for is checked in request.py, and run by executor.py."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringattn.attention.dispatch import dispatch
from ringattn.attention.validate import AttentionCall
from ringattn.geometry.layout import Layout
from ringattn.types import Group, Masks


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
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the default group; or a 2-D DeviceMesh with the axes
            ("outer", "inner") for a ring of rings: ranks are numbered group by group, and what crosses the slow outer
            axis has a whole turn of the inner one for its way.
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
        gradients in the accumulation dtype, one transfer more, as they go home. Or, where that is fewer bytes (as
        with as many kv heads as heads), queries go round in backward: rows x H x (D + Dv + 2) elements, and
        theirs.
    Source: Liu et al. 2023, arXiv:2310.01889; the ring of rings Gu et al. 2024, arXiv:2406.18485.
    """
    request = AttentionCall("ring_attention", q, k, v, mask, layout, kv_layout, scale, softcap, sink, backend)
    return dispatch(request, group)[0]


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
    request = AttentionCall(
        "ring_attention", q, k, v, mask, layout, kv_layout, scale, softcap, sink, backend, returns_lse=True
    )
    return dispatch(request, group)


def gather_attention(
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
    stages: int = 1,
) -> Tensor:
    """Attention of this rank's queries over just the keys/values that they may see, fetched from whoever holds them.

    A sliding window costs its halo, and packed documents cost only what crosses a boundary. The result, its
    gradients and the way of calling are those of `ring_attention`.

    Args are those of `ring_attention`, the group having one axis; and
        stages: in how many parts the rows come, each computed while the next is on its way; with n of them a rank
            holds two n-ths of what it receives at a time.
    Returns:
        (B, S_local, H, Dv) in q.dtype, as in `ring_attention`.
    Raises:
        ArgumentError: as in `ring_attention`; and when `stages` is not a positive integer.
    Communication: a rank receives each row that one of its queries (in any batch row) may see and that it does not
        hold, once: H_kv x (D + Dv) elements per batch row. In backward the same again, and the gradients of
        those rows back in the accumulation dtype; or the like for queries, where that is fewer bytes.
    Source: the all-gather of Llama 3, Dubey et al. 2024, arXiv:2407.21783, less what is not needed.
    """
    request = AttentionCall("gather_attention", q, k, v, mask, layout, kv_layout, scale, softcap, sink, backend, stages)
    return dispatch(request, group)[0]


def gather_attention_with_lse(
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
    stages: int = 1,
) -> tuple[Tensor, Tensor]:
    """The output of `gather_attention` and the log-sum-exp of each row's scores, both differentiable.

    Args, errors and communication are those of `gather_attention`.

    Returns:
        out and lse, as in `ring_attention_with_lse`.
    """
    request = AttentionCall(
        "gather_attention", q, k, v, mask, layout, kv_layout, scale, softcap, sink, backend, stages, returns_lse=True
    )
    return dispatch(request, group)


def ulysses_attention(
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
    stages: int = 1,
) -> Tensor:
    """Attention of some heads over the whole sequence on each rank: an all-to-all there, and one back.

    Query heads are dealt to the ranks as evenly as they go, whole sequences with them; kv heads are replicated where
    several ranks use them. The result, its gradients and the way of calling are those of `ring_attention`.

    Args are those of `ring_attention`, the group having one axis; and
        stages: in how many parts a rank's heads are computed, the next ones being on their way meanwhile; memory falls
            with them. A kv head whose query heads are in several stages is sent in each.
    Returns:
        (B, S_local, H, Dv) in q.dtype, as in `ring_attention`.
    Raises:
        ArgumentError: as in `ring_attention`; and when `stages` is not a positive integer.
    Communication: a rank sends all but its own share of q, k and v, and of the output and lse of its heads; in
        backward q, k, v, the output's gradient, lse and one number a row once more, and the gradients back (those
        of replicated kv heads in the accumulation dtype).
    Source: Jacobs et al. 2023, arXiv:2309.14509.
    """
    request = AttentionCall(
        "ulysses_attention", q, k, v, mask, layout, kv_layout, scale, softcap, sink, backend, stages
    )
    return dispatch(request, group)[0]


def ulysses_attention_with_lse(
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
    stages: int = 1,
) -> tuple[Tensor, Tensor]:
    """The output of `ulysses_attention` and the log-sum-exp of each row's scores, both differentiable.

    Args, errors and communication are those of `ulysses_attention`.

    Returns:
        out and lse, as in `ring_attention_with_lse`.
    """
    request = AttentionCall(
        "ulysses_attention", q, k, v, mask, layout, kv_layout, scale, softcap, sink, backend, stages, returns_lse=True
    )
    return dispatch(request, group)


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: DeviceMesh,
    *,
    mask: Masks = None,
    layout: Layout | None = None,
    kv_layout: Layout | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: str | None = None,
    stages: int = 1,
) -> Tensor:
    """Attention over a mesh of two axes: heads are spread along one, and keys/values go round the other.

    Along "ulysses", ranks exchange rows of all heads for all of their rows of some heads; along "ring", keys and values
    of those heads go round. Ranks are numbered row by row: rank = ring place x ulysses ranks + ulysses place; layouts
    are for all of them. The result, its gradients and the way of calling are those of `ring_attention`.

    Args are those of `ring_attention`, but for the group; and
        mesh: a 2-D DeviceMesh with the axes ("ring", "ulysses").
        stages: as in `ulysses_attention`.
    Returns:
        (B, S_local, H, Dv) in q.dtype, as in `ring_attention`.
    Raises:
        ArgumentError: as in `ring_attention`; and when `stages` is not a positive integer, or the mesh is another.
    Communication: that of `ulysses_attention` along the one axis, and that of `ring_attention` along the other.
    Source: Fang and Zhao 2024, arXiv:2405.07719.
    """
    request = AttentionCall("hybrid_attention", q, k, v, mask, layout, kv_layout, scale, softcap, sink, backend, stages)
    return dispatch(request, mesh)[0]


def hybrid_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: DeviceMesh,
    *,
    mask: Masks = None,
    layout: Layout | None = None,
    kv_layout: Layout | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: str | None = None,
    stages: int = 1,
) -> tuple[Tensor, Tensor]:
    """The output of `hybrid_attention` and the log-sum-exp of each row's scores, both differentiable.

    Args, errors and communication are those of `hybrid_attention`.

    Returns:
        out and lse, as in `ring_attention_with_lse`.
    """
    request = AttentionCall(
        "hybrid_attention", q, k, v, mask, layout, kv_layout, scale, softcap, sink, backend, stages, returns_lse=True
    )
    return dispatch(request, mesh)
