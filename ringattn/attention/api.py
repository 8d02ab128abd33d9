"""The public functions: aliases of `attention`, which runs any exchange."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ringattn.attention.dispatch import dispatch
from ringattn.attention.validate import AttentionCall
from ringattn.cost.cost_model import CostModel
from ringattn.geometry.layout import Layout
from ringattn.plan.exchanges import Exchange
from ringattn.score import Score
from ringattn.types import Group, Masks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def attention(
    operation: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group,
    exchange: Exchange | str,
    score: Score,
    *,
    mask: Masks,
    layout: Layout | None,
    kv_layout: Layout | None,
    backend: str | None,
    stages: int | None = None,
    model: CostModel | None = None,
    returns_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of attention over the ranks of a group, by any exchange.

    Args:
        operation: the public function, for messages.
        q, k, v, group, mask, layout, kv_layout, backend: as in `ring_attention`.
        exchange: a value, or a name.
        score: scale, softcap, sink.
        stages, model: as in `context_parallel_attention`.
        returns_lse: whether the caller gets lse.
    """
    call = AttentionCall(
        operation, q, k, v, score, mask, layout, kv_layout, backend, exchange, stages, model, returns_lse
    )
    return dispatch(call, group)


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
    """Attention of this rank's queries over the keys/values of all ranks, which rotate in a ring.

    The result is exact: the same as in one process that holds the whole sequence. All ranks of the group call it
    together, forward and backward. The loss is the sum of the ranks' losses. Inside autocast the inputs are cast as
    torch's own attention casts them.

    Args:
        q: local queries, (B, S_local, H, D), float64, float32, bfloat16 or float16.
        k: local keys, (B, S_kv_local, H_kv, D), H % H_kv == 0, dtype of q.
        v: local values, (B, S_kv_local, H_kv, Dv), dtype of q.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the default group; or a 2-D DeviceMesh with the axes
            ("outer", "inner") for a double ring: ranks are numbered row by row, and a transfer over the slow outer axis
            overlaps with a whole rotation of the inner ring.
        mask: which query may attend to which key, in global positions; a list has one for each batch row; None is full.
        layout: the positions of the local queries; None is contiguous with equal shards on all ranks.
        kv_layout: the positions of the local keys/values (cross-attention); None is the queries' layout.
        scale: softmax scale, dimensionless; D ** -0.5 if None.
        softcap: scores become softcap * tanh(score / softcap); positive; None leaves them.
        sink: (H,) learned logits that take part in each row's denominator; the same on all ranks. Sum its gradient over
            the group, as for every replicated parameter.
        backend: the name of a kernel from `ringattn info`, which then runs or raises; None takes the first that can.
    Returns:
        (B, S_local, H, Dv) in q.dtype; accumulated in fp32 (float64 for float64). Rows that may attend to nothing
        are 0.
    Raises:
        ArgumentError: when an argument is not allowed; LayoutError, MaskError when a layout or a mask does not fit.
        BackendError: when the backend cannot run this call.
        DisagreementError: when the ranks' arguments differ. All of these on every rank, before anything is
            sent, on the first call of a signature (shapes, dtypes, options); later calls of it are not compared.
    Communication: in each step a rank sends a block of keys/values, rows x H_kv x (D + Dv) elements per batch row; a
        block stops at the last rank that needs it, after W - 1 steps at most. Backward sends the blocks again, and
        their gradients in the accumulation dtype, which take one transfer more to return to the owner. Where it is
        fewer bytes (as with as many kv heads as heads), queries rotate in backward instead: rows x H x (D + Dv + 2)
        elements, and their gradients.
    Source: Liu et al. 2023, arXiv:2310.01889; the ring of rings Gu et al. 2024, arXiv:2406.18485.
    """
    return attention(
        "ring_attention", q, k, v, group, "ring", Score(scale, softcap, sink),
        mask=mask, layout=layout, kv_layout=kv_layout, backend=backend,
    )[0]  # fmt: skip


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
    """Returns the output of `ring_attention` and the log-sum-exp of each row's scores, both differentiable.

    It has the arguments, errors and communication of `ring_attention`.

    Returns:
        out, (B, S_local, H, Dv) in q.dtype, and lse, (B, H, S_local), natural log, fp32 (float64 for float64);
        lse includes the sink, and is -inf for rows that attend to nothing.
    """
    return attention(
        "ring_attention", q, k, v, group, "ring", Score(scale, softcap, sink),
        mask=mask, layout=layout, kv_layout=kv_layout, backend=backend, returns_lse=True,
    )  # fmt: skip


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
    """Attention of this rank's queries over gathered keys/values: only the rows that they may attend to are received.

    A sliding window costs its halo, and packed documents cost only what crosses a boundary. The result and its
    gradients are the same as with `ring_attention`.

    It takes the arguments of `ring_attention`, with a group of one axis, and

    Args:
        stages: the number of parts in which rows are received; a part is computed while the next is in flight. With n
            parts a rank holds 2 / n of the received rows at a time.
    Returns:
        (B, S_local, H, Dv) in q.dtype, as in `ring_attention`.
    Raises:
        ArgumentError: as in `ring_attention`; and when `stages` is not a positive integer.
    Communication: a rank receives each row that one of its queries (in any batch row) may see and that it does not
        hold, once: H_kv x (D + Dv) elements per batch row. Backward receives the rows again, and sends their gradients
        back in the accumulation dtype; or it does so for queries, where that is fewer bytes.
    Source: the all-gather of Llama 3, Dubey et al. 2024, arXiv:2407.21783, without rows that no query needs.
    """
    return attention(
        "gather_attention", q, k, v, group, "gather", Score(scale, softcap, sink),
        mask=mask, layout=layout, kv_layout=kv_layout, backend=backend, stages=stages,
    )[0]  # fmt: skip


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
    """Returns the output of `gather_attention` and the log-sum-exp of each row's scores, both differentiable.

    It has the arguments, errors and communication of `gather_attention`.

    Returns:
        out and lse, as in `ring_attention_with_lse`.
    """
    return attention(
        "gather_attention", q, k, v, group, "gather", Score(scale, softcap, sink),
        mask=mask, layout=layout, kv_layout=kv_layout, backend=backend, stages=stages, returns_lse=True,
    )  # fmt: skip


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
    """Attention of some heads over the whole sequence on each rank: an all-to-all before it, and one after it.

    Query heads are sharded over the ranks as evenly as possible; a kv head is replicated on all ranks that use it. The
    result and its gradients are the same as with `ring_attention`.

    It takes the arguments of `ring_attention`, with a group of one axis, and

    Args:
        stages: the number of parts in which a rank's heads are computed; the heads of the next part are in flight
            meanwhile, and memory falls with more parts. A kv head whose query heads are in several parts is sent in
            each of them.
    Returns:
        (B, S_local, H, Dv) in q.dtype, as in `ring_attention`.
    Raises:
        ArgumentError: as in `ring_attention`; and when `stages` is not a positive integer.
    Communication: a rank sends its rows of the heads of all other ranks, of q, k and v; and the other ranks' rows of
        the output and lse of its own heads. Backward sends q, k, v, the output's gradient, lse and one number per row,
        and returns the gradients (of replicated kv heads in the accumulation dtype).
    Source: Jacobs et al. 2023, arXiv:2309.14509.
    """
    return attention(
        "ulysses_attention", q, k, v, group, "ulysses", Score(scale, softcap, sink),
        mask=mask, layout=layout, kv_layout=kv_layout, backend=backend, stages=stages,
    )[0]  # fmt: skip


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
    """Returns the output of `ulysses_attention` and the log-sum-exp of each row's scores, both differentiable.

    It has the arguments, errors and communication of `ulysses_attention`.

    Returns:
        out and lse, as in `ring_attention_with_lse`.
    """
    return attention(
        "ulysses_attention", q, k, v, group, "ulysses", Score(scale, softcap, sink),
        mask=mask, layout=layout, kv_layout=kv_layout, backend=backend, stages=stages, returns_lse=True,
    )  # fmt: skip


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
    """Attention over a mesh of two axes: heads are sharded along one, and keys/values rotate along the other.

    Along "ulysses", an all-to-all gathers the rows of the axis for some heads on each rank; along "ring", the keys and
    values of these heads rotate. Ranks are numbered row by row: rank = ring coordinate x ulysses ranks + ulysses
    coordinate; layouts are over all ranks. The result and its gradients are the same as with
    `ring_attention`.

    It takes the arguments of `ring_attention`, but a mesh instead of the group, and

    Args:
        mesh: a 2-D DeviceMesh with the axes ("ring", "ulysses").
        stages: as in `ulysses_attention`.
    Returns:
        (B, S_local, H, Dv) in q.dtype, as in `ring_attention`.
    Raises:
        ArgumentError: as in `ring_attention`; and when `stages` is not a positive integer, or the mesh has other axes.
    Communication: as `ulysses_attention` along the one axis, and as `ring_attention` along the other.
    Source: Fang and Zhao 2024, arXiv:2405.07719.
    """
    return attention(
        "hybrid_attention", q, k, v, mesh, "hybrid", Score(scale, softcap, sink),
        mask=mask, layout=layout, kv_layout=kv_layout, backend=backend, stages=stages,
    )[0]  # fmt: skip


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
    """Returns the output of `hybrid_attention` and the log-sum-exp of each row's scores, both differentiable.

    It has the arguments, errors and communication of `hybrid_attention`.

    Returns:
        out and lse, as in `ring_attention_with_lse`.
    """
    return attention(
        "hybrid_attention", q, k, v, mesh, "hybrid", Score(scale, softcap, sink),
        mask=mask, layout=layout, kv_layout=kv_layout, backend=backend, stages=stages, returns_lse=True,
    )  # fmt: skip
