"""Kernels over pages, for decoding. PAGED_BACKENDS is an ordered table, as BACKENDS is."""

from __future__ import annotations

from functools import lru_cache

from ringattn.kernels.choice import choose
from ringattn.kernels.contract import Call
from ringattn.kernels.paged.contract import PagedKernel, PageTables, Sight
from ringattn.kernels.paged.native import NativePaged
from ringattn.kernels.paged.reference import ReferencePaged
from ringattn.kernels.paged.triton import TritonPaged

__all__ = ["PAGED_BACKENDS", "PageTables", "PagedKernel", "Sight", "select_paged"]

# In the order of preference. A new kernel is one line here.
PAGED_BACKENDS: dict[str, PagedKernel] = {
    kernel.name: kernel for kernel in (NativePaged(), TritonPaged(), ReferencePaged())
}


@lru_cache(maxsize=256)
def select_paged(backend: str | None, call: Call) -> PagedKernel:
    """Returns the kernel for a call; see choice.choose."""
    return choose(PAGED_BACKENDS, backend, call)
