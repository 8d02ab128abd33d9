"""The arguments of decoding and prefill: their checks, and the comparison with the other ranks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from torch import Tensor

from ringattn.cache.kv_cache import DistributedKVCache
from ringattn.cache.pages import SlotAllocation
from ringattn.comm.agreement import agree
from ringattn.errors import ArgumentError, ArgumentTypeError
from ringattn.geometry.masks import Mask
from ringattn.kernels import ProblemSpec
from ringattn.score import Score

Kernel = TypeVar("Kernel")


@dataclass(frozen=True)
class CacheOptions:
    """The options of a call.

    Args:
        operation: the name of the public function.
        mask: None is causal().
        score: scale, softcap and sink, as the caller gave them.
        backend: None selects the first kernel that supports the call.
    """

    operation: str
    mask: Mask | None
    score: Score
    backend: str | None

    def signature(self) -> tuple[object, ...]:
        """Returns what decides a call apart from the contents of the tensors; hashable if the options are."""
        return self.operation, self.mask, self.score.signature(), self.backend


class CacheCall(NamedTuple):
    """The arguments of `decode_attention` or `prefill_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    cache: DistributedKVCache
    layer: int
    extension: SlotAllocation
    options: CacheOptions


def prepare_call(
    call: CacheCall,
    *,
    signature: Hashable,
    check: Callable[[], None],
    select: Callable[[str | None, ProblemSpec], Kernel],
    fingerprint: Callable[[Kernel], Mapping[str, str]],
) -> tuple[Kernel, Score]:
    """Checks a call, compares it with the other ranks, and returns the kernel and the resolved score.

    Args:
        call: the arguments.
        signature: see `agree`.
        check: raises unless the queries and the extension suit the operation and each other.
        select: returns the kernel for a backend name and a problem.
        fingerprint: returns what all ranks must have in common besides the options, the heads and the cache's spec.
    Raises:
        RingAttnError: on every rank, if an argument is not valid or the ranks differ.
    Communication: see `agree`.
    """
    q, k, v, cache, layer, extension, options = call

    def prepare() -> tuple[Mapping[str, str], tuple[Kernel, Score]]:
        cache.check_extension(layer, extension)
        score = _check_queries(q, cache, options.score)
        mask, spec = options.mask, cache.spec
        if mask is not None and not isinstance(mask, Mask):
            raise ArgumentTypeError(f"mask={mask!r:.200}: must be a Mask such as sliding_window(99), or None")
        check()
        cache.check_new_rows("k", k, extension, spec.head_dim)
        cache.check_new_rows("v", v, extension, spec.v_head_dim)
        problem = ProblemSpec(
            q.device.type,
            q.dtype,
            q.shape[2],
            spec.num_kv_heads,
            spec.head_dim,
            spec.v_head_dim,
            False,
            score,
        )
        kernel = select(options.backend, problem)
        digest = None if mask is None else mask.digest
        text = f"{options.operation} mask={mask} #{digest} backend={options.backend} heads={q.shape[2]} {spec}"
        # The result is stored for later calls of this signature, which have other sinks.
        return {"the call": text, **score.describe(), **fingerprint(kernel)}, (kernel, replace(score, sink=None))

    cache.check_extension(layer, extension)
    kernel, score = agree(cache.mesh, signature, prepare)
    return kernel, replace(score, sink=options.score.sink)


def hashable_or_none(signature: Hashable) -> Hashable | None:
    """Returns the signature, or None if a part of it is not hashable."""
    try:
        hash(signature)
    except TypeError:
        return None
    return signature


def _check_queries(q: Tensor, cache: DistributedKVCache, score: Score) -> Score:
    """Checks queries and score against a cache; returns the resolved score."""
    spec = cache.spec
    if not isinstance(q, Tensor) or q.ndim != 4:
        raise ArgumentError("q: must be a tensor (batch, tokens, heads, head_dim)")
    if q.dtype != spec.dtype or q.device.type != cache.device.type:
        raise ArgumentError(f"q is {q.dtype} on {q.device}: the cache is {spec.dtype} on {cache.device}")
    heads = q.shape[2]
    if heads < 1 or heads % spec.num_kv_heads:
        raise ArgumentError(f"q has {heads} heads: must be a multiple of the {spec.num_kv_heads} kv heads of the cache")
    if q.shape[3] != spec.head_dim:
        raise ArgumentError(f"q has head_dim {q.shape[3]}: the cache has {spec.head_dim}")
    sink = score.sink
    if sink is not None and (not isinstance(sink, Tensor) or sink.shape != (heads,) or not sink.is_floating_point()):
        raise ArgumentError(f"sink: must be a floating tensor ({heads},), one logit per query head, or None")
    return score.resolve(spec.head_dim)
