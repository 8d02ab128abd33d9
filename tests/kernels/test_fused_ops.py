"""The CUDA forms of the fused operations cannot run here; what they hand to torch, and in which order, can be seen."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ringattn.kernels.fused_ops import CudaFlash, CudnnFlash, DenseOperands, FusedOp

# (batch, heads, rows, dim), all different, keys more than queries: a tensor in another's place shows.
BATCH, HEADS, Q_ROWS, K_ROWS, DIM = 1, 2, 8, 16, 64
SCALE = 0.37


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers what fused attention operations were given, by the names of their schemas."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[str, dict[str, Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if "attention" in name:
            # Torch leaves out what equals the default.
            wanted = func._schema.arguments
            defaults = {argument.name: argument.default_value for argument in wanted}
            given = dict(zip(defaults, args, strict=False))
            self.calls[name] = {**defaults, **given, **kwargs}
        return func(*args, **kwargs)


def meta(rows: int, *last: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(BATCH, HEADS, rows, *last, dtype=dtype, device="meta")


@pytest.fixture
def t() -> types.SimpleNamespace:
    return types.SimpleNamespace(
        q=meta(Q_ROWS, DIM),
        k=meta(K_ROWS, DIM),
        v=meta(K_ROWS, DIM),
        out=meta(Q_ROWS, DIM),
        dout=meta(Q_ROWS, DIM),
        lse=meta(Q_ROWS, dtype=torch.float32),
    )


OPS: list[tuple[FusedOp, str]] = [
    (CudaFlash(), "_scaled_dot_product_flash_attention"),
    (CudnnFlash(), "_scaled_dot_product_cudnn_attention"),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("op", "name"), OPS, ids=["flash", "cudnn"])
def test_forward(op: FusedOp, name: str, causal: bool, t: types.SimpleNamespace) -> None:
    with Recorder() as seen:
        out, lse = op.forward(DenseOperands(t.q, t.k, t.v, causal, None, SCALE))
    assert (out.shape, out.dtype) == (t.q.shape, torch.bfloat16)
    assert (lse.shape, lse.dtype) == (t.q.shape[:3], torch.float32)
    given = seen.calls[name]
    assert given["query"] is t.q
    assert given["key"] is t.k
    assert given["value"] is t.v
    assert given["dropout_p"] == 0.0
    assert given["is_causal"] is causal
    assert given["return_debug_mask"] is False
    assert given["scale"] == SCALE
    if name == OPS[1][1]:
        assert given["attn_bias"] is None
        assert given["compute_log_sumexp"] is True


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("op", "name"), OPS, ids=["flash", "cudnn"])
def test_backward(op: FusedOp, name: str, causal: bool, t: types.SimpleNamespace) -> None:
    with Recorder() as seen:
        grads = op.backward(DenseOperands(t.q, t.k, t.v, causal, None, SCALE), t.dout, t.out, t.lse)
    assert [(g.shape, g.dtype) for g in grads] == [(x.shape, torch.bfloat16) for x in (t.q, t.k, t.v)]
    given = seen.calls[f"{name}_backward"]
    for argument, tensor in {"grad_out": t.dout, "query": t.q, "key": t.k, "value": t.v, "out": t.out}.items():
        assert given[argument] is tensor, argument
    # Flash takes (B, H, S); cuDNN takes, and gives, (B, H, S, 1).
    assert given["logsumexp"].shape == (t.lse.shape if name == OPS[0][1] else (*t.lse.shape, 1))
    assert given["logsumexp"].dtype == torch.float32
    assert (given["max_q"], given["max_k"]) == (Q_ROWS, K_ROWS)
    assert given["cum_seq_q"] is None
    assert given["cum_seq_k"] is None
    assert given["dropout_p"] == 0.0
    assert given["is_causal"] is causal
    assert given["scale"] == SCALE
    assert given.get("attn_bias") is None
    # Without dropout nothing reads the state of the random numbers.
    assert given["philox_seed"].numel() == given["philox_offset"].numel() == 0


@pytest.mark.parametrize("name", [name + end for _, name in OPS for end in ("", "_backward")])
def test_torch_has_the_operations(name: str) -> None:
    """Under the names of arguments that the tests above look for."""
    schema = getattr(torch.ops.aten, name).default._schema
    names = {argument.name for argument in schema.arguments}
    wanted = {"query", "key", "value", "dropout_p", "is_causal", "scale"}
    backward = {"grad_out", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "philox_seed"}
    assert wanted | (backward if name.endswith("_backward") else {"return_debug_mask"}) <= names
