"""What decoding and prefill have in common: options, checks, and comparing notes before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
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
    """What a call asks for besides its tensors."""

    operation: str
    mask: Mask | None
    scale: float | None
    softcap: float | None
    backend: str | None


class CacheCall(NamedTuple):
    """What is asked of a cache: the arguments of decoding and of prefill."""

    q: Tensor
    k: Tensor
    v: Tensor
    sink: Tensor | None
    cache: DistributedKVCache
    layer: int
    extension: SlotAllocation
    options: CacheOptions


def prepare_call(
    call: CacheCall,
    *,
    key: Hashable,
    check: Callable[[], None],
    select: Callable[[str | None, ProblemSpec], Kernel],
    alike: Callable[[Kernel], Mapping[str, str]],
) -> tuple[Kernel, Score]:
    """Checks a call, compares notes with the other ranks, and returns what runs it.

    Args:
        call: what is asked for.
        key: its signature, the same on every rank; see `agree`.
        check: raises unless queries and extension suit the operation and each other.
        select: finds the kernel in the operation's table.
        alike: what all ranks of the operation must have in common besides options, heads and the cache's form.
    """

    q, k, v, sink, cache, layer, extension, options = call

    def prepare() -> tuple[Mapping[str, str], tuple[Kernel, Score]]:
        cache.check(layer, extension)
        score = check_queries(q, sink, cache, options.scale, options.softcap)
        if options.mask is not None and not isinstance(options.mask, Mask):
            raise ArgumentTypeError(f"mask={options.mask!r:.200}: must be a Mask such as sliding_window(99), or None")
        check()
        form = cache.form
        cache.check_new("k", k, extension, form.head_dim)
        cache.check_new("v", v, extension, form.v_head_dim)
        asked = ProblemSpec(
            q.device.type, q.dtype, q.shape[2], form.num_kv_heads, form.head_dim, form.v_head_dim, False, score
        )
        kernel = select(options.backend, asked)
        digest = None if options.mask is None else options.mask.digest
        sink_shape = None if sink is None else tuple(sink.shape)
        told = {"the call": f"{options} {digest} heads={q.shape[2]} sink={sink_shape} {form}"}
        return {**told, **alike(kernel)}, (kernel, score)

    cache.check(layer, extension)
    return agree(cache.team, key, prepare)


def hashable_key(key: Hashable) -> Hashable | None:
    """Returns a key, or None if something in it cannot be told apart by a hash."""
    try:
        hash(key)
    except TypeError:
        return None
    return key


def check_queries(
    q: Tensor, sink: Tensor | None, cache: DistributedKVCache, scale: float | None, softcap: float | None
) -> Score:
    """Checks queries and options against a cache; returns the resolved score."""
    form = cache.form
    if not isinstance(q, Tensor) or q.ndim != 4:
        raise ArgumentError("q: must be a tensor (batch, tokens, heads, head_dim)")
    if q.dtype != form.dtype or q.device.type != cache.device.type:
        raise ArgumentError(f"q is {q.dtype} on {q.device}: the cache is {form.dtype} on {cache.device}")
    heads = q.shape[2]
    if heads < 1 or heads % form.num_kv_heads:
        raise ArgumentError(f"q has {heads} heads: must be a multiple of the {form.num_kv_heads} kv heads of the cache")
    if q.shape[3] != form.head_dim:
        raise ArgumentError(f"q has head_dim {q.shape[3]}: the cache has {form.head_dim}")
    if sink is not None and (not isinstance(sink, Tensor) or sink.shape != (heads,) or not sink.is_floating_point()):
        raise ArgumentError(f"sink: must be a floating tensor ({heads},), one logit per query head, or None")
    return Score(scale, softcap).resolve(form.head_dim)
