"""Kernels: attention of one rank. BACKENDS is an ordered table; `select` takes the first that can run a problem."""

from __future__ import annotations

from functools import lru_cache

from ringattn.kernels.contract import BackwardQueries, BlockKernel, Gradients, Keys, ProblemSpec, Queries, State
from ringattn.kernels.flash import FlashKernel
from ringattn.kernels.flash_ops import Flash2, Flash3, Flash4
from ringattn.kernels.fused_ops import CpuFlash, CudaFlash, CudnnFlash
from ringattn.kernels.native import NativeKernel
from ringattn.kernels.reference import ReferenceKernel
from ringattn.kernels.sdpa import FusedKernel
from ringattn.kernels.select_kernel import reasons_against, select_from
from ringattn.kernels.triton import TritonKernel

__all__ = [
    "BACKENDS",
    "BackwardQueries",
    "BlockKernel",
    "Gradients",
    "Keys",
    "ProblemSpec",
    "Queries",
    "State",
    "refusals",
    "select",
]

# In order of preference. A new kernel is one line here.
BACKENDS: dict[str, BlockKernel] = {
    kernel.name: kernel
    for kernel in (
        NativeKernel(),
        FusedKernel("sdpa", "torch's flash attention on CPU and CUDA; no softcap", (CpuFlash(), CudaFlash())),
        FusedKernel("cudnn", "cuDNN's flash attention, through torch; no softcap", (CudnnFlash(),)),
        TritonKernel(),
        FlashKernel(
            "flash4", "flash-attn 4, if installed: Hopper and Blackwell; packed masks and windows in one call", Flash4()
        ),
        FlashKernel("flash3", "flash-attn 3, if installed: Hopper; packed masks and windows in one call", Flash3()),
        FlashKernel(
            "flash2", "flash-attn 2, if installed: from Ampere on; packed masks and windows in one call", Flash2()
        ),
        ReferenceKernel(),
    )
}


def refusals(name: str, problem: ProblemSpec) -> list[str]:
    """Returns every reason why a backend cannot run a problem: reasons of this machine, else of the problem."""
    return reasons_against(BACKENDS[name], problem)


@lru_cache(maxsize=256)
def select(backend: str | None, problem: ProblemSpec) -> BlockKernel:
    """Returns the kernel for a problem: the named one, or the first of BACKENDS that can run it.

    Raises:
        BackendError: when the backend is unknown, or cannot run the problem, with every reason.
    """
    return select_from(BACKENDS, backend, problem)
