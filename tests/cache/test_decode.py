"""Decoding: messages, results on every rank, accuracy in each dtype, and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ringattn
from ringattn import DistributedKVCache, contiguous, zigzag
from ringattn.cache.call_marks import DeviceMarkCheck
from ringattn.errors import DisagreementError
from ringattn.geometry.masks import MaskTerm, register_mask, slice_table
from tests.harness.cases import Tensors, tensors
from tests.harness.compare import assert_within_rule
from tests.harness.oracle import dense_attention, plain_attention
from tests.harness.ranks import RankPool

PROMPT, NEW = 37, 3

Sent = list[tuple[str, int, int]]  # operations on a process group: (name, peer, bytes)


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lists in `sent` every operation on a process group inside the context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: Sent = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        namespace, name = func.name().split("::")
        if name == "send":
            self.sent.append((name, args[2], sum(x.nbytes for x in args[0])))
        elif namespace in ("c10d", "_c10d_functional") and name != "recv_":
            self.sent.append((name, -1, -1))
        return func(*args, **(kwargs or {}))


def filled(group: dist.ProcessGroup, t: Tensors, dtype: torch.dtype, layers: int = 2) -> tuple[DistributedKVCache, int]:
    """A cache with a prompt, sharded by zigzag."""
    cache = DistributedKVCache(
        num_layers=layers, num_kv_heads=t.k.shape[2], head_dim=t.k.shape[3], v_head_dim=t.v.shape[3],
        num_pages=40, page_size=4, dtype=dtype, group=group,
    )  # fmt: skip
    sequence = cache.new()
    layout = zigzag(PROMPT, group.size())
    extension = cache.extend([sequence], layout)
    mine = layout.positions(group.rank())
    for layer in range(layers):
        cache.write(layer, extension, t.k[:, mine], t.v[:, mine])
    return cache, sequence


def new_tensors(dtype: torch.dtype, kv_heads: int = 2) -> Tensors:
    return tensors(5, 1, PROMPT + NEW, PROMPT + NEW, 4, kv_heads, 8, 6, dtype)


def decode_once(group: dist.ProcessGroup, dtype: torch.dtype, by_heads: bool) -> tuple[Tensor, Sent]:
    t = new_tensors(dtype)
    cache, sequence = filled(group, t, dtype)
    attend = ringattn.decode_attention_by_heads if by_heads else ringattn.decode_attention
    q, k, v = (x[:, PROMPT:] for x in t[:3])
    extension = cache.extend([sequence], NEW)
    attend(q, k, v, cache, 0, extension)  # the first call of a signature compares the ranks
    with Counted() as counted:
        out = attend(q, k, v, cache, 1, extension)
    return out, counted.sent


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_one_collective_of_the_bytes_in_the_docs(pool: RankPool, world_size: int, dtype: torch.dtype) -> None:
    size = 8 if dtype == torch.float64 else 4
    row = NEW * (6 + 1) * size
    results = pool.run(decode_once, world_size, dtype, False)
    own = [contiguous(4, world_size).num_tokens(rank) for rank in range(world_size)]
    others = [[peer for peer in range(world_size) if peer != rank] for rank in range(world_size)]
    for rank, (out, sent) in enumerate(results):
        assert torch.equal(out, results[0][0])  # to the bit, on every rank
        assert sent == [("send", peer, 4 * row + 8) for peer in others[rank]]  # one to each, and nothing else
        assert sum(num_bytes for *_, num_bytes in sent) == (world_size - 1) * (NEW * 4 * (6 + 1) * size + 8)
    heads = []
    for rank, (out, sent) in enumerate(pool.run(decode_once, world_size, dtype, True)):
        assert sent == [("send", peer, own[peer] * row + 8) for peer in others[rank]]
        assert sum(num_bytes for *_, num_bytes in sent) == (4 - own[rank]) * row + 8 * (world_size - 1)
        heads.append(out)
    assert torch.equal(torch.cat(heads, 2), results[0][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy_follows_the_dtype(pool: RankPool, dtype: torch.dtype) -> None:
    t = new_tensors(dtype)
    allowed = torch.arange(PROMPT + NEW)[None, :] <= torch.arange(PROMPT, PROMPT + NEW)[:, None]
    q = t.q[:, PROMPT:]
    expected, _ = dense_attention(q, t.k, t.v, allowed)
    plain, _ = plain_attention(q, t.k, t.v, allowed)
    for world_size in (1, 4):
        for out, _ in pool.run(decode_once, world_size, dtype, False):
            assert_within_rule(out, expected, plain, name="out")


def make_wrong(group: dist.ProcessGroup, wrong: str) -> None:
    t = new_tensors(torch.float32)
    cache, sequence = filled(group, t, torch.float32)
    q, k, v = (x[:, PROMPT:] for x in t[:3])
    extension = cache.extend([sequence], NEW)
    options: dict[str, Any] = {"scale": 0.1 + len(wrong)}  # a signature that was not agreed on before
    layer = 0
    last = group.rank() == group.size() - 1
    if wrong == "layer":
        layer = 2
    elif wrong == "stale":
        cache.truncate(sequence, PROMPT)
    elif wrong == "heads":
        q = q[:, :, :3]
    elif wrong == "mask":
        options["mask"] = "causal"
    elif wrong == "two runs":
        options["mask"] = two_runs()
    elif wrong == "backend":
        options["backend"] = "magic"
    elif wrong == "values on one rank":
        v = v[..., :5] if last else v
    elif wrong == "scale on one rank":
        options["scale"] = 0.5 if last else 0.25
    elif wrong == "program of one rank":
        if last:
            cache.free(cache.fork(sequence))
        extension = cache.extend([sequence], NEW)
    elif wrong == "layout of one rank":
        cache.extend([sequence], contiguous(5, group.size()) if last else zigzag(5, group.size()))
    elif wrong == "prefill":
        extension = cache.extend([sequence], contiguous(3 * group.size(), group.size()))
    elif wrong == "no such sequence":
        cache.extend([sequence + 1], 1)
    elif wrong == "no room":
        cache.extend([sequence], 160 * group.size())
    free, pools = cache.num_free_pages, [[p.clone() for p in cache.pools(each)] for each in range(2)]
    length = cache.length(sequence)
    try:
        ringattn.decode_attention(q, k, v, cache, layer, extension, **options)
    finally:
        assert (cache.num_free_pages, cache.length(sequence)) == (free, length)
        if wrong not in ("program of one rank",):
            for each in range(2):
                same = [
                    torch.equal(a.view(torch.int32), b.view(torch.int32))
                    for a, b in zip(cache.pools(each), pools[each], strict=True)
                ]
                assert all(same)


@register_mask(lambda q_len, k_len: slice_table((0, q_len, 0, 1, -1000, 1000), (0, q_len, 3, k_len, -1000, 0)))
def two_runs() -> ringattn.Mask:
    return ringattn.Mask((MaskTerm("two_runs"),))


WRONG = {
    "layer": ("ArgumentError", "layer=2: the cache has layers 0 to 1"),
    "stale": ("ArgumentError", "they have changed since"),
    "heads": ("ArgumentError", "q has 3 heads: must be a multiple of the 2 kv heads"),
    "mask": ("ArgumentTypeError", "mask='causal'"),
    "two runs": ("MaskError", "sees several runs of keys"),
    "backend": ("BackendError", "backend='magic': must be one of"),
    "values on one rank": ("ArgumentError", "v has shape (1, 3, 2, 5): must be (1, 3, 2, 6)"),
    "scale on one rank": ("DisagreementError", "disagree on scale (rank 0: 0.25; rank 1: 0.25; rank 2: 0.5)"),
    "program of one rank": ("DisagreementError", "disagree on the earlier calls on the cache"),
    "layout of one rank": ("DisagreementError", "disagree on this call on the cache"),
    "prefill": ("ArgumentError", "made by a layout"),
    "no such sequence": ("SequenceError", "the cache has no sequence of this number"),
    "no room": ("OutOfPagesError", "no rank has a free page of 4 tokens"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_every_rank_raises_and_nothing_changes(pool: RankPool, wrong: str) -> None:
    kind, message = WRONG[wrong]
    for error in pool.expect_error(make_wrong, 3, wrong):
        assert error.type_name == kind
        assert message in error.message


def decode_a_prefill(group: dist.ProcessGroup) -> None:
    """A known signature, with an extension made by a layout that gives each rank the same number of tokens."""
    t = new_tensors(torch.float32)
    cache, sequence = filled(group, t, torch.float32)
    q, k, v = (x[:, PROMPT:] for x in t[:3])
    ringattn.decode_attention(q, k, v, cache, 0, cache.extend([sequence], NEW))
    shared = cache.extend([sequence], contiguous(NEW * group.size(), group.size()))
    ringattn.decode_attention(q, k, v, cache, 0, shared)


def test_a_known_signature_with_an_extension_of_another_kind_is_refused(pool: RankPool) -> None:
    for error in pool.expect_error(decode_a_prefill, 2):
        assert "made by a layout" in error.message


def disagree_and_go_on(group: dist.ProcessGroup, deferred: bool) -> None:
    """One rank passes another scale, and all ranks know both signatures: only the call marks differ."""
    t = new_tensors(torch.float32)
    q, k, v = (x[:, PROMPT:] for x in t[:3])
    (cache, sequence), (clean, other) = filled(group, t, torch.float32), filled(group, t, torch.float32)
    plain = clean.extend([other], NEW)
    expected = [ringattn.decode_attention(q, k, v, clean, layer, plain, scale=0.5) for layer in (0, 1)]
    ringattn.decode_attention(q, k, v, clean, 1, plain, scale=0.25)
    if deferred:
        cache.mark_check = DeviceMarkCheck(torch.device("cpu"))
    extension = cache.extend([sequence], NEW)
    first = ringattn.decode_attention(q, k, v, cache, 0, extension, scale=0.5)
    free, digest = cache.num_free_pages, cache.pages.history_digest
    stored = [torch.cat([x.flatten() for x in cache.read(layer, sequence)]) for layer in (0, 1)]
    scale = 0.25 if group.rank() == group.size() - 1 else 0.5
    message = "disagree on this call"
    if deferred:
        ringattn.decode_attention(q, k, v, cache, 1, extension, scale=scale)
        for later in (
            cache.check_agreement,
            lambda: cache.extend([sequence], 1),
            lambda: cache.fork(sequence),
            lambda: cache.truncate(sequence, PROMPT),
            lambda: cache.evict(sequence, sinks=1, window=1),
            lambda: cache.free(sequence),
            lambda: cache.cache_prefix(sequence, [1, 2]),
            lambda: cache.match_prefix([1, 2]),
            lambda: ringattn.prefill_attention(q, k, v, cache, 0, extension),
            lambda: ringattn.save_cache(cache, "never written"),
            lambda: ringattn.reshard(cache, num_pages=40, group=group, over=group),
        ):
            with pytest.raises(DisagreementError, match=message):
                later()
            assert cache.pages.is_current(extension)
            ringattn.decode_attention(q, k, v, cache, 1, extension, scale=scale)
        with pytest.raises(DisagreementError, match=message):
            cache.check_agreement()
    else:
        with pytest.raises(DisagreementError, match=message):
            ringattn.decode_attention(q, k, v, cache, 1, extension, scale=scale)
    assert (cache.num_free_pages, cache.length(sequence), cache.pages.history_digest) == (free, PROMPT + NEW, digest)
    cache.check_agreement()
    # The prompt and the layer before are unchanged. The same extension can be used again.
    again = ringattn.decode_attention(q, k, v, cache, 1, extension, scale=0.5)
    assert torch.equal(torch.cat([x.flatten() for x in cache.read(0, sequence)]), stored[0])
    assert all(torch.equal(*pair) for pair in zip((first, again), expected, strict=True))
    # Truncating to before the extension works too.
    cache.truncate(sequence, PROMPT)
    fresh = cache.extend([sequence], NEW)
    assert torch.equal(ringattn.decode_attention(q, k, v, cache, 1, fresh, scale=0.5), expected[1])


@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "later"])
def test_after_a_disagreement_all_goes_on(pool: RankPool, deferred: bool) -> None:
    pool.run(disagree_and_go_on, 3, deferred)


def extend_differently(group: dist.ProcessGroup) -> None:
    """The ranks extended by different numbers of tokens; the next attention raises on all ranks."""
    t = new_tensors(torch.float32)
    cache, sequence = filled(group, t, torch.float32)
    q, k, v = (x[:, -1:] for x in t[:3])
    ringattn.decode_attention(q, k, v, cache, 0, cache.extend([sequence], 1))
    cache.truncate(sequence, PROMPT)
    stored = [torch.cat([x.flatten() for x in cache.read(layer, sequence)]) for layer in (0, 1)]
    if group.rank() == 0:
        cache.extend([sequence], 2)
        cache.truncate(sequence, PROMPT)
    extension = cache.extend([sequence], 1)
    with pytest.raises(DisagreementError, match="earlier calls"):
        ringattn.decode_attention(q, k, v, cache, 0, extension)
    cache.truncate(sequence, PROMPT)
    for layer in (0, 1):
        assert torch.equal(torch.cat([x.flatten() for x in cache.read(layer, sequence)]), stored[layer])


def test_another_number_of_tokens_is_found_by_the_next_attention(pool: RankPool) -> None:
    pool.run(extend_differently, 2)


def ask_for_another_known_call(group: dist.ProcessGroup) -> None:
    """All ranks know all signatures; a message of an unexpected size is recognised by its mark."""
    t = new_tensors(torch.float32)
    attend: list[Callable[..., Tensor]] = [ringattn.decode_attention, ringattn.decode_attention_by_heads]
    news = [[x[:, PROMPT : PROMPT + count] for x in t[:3]] for count in (1, NEW)]
    last = group.rank() == group.size() - 1
    for which in (0, 1):
        # Each cache decodes one token before the group has seen larger messages, or after.
        caches = [filled(group, t, torch.float32) for _ in range(2)]
        expected = {}
        for number, new in enumerate(news):
            for cache, sequence in caches[:: 1 - 2 * number]:
                extension = cache.extend([sequence], new[0].shape[1])
                expected[number] = [each(*new, cache, 0, extension) for each in attend]
                cache.truncate(sequence, PROMPT)
        for cache, sequence in caches:
            for turn in ((which, 1 - which), (1 - which, which)):
                new = news[turn[last]]
                extension = cache.extend([sequence], new[0].shape[1])
                with pytest.raises(DisagreementError, match=r"earlier calls.*new tokens"):
                    attend[which](*new, cache, 0, extension)
                cache.truncate(sequence, PROMPT)
                # The histories of the ranks differ from here on, so the test goes on with a new cache.
                cache, sequence = filled(group, t, torch.float32)
            extension = cache.extend([sequence], NEW)
            with pytest.raises(DisagreementError, match="this call: the operation"):
                attend[last](*news[1], cache, 0, extension)
            assert torch.equal(attend[which](*news[1], cache, 0, extension), expected[1][which])


@pytest.mark.parametrize("world_size", [2, 3])
def test_messages_of_other_sizes_are_recognised(pool: RankPool, world_size: int) -> None:
    pool.run(ask_for_another_known_call, world_size)
