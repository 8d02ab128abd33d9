"""Public ring attention libraries, made to run on CPU so that they can be timed next to ours.

One peer: ``ring_flash_attn`` (distribution ``ring-flash-attn``, github.com/zhuzilin/ring-flash-attention),
written against 0.1.8. Nothing of it is copied here: the installed package is imported, and its own code does
the schedule, the merging of blocks and all communication. It is made for CUDA, so these things are put in its
way, each only where the real one is missing:

* ``flash_attn`` (CUDA only) becomes a stand-in during the import. Its ``_flash_attn_forward`` and
  ``_flash_attn_backward`` call torch's CPU flash attention kernel, or our native one. These return new gradients where
  flash_attn fills buffers, so the stand-in copies each gradient once per block; this is O(S D) work next to
  O(S^2 D), and is the one cost that the library would not have on CUDA. Dropout, windows, softcap, ALiBi and
  grouped heads are refused. All other names of flash_attn (varlen and so on) import, and raise when called.
* ``ring_flash_attn.adapters``, which needs ``transformers``, becomes an empty stand-in during the import. It
  only patches Hugging Face models.
* ``torch.empty``, as seen by the library's zigzag module alone, returns buffers whose ``.to`` always copies.
  The library makes its gradient accumulators with ``buffer.to(torch.float32)`` and goes on writing to the
  buffer. For fp16 and bf16, all that flash_attn takes, this is a copy; for fp32 it is the same tensor, and
  the gradients would be wrong. With this, fp32 takes exactly the steps that bf16 takes anyway.

Not touched: ``triton`` (optional to the library, and not used by this function), ``torch.cuda`` (not called),
and the merge of partial results, which the library compiles with ``torch.jit.script``: call it a few times
with the timed shapes before timing. One rank is refused, as the library's backward then sends to itself.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.geometry.tiles import Tile, Tiles
from ringattn.kernels import BACKENDS, BackwardQueries, Gradients, Keys, Queries
from ringattn.score import Score
from ringattn.softmax import empty_state

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

DISTRIBUTION = "ring-flash-attn"
_PACKAGE = "ring_flash_attn"
_ZIGZAG = f"{_PACKAGE}.zigzag_ring_flash_attn"


def zigzag_ring_flash_attention(group: dist.ProcessGroup | None = None, backend: str = "sdpa") -> Attention | str:
    """Causal ``zigzag_ring_flash_attn_func`` of the installed library over `group`, or why it can't be run.

    The callable takes this rank's (B, S_local, H, D) tensors in zigzag order: of 2W chunks, rank r holds
    chunks r and 2W-1-r. It is differentiable. On CPUs, `backend` says whose kernel computes its blocks: "sdpa" is
    torch's, "native" our own.
    """
    if not dist.is_initialized():
        return "torch.distributed is not initialized"
    if dist.get_world_size(group) < 2:
        return f"{DISTRIBUTION} can't run backward on one rank: it sends to itself"
    if _installed("flash_attn") and dist.get_backend(group) == "gloo":
        return "flash_attn is installed, and its kernels do not take CPU tensors"
    if reasons := BACKENDS[backend].available():
        return f"{backend}: {'; '.join(reasons)}"
    peer = _load()
    if isinstance(peer, str):
        return peer
    library = peer

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # The library looks its functions up once, at its import. Its backward comes before the next forward.
        _Current.kernel = _KERNELS[backend]
        return library(q, k, v, causal=True, group=group)

    return attention


@functools.cache
def _load() -> Callable[..., Tensor] | str:
    """Import the library, over stand-ins for what is missing: its function, or why there is none."""
    if not _installed(_PACKAGE):
        return f"{DISTRIBUTION} is not installed"
    stand_ins: dict[str, ModuleType] = {}
    if not _installed("flash_attn"):
        stand_ins |= _flash_attn_stand_in()
    if not _installed("transformers"):
        stand_ins[f"{_PACKAGE}.adapters"] = _StandIn(f"{_PACKAGE}.adapters")
    try:
        with _in_sys_modules(stand_ins), warnings.catch_warnings():
            # Recent torch deprecates torch.jit.script; where warnings are errors, the import must go on.
            warnings.simplefilter("ignore", DeprecationWarning)
            zigzag = importlib.import_module(_ZIGZAG)
        function: Callable[..., Tensor] = zigzag.zigzag_ring_flash_attn_func
    except Exception as error:  # Whatever a third party's import raises, the benchmark goes on without it.
        return " ".join(f"{DISTRIBUTION} can't be imported: {type(error).__name__}: {error}".split())
    if "flash_attn" in stand_ins:
        vars(zigzag)["torch"] = _TorchWithCopyingBuffers("torch")
    return function


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # It is loaded, but by hand: there is no spec.
        return True


@contextmanager
def _in_sys_modules(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Show `modules` to the import system for a while only.

    The library keeps what it imported. Others, who ask whether flash_attn is there, must not be misled.
    """
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)


class _StandIn(ModuleType):
    """A module that has every public name; what is not set on it raises when called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def unavailable(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"{self.__name__}.{name} is not available on CPU")

        return unavailable


def _flash_attn_stand_in() -> dict[str, ModuleType]:
    package = _StandIn("flash_attn")
    interface = _StandIn("flash_attn.flash_attn_interface")
    package.__path__ = []  # Makes it a package to the import system.
    vars(package)["flash_attn_interface"] = interface
    vars(interface).update(_flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward)
    return {module.__name__: module for module in (package, interface)}


class _CopyingBuffer(Tensor):
    """A tensor whose `.to` never returns the tensor itself; results of operations on it are plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().to(*args, **{**kwargs, "copy": True})


class _TorchWithCopyingBuffers(ModuleType):
    """`torch`, but for `empty`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty(*args: Any, **kwargs: Any) -> Tensor:
        return torch.empty(*args, **kwargs).as_subclass(_CopyingBuffer)


class _Kernel(Protocol):
    """A block kernel as flash_attn has it: out and lse of one block, or its gradients, all new."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
    ) -> Sequence[Tensor]: ...


class _Torch(_Kernel):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *map(_heads_first, (q, k, v)), 0.0, causal, scale=scale
        )
        return out.transpose(1, 2), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
    ) -> Sequence[Tensor]:
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *map(_heads_first, (dout, q, k, v, out)), lse, 0.0, causal, scale=scale
        )
        return [grad.transpose(1, 2) for grad in grads]


class _Native(_Kernel):
    """Ours, from an empty state and into gradients of zero; it needs rowsum(dout * out), as flash_attn's own does."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse = state = empty_state(q, v.shape[3])
        BACKENDS["native"].forward(Queries(q), Keys(k, v), self._tiles(q, k, causal), Score(scale), state)
        return out.to(q.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
    ) -> Sequence[Tensor]:
        grads = Gradients(*(torch.zeros(x.shape) for x in (q, k, v)))
        delta = (dout.float() * out).sum(-1).transpose(1, 2)
        queries, tiles = BackwardQueries(q, dout, lse, delta), self._tiles(q, k, causal)
        BACKENDS["native"].backward(queries, Keys(k, v), tiles, Score(scale), grads)
        return grads

    def _tiles(self, q: Tensor, k: Tensor, causal: bool) -> Tiles:
        return Tiles.of(Tile(0, q.shape[1], 0, k.shape[1], -q.shape[1], 0 if causal else k.shape[1]))


_KERNELS: dict[str, _Kernel] = {"sdpa": _Torch(), "native": _Native()}


class _Current:
    kernel: _Kernel = _KERNELS["sdpa"]


# The library reads the names and defaults of these two with `inspect` and calls them by keyword. The names
# are flash_attn's (2.7 and later); they must stay positional-or-keyword: keyword-only ones are not looked at.


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:
    """(out, lse, no mask, no rng state) of one block; q, k, v, out (B, S, H, D), lse (B, H, S) fp32."""
    if return_softmax:
        raise NotImplementedError("the CPU kernel returns no softmax")
    _check(q, k, dropout_p, causal, (window_size_left, window_size_right), softcap, alibi_slopes)
    return *_Current.kernel.forward(q, k, v, softmax_scale, causal), None, None


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
) -> None:
    """Gradients of one block, into dq, dk and dv; out and softmax_lse are those of the whole row."""
    _check(q, k, dropout_p, causal, (window_size_left, window_size_right), softcap, alibi_slopes)
    grads = _Current.kernel.backward(dout, q, k, v, out, softmax_lse, softmax_scale, causal)
    for buffer, grad in zip((dq, dk, dv), grads, strict=True):
        buffer.copy_(grad)


def _heads_first(x: Tensor) -> Tensor:
    """(B, S, H, D) seen as (B, H, S, D); copied, as in flash_attn's own wrapper, only if D is strided."""
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


def _check(
    q: Tensor,
    k: Tensor,
    dropout_p: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
) -> None:
    """Refuse what the CPU kernel can't do, or does otherwise than flash_attn."""
    if dropout_p or softcap or alibi_slopes is not None or window_size != (-1, -1):
        raise NotImplementedError("the CPU kernel has no dropout, softcap, ALiBi or windows")
    if q.shape[2] != k.shape[2]:
        raise NotImplementedError("the CPU kernel takes as many key heads as query heads")
    if causal and q.shape[1] != k.shape[1]:  # torch aligns the mask top left, flash_attn bottom right.
        raise NotImplementedError("causal blocks must be square")
