"""Floor 2: what computes one rank's share. BACKENDS is an ordered table; `select` takes the first that can."""

from __future__ import annotations

from functools import lru_cache

from ringattn.errors import BackendError
from ringattn.kernels.contract import BlockKernel, Call, Spec
from ringattn.kernels.flash import FlashKernel
from ringattn.kernels.flash_ops import Flash2, Flash3, Flash4
from ringattn.kernels.fused_ops import CpuFlash, CudaFlash, CudnnFlash
from ringattn.kernels.native import NativeKernel
from ringattn.kernels.reference import ReferenceKernel
from ringattn.kernels.sdpa import FusedKernel
from ringattn.kernels.triton import TritonKernel

__all__ = ["BACKENDS", "BlockKernel", "Call", "Spec", "refusals", "select"]

# In the order of preference. A new kernel is one line here.
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


def refusals(name: str, call: Call) -> list[str]:
    """Returns every reason why backend `name` cannot run `call`: of this machine, else of the call; empty if it can."""
    kernel = BACKENDS[name]
    return kernel.available() or kernel.unsupported(call)


@lru_cache(maxsize=256)
def select(backend: str | None, call: Call) -> BlockKernel:
    """Returns the kernel for a call.

    Args:
        backend: a key of BACKENDS, which is taken or refused but never replaced; None takes the first that can.
        call: what is to be run.
    Raises:
        BackendError: when the backend is unknown, or cannot run the call, with every reason.
    """
    if backend is not None and backend not in BACKENDS:
        raise BackendError(f"backend={backend!r}: must be one of {', '.join(map(repr, BACKENDS))}, or None")
    names = list(BACKENDS) if backend is None else [backend]
    reasons = {name: refusals(name, call) for name in names}
    for name in names:
        if not reasons[name]:
            return BACKENDS[name]
    told = "; ".join(f"{name}: {' and '.join(why)}" for name, why in reasons.items())
    raise BackendError(
        f"backend={backend!r} cannot run this call ({told}). "
        "Pass backend=None for the first kernel that can, or change what it refuses"
    )
