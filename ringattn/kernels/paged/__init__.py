"""Kernels over pages, for decoding: PAGED_BACKENDS, an ordered table like BACKENDS."""

from __future__ import annotations

from functools import lru_cache

from ringattn.kernels.contract import ProblemSpec
from ringattn.kernels.paged.native_paged import NativePaged
from ringattn.kernels.paged.paged_contract import PagedKernel, PageTables, Pools, VisibleKeys
from ringattn.kernels.paged.reference_paged import ReferencePaged
from ringattn.kernels.paged.triton_paged import TritonPaged
from ringattn.kernels.select_kernel import select_from

__all__ = ["PAGED_BACKENDS", "PageTables", "PagedKernel", "Pools", "VisibleKeys", "select_paged"]

# In order of preference. A new kernel is one line here.
PAGED_BACKENDS: dict[str, PagedKernel] = {
    kernel.name: kernel for kernel in (NativePaged(), TritonPaged(), ReferencePaged())
}


@lru_cache(maxsize=256)
def select_paged(backend: str | None, problem: ProblemSpec) -> PagedKernel:
    """Returns the kernel for a problem: the named one, or the first of PAGED_BACKENDS that can run it.

    Raises:
        BackendError: when the backend is unknown, or cannot run the problem, with every reason.
    """
    return select_from(PAGED_BACKENDS, backend, problem)
