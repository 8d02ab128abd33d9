"""Runs the library ring-flash-attn (github.com/zhuzilin/ring-flash-attention, written against 0.1.8) on CPUs.

The installed package is imported: its own code does the schedule, the merge of blocks and all communication. It is made
for CUDA, so three things are replaced, each only where the original is missing:

* `flash_attn` is replaced during the import. `_flash_attn_forward` and `_flash_attn_backward` call torch's CPU kernel
  or our native one. They return new gradients where flash_attn fills buffers, so each block's gradients are copied
  once: O(S D) work beside O(S^2 D), and the only cost that the library would not have on CUDA. Dropout, windows,
  softcap, ALiBi and GQA are refused. All other names of flash_attn import, and raise when called.
* `ring_flash_attn.adapters`, which needs `transformers`, is replaced by an empty module during the import.
* `torch.empty`, as seen by the library's zigzag module alone, returns buffers whose `.to` always copies. The library
  makes its gradient accumulators with `buffer.to(torch.float32)` and goes on writing to the buffer. In fp32, which
  flash_attn does not take, that is the same tensor, and the gradients would be wrong.

The library merges partial results with `torch.jit.script`: warm it up with the timed shapes. It cannot run backward on
one rank, because it sends to itself.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import internals
from ringattn.geometry.tiles import Tile, Tiles
from ringattn.kernels import BACKENDS

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

_NAME, _PACKAGE = "ring-flash-attn", "ring_flash_attn"
_aten = torch.ops.aten


def zigzag_ring_flash_attention(group: dist.ProcessGroup | None = None, backend: str = "sdpa") -> Attention | str:
    """Returns the library's causal zigzag attention over a group, or the reason why it cannot run.

    The function takes this rank's (B, S_local, H, D) tensors in zigzag order (of 2W chunks, rank r holds chunks r and
    2W-1-r) and is differentiable. `backend` names the kernel of its blocks: "sdpa" is torch's, "native" is ours.
    """
    if not dist.is_initialized():
        return "torch.distributed is not initialized"
    if dist.get_world_size(group) < 2:
        return f"{_NAME} cannot run backward on one rank: it sends to itself"
    if _installed("flash_attn") and dist.get_backend(group) == "gloo":
        return "flash_attn is installed, and its kernels do not take CPU tensors"
    if reasons := BACKENDS[backend].available():
        return f"{backend}: {'; '.join(reasons)}"
    library = _load()
    if isinstance(library, str):
        return library

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # The library looks up its functions once, at its import. Its backward precedes the next forward.
        _Current.backend = backend
        return library(q, k, v, causal=True, group=group)

    return attention


class _Current:
    backend = "sdpa"


@functools.cache
def _load() -> Callable[..., Tensor] | str:
    """Imports the library over replacements for what is missing; returns its function, or why there is none."""
    if not _installed(_PACKAGE):
        return f"{_NAME} is not installed"
    replaced = [] if _installed("flash_attn") else ["flash_attn", "flash_attn.flash_attn_interface"]
    replaced += [] if _installed("transformers") else [f"{_PACKAGE}.adapters"]
    modules = {name: _Unavailable(name) for name in replaced}
    for module in modules.values():
        vars(module).update(_flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward)
    sys.modules.update(modules)  # removed below, so that others still see that flash_attn is missing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit.script
            zigzag = importlib.import_module(f"{_PACKAGE}.zigzag_ring_flash_attn")
        function: Callable[..., Tensor] = zigzag.zigzag_ring_flash_attn_func
    except Exception as error:  # the import of another library may raise anything
        return " ".join(f"{_NAME} cannot be imported: {type(error).__name__}: {error}".split())
    finally:
        for name in modules:
            sys.modules.pop(name, None)
    if "flash_attn" in modules:
        vars(zigzag)["torch"] = _TorchWithCopyingBuffers("torch")
    return function


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module that was loaded by hand has no spec
        return True


class _Unavailable(ModuleType):
    """A module that has every public name; a name that is not set on it raises when called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def unavailable(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"{self.__name__}.{name} is not available on CPU")

        return unavailable


class _CopyingBuffer(Tensor):
    """A tensor whose `.to` always copies; results of operations on it are plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().to(*args, **{**kwargs, "copy": True})


class _TorchWithCopyingBuffers(ModuleType):
    """`torch` with another `empty`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty(*args: Any, **kwargs: Any) -> Tensor:
        return torch.empty(*args, **kwargs).as_subclass(_CopyingBuffer)


# The library reads the names and defaults of these two functions with `inspect` and calls them by keyword. They have
# the names and the order of flash_attn 2.7 and later; the parameters must not be keyword-only.


def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1,
    window_size_right: int = -1, softcap: float = 0.0, alibi_slopes: Tensor | None = None, return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:  # fmt: skip
    """Returns out (B, S, H, D), lse (B, H, S) fp32, no mask and no state of random numbers for one block."""
    _check(q, k, causal, dropout_p, softcap, alibi_slopes, window_size_left + 1, window_size_right + 1, return_softmax)
    if _Current.backend == "sdpa":
        heads_first = _heads_first(q, k, v)
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*heads_first, 0.0, causal, scale=softmax_scale)
        return out.transpose(1, 2), lse, None, None
    state = internals.new_state(q)
    internals.forward(BACKENDS[_Current.backend], (q, k, v), _tiles(q, k, causal), state)
    return state.out.to(q.dtype), state.lse, None, None


def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    rng_state: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes the gradients of one block to dq, dk and dv; out and softmax_lse are final."""
    _check(q, k, causal, dropout_p, softcap, alibi_slopes, window_size_left + 1, window_size_right + 1)
    gradients: Iterable[Tensor]
    if _Current.backend == "sdpa":
        inputs = (*_heads_first(dout, q, k, v, out), softmax_lse, 0.0, causal)
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*inputs, scale=softmax_scale)
        gradients = [gradient.transpose(1, 2) for gradient in found]
    else:
        gradients = internals.new_gradients((q, k, v))
        kernel, delta, tiles = BACKENDS[_Current.backend], internals.delta_of(dout, out.float()), _tiles(q, k, causal)
        internals.backward(kernel, (q, k, v), dout, softmax_lse, delta, tiles, gradients)
    for buffer, gradient in zip((dq, dk, dv), gradients, strict=True):
        buffer.copy_(gradient)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """(B, S, H, D) as (B, H, S, D); copied only if D is strided, as in flash_attn's own wrapper."""
    return [(x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in tensors]


def _tiles(q: Tensor, k: Tensor, causal: bool) -> Tiles:
    return Tiles.of(Tile(0, q.shape[1], 0, k.shape[1], -q.shape[1], 0 if causal else k.shape[1]))


def _check(q: Tensor, k: Tensor, causal: bool, *options: object) -> None:
    """Refuses options that the CPU kernels lack, or that mean something else to flash_attn."""
    if any(option is not None and option != 0 for option in options):
        raise NotImplementedError("the CPU kernels have no dropout, softcap, ALiBi or windows, and return no softmax")
    if q.shape[2] != k.shape[2]:
        raise NotImplementedError("the CPU kernels take as many key heads as query heads")
    if causal and q.shape[1] != k.shape[1]:  # torch aligns the mask top left, flash_attn bottom right
        raise NotImplementedError("causal blocks must be square")
