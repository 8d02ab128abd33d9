"""Mends triton's interpreter: a pytest plugin, for processes started with TRITON_INTERPRET=1.

Triton 3.6 has no bfloat16 there to speak of (its products are those of the bits, its casts cut off), and its loops
cannot have bounds from memory, since numpy 2.4 does not take an array of one element for an integer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

# Where a mask hides them, rows may hold NaN, and probabilities overflow; the logarithm of nothing is -inf. A GPU does
# not warn of it.
np.seterr(over="ignore", invalid="ignore", divide="ignore")

_Handle = interpreter.TensorHandle
_Builder = interpreter.InterpreterBuilder
_patch_tensor, _create_dot, _cast = interpreter._patch_lang_tensor, _Builder.create_dot, _Builder.cast_impl
_start = interpreter.GridExecutor.__call__
_patched: set[Any] = set()


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _widened(x: Any) -> Any:
    """A bfloat16 handle in float32, which holds its values and their products exactly."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    return _Handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    return _create_dot(self, _widened(a), _widened(b), d, input_precision, max_num_imprecise_acc)


def _cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
    if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.array(src.data)).to(torch.bfloat16)
        return _Handle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
    return _cast(self, _widened(src) if dst_type.scalar == tl.float32 else src, dst_type)


def _call(self: Any, *args: Any, **options: Any) -> Any:
    if self.fn not in _patched:
        _patched.add(self.fn)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **options)


def _launch(self: Any, *args: Any, **options: Any) -> Any:
    _patched.clear()
    return _start(self, *args, **options)


interpreter._patch_lang_tensor = _patch_lang_tensor
# Functions that a kernel calls are patched once in a launch, not at every call: that would take half of the time.
interpreter.InterpretedFunction.__call__ = _call
interpreter.GridExecutor.__call__ = _launch
_Builder.create_dot = _dot
_Builder.cast_impl = _cast_impl
