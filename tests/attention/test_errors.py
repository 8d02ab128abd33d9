"""What callers get wrong: the same error on every rank, before anything is sent, and a group that goes on working."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn.comm import messages
from tests.attention.problem import operations_of_c10d
from tests.harness import oracle
from tests.harness.cases import tensors
from tests.harness.compare import assert_close
from tests.harness.ranks import RankPool

SEQ_LEN = 11
Options = dict[str, Any]


class Wrong(NamedTuple):
    """A mistake: what it changes in a good call, and the error it must raise."""

    change: Callable[[Options], object]
    error: str
    message: str  # a pattern: the argument, its value, what is allowed


def put(**changes: Callable[[Options], object]) -> Callable[[Options], object]:
    return lambda o: o.update({name: make(o) for name, make in changes.items()})


def put_values(**values: object) -> Callable[[Options], object]:
    return lambda o: o.update(values)


def world_of(o: Options) -> int:
    layout: ringattn.Layout = o["layout"]
    return layout.world_size


WRONG: dict[str, Wrong] = {
    "q has a row too many": Wrong(
        put(q=lambda o: torch.cat([o["q"], o["q"][:, :1]], 1) if o["q"].shape[1] else o["q"].new_ones(2, 1, 4, 6)),
        "LayoutError",
        r"q has \d+ rows, but layout=zigzag\(11, \d\) gives rank \d \d+ positions; pass the layout",
    ),
    "k and v have a row too few": Wrong(
        put(k=lambda o: o["k"][:, 1:], v=lambda o: o["v"][:, 1:]), "LayoutError", r"k has \d+ rows, but layout="
    ),
    "v has other rows than k": Wrong(
        put(v=lambda o: o["v"][:, 1:]), "ArgumentError", r"k has .*, but v has .*the same"
    ),
    "k has another dtype": Wrong(
        put(k=lambda o: o["k"].float()), "ArgumentError", "k has dtype torch.float32, but q has torch.float64.*the same"
    ),
    "v has another dtype": Wrong(
        put(v=lambda o: o["v"].half()), "ArgumentError", "v has dtype torch.float16, but q has torch.float64.*the same"
    ),
    "integers": Wrong(
        put(**{name: lambda o, name=name: o[name].long() for name in "qkv"}),
        "ArgumentError",
        "q has dtype torch.int64: must be one of torch.float64, torch.float32, torch.bfloat16, torch.float16",
    ),
    "heads not a multiple": Wrong(
        put(q=lambda o: o["q"][:, :, :3]), "ArgumentError", "q has 3 heads and k, v have 2.*multiple of the kv heads"
    ),
    "no heads": Wrong(put(q=lambda o: o["q"][:, :, :0]), "ArgumentError", "q has 0 heads and k, v have 2"),
    "no kv heads": Wrong(
        put(k=lambda o: o["k"][:, :, :0], v=lambda o: o["v"][:, :, :0]), "ArgumentError", "4 heads and k, v have 0"
    ),
    "k and v of other heads": Wrong(put(v=lambda o: o["v"][:, :, :1]), "ArgumentError", "k has .* 2.*v has .* 1"),
    "head dims differ": Wrong(
        put(k=lambda o: o["k"][..., :5]), "ArgumentError", "k has head_dim 5, but q has 6: must be the same"
    ),
    "no head dim": Wrong(
        put(q=lambda o: o["q"][..., :0], k=lambda o: o["k"][..., :0]),
        "ArgumentError",
        "head dims 0 .*must be 1 or more",
    ),
    "batches differ": Wrong(
        put(k=lambda o: o["k"][:1]), "ArgumentError", "k has batch size 1, but q has 2: must be the same"
    ),
    "q of 3 dims": Wrong(
        put(q=lambda o: o["q"][0]), "ArgumentError", r"q has shape \(\d+, 4, 6\): must have 4 dims \(batch, rows, heads"
    ),
    "v of 5 dims": Wrong(put(v=lambda o: o["v"][None]), "ArgumentError", r"v has shape \(1, .*must have 4 dims"),
    "k is a list": Wrong(put_values(k=[1.0, 2.0]), "ArgumentTypeError", r"k=\[1.0, 2.0\]: must be a tensor.*not list"),
    "q is None": Wrong(put_values(q=None), "ArgumentTypeError", "q=None: must be a tensor.*not NoneType"),
    "scale is NaN": Wrong(put_values(scale=float("nan")), "ArgumentError", "scale=nan: must be finite"),
    "scale is infinite": Wrong(put_values(scale=float("-inf")), "ArgumentError", "scale=-inf: must be finite"),
    "scale is text": Wrong(
        put_values(scale="0.5"), "ArgumentTypeError", "scale='0.5': must be a number or None, not str"
    ),
    "scale is a bool": Wrong(put_values(scale=True), "ArgumentTypeError", "scale=True: must be a number.*not bool"),
    "scale is a tensor": Wrong(
        lambda o: o.update(scale=torch.tensor(0.5)), "ArgumentTypeError", r"scale=tensor\(0.5.*a number.*not Tensor"
    ),
    "softcap is negative": Wrong(
        put_values(softcap=-30.0), "ArgumentError", "softcap=-30.0: must be positive, or None"
    ),
    "softcap is zero": Wrong(put_values(softcap=0), "ArgumentError", "softcap=0.*: must be positive, or None"),
    "softcap is NaN": Wrong(put_values(softcap=float("nan")), "ArgumentError", "softcap=nan: must be finite"),
    "softcap is text": Wrong(put_values(softcap="x"), "ArgumentTypeError", "softcap='x': must be a number"),
    "layout of another world": Wrong(
        put(layout=lambda o: ringattn.zigzag(SEQ_LEN, world_of(o) + 1)),
        "LayoutError",
        r"layout=zigzag\(11, \d\): made for \d ranks, but the group has \d; make it with world_size=\d",
    ),
    "layout is a name": Wrong(put_values(layout="zigzag"), "ArgumentError", "layout='zigzag': must be a Layout"),
    "kv_layout is a number": Wrong(put_values(kv_layout=3), "ArgumentError", "kv_layout=3: must be a Layout"),
    "kv_layout of another world": Wrong(
        put(kv_layout=lambda o: ringattn.striped(SEQ_LEN, world_of(o) + 2)),
        "LayoutError",
        r"kv_layout=striped.*made for",
    ),
    "kv_layout of another length": Wrong(
        put(kv_layout=lambda o: ringattn.zigzag(40, world_of(o))),
        "LayoutError",
        r"k has \d+ rows, but kv_layout=zigzag\(40, \d\) gives rank \d \d+ positions; pass the kv_layout",
    ),
    "mask is a name": Wrong(
        put_values(mask="causal"), "ArgumentError", r"mask='causal': must be a Mask such as causal\(\)"
    ),
    "mask is a function": Wrong(
        put(mask=lambda o: ringattn.causal), "ArgumentError", "mask=<function causal.*must be a Mask"
    ),
    "mask is a tensor": Wrong(
        lambda o: o.update(mask=torch.ones(2, 2)), "ArgumentError", r"mask=tensor\(.*must be a Mask"
    ),
    "a list with None": Wrong(
        put(mask=lambda o: [ringattn.causal(), None]), "ArgumentError", r"mask=\[.*a list of them"
    ),
    "a mask too many": Wrong(
        put(mask=lambda o: [ringattn.causal()] * 3),
        "MaskError",
        "list of 3 masks, but the batch has 2 rows; give one each",
    ),
    "documents too short": Wrong(
        put(mask=lambda o: ringattn.documents([0, 4, 10])),
        "MaskError",
        "cu_seqlens ends at 10, but there are 11 .*must add up to the length of the whole sequence",
    ),
    "documents too long": Wrong(
        put(mask=lambda o: [ringattn.causal(), ringattn.documents([0, 12])]), "MaskError", "cu_seqlens ends at 12, but"
    ),
    "unknown backend": Wrong(
        put_values(backend="flash9"), "BackendError", "backend='flash9': must be one of .*'sdpa'.*None"
    ),
    "backend is a number": Wrong(put_values(backend=3), "BackendError", "backend=3: must be one of .*'sdpa'"),
    "backend that cannot": Wrong(
        put_values(backend="sdpa", softcap=20.0),
        "BackendError",
        "backend='sdpa' cannot run.*sdpa: has no softcap.*backend=None",
    ),
    "backend of another device": Wrong(
        put_values(backend="cudnn"), "BackendError", "backend='cudnn' cannot run this call"
    ),
    "sink of another shape": Wrong(
        lambda o: o.update(sink=torch.zeros(2)),
        "ArgumentError",
        r"sink has shape \(2,\).*must be \(4,\), one logit per",
    ),
    "sink of 2 dims": Wrong(lambda o: o.update(sink=torch.zeros(1, 4)), "ArgumentError", r"sink has shape \(1, 4\)"),
    "sink of integers": Wrong(
        lambda o: o.update(sink=torch.zeros(4, dtype=torch.int32)),
        "ArgumentError",
        "dtype torch.int32.*of a floating dtype",
    ),
    "sink is a number": Wrong(
        put_values(sink=0.5), "ArgumentTypeError", "sink=0.5: must be a tensor.*or None, not float"
    ),
}

# What each of these changes is a good call by itself, but not beside what the other ranks ask for.
OTHER: dict[str, tuple[Callable[[Options], object], str]] = {
    "dtype": (put(**{n: lambda o, n=n: o[n].float() for n in "qkv"}), "dtype"),
    "batch size": (put(**{n: lambda o, n=n: o[n][:1] for n in "qkv"}), "the batch size"),
    "heads": (put(q=lambda o: o["q"][:, :, :2]), "heads, kv heads, head dim, value head dim"),
    "value head dim": (put(v=lambda o: o["v"][..., :3]), "heads, kv heads, head dim, value head dim"),
    "mask": (put(mask=lambda o: ringattn.full()), "mask"),
    "documents": (put(mask=lambda o: ringattn.documents([0, 5, 11])), "mask"),
    "masks": (put(mask=lambda o: [ringattn.causal(), ringattn.full()]), "mask"),
    "layout": (
        # The same numbers of rows, but other positions.
        put(
            layout=lambda o: ringattn.Layout(
                SEQ_LEN,
                tuple(
                    tuple(range(SEQ_LEN - r.stop, SEQ_LEN - r.start) for r in own) for own in o["layout"].rank_ranges
                ),
                o["layout"].name,
            )
        ),
        "layout",
    ),
    "scale": (put(scale=lambda o: o["scale"] * 2), "scale"),
    "default scale": (put_values(scale=None), "scale"),
    "softcap": (put_values(softcap=20.0), "softcap"),
    "backend": (put_values(backend="reference"), "backend"),
    "sink": (lambda o: o.update(sink=torch.zeros(4, dtype=torch.float64)), "sink"),
    "q requires a gradient": (put(q=lambda o: o["q"].requires_grad_()), "which of q, k, v, sink require gradients"),
    "v requires a gradient": (put(v=lambda o: o["v"].requires_grad_()), "which of q, k, v, sink require gradients"),
}


@contextlib.contextmanager
def counted_sends() -> Iterator[list[object]]:
    """Within it, every batch of point-to-point messages leaves an entry."""
    calls: list[object] = []
    original = messages.start

    def counting(group: dist.ProcessGroup, operations: Sequence[messages.Operation]) -> list[messages.PendingMessage]:
        calls.append(operations)
        return original(group, operations)

    messages.start = counting
    try:
        yield calls
    finally:
        messages.start = original


def good_call(group: dist.ProcessGroup, scale: float) -> Options:
    """A call that no other test has made: the ranks must not have agreed on it before."""
    layout = ringattn.zigzag(SEQ_LEN, group.size())
    t = tensors(5, 2, SEQ_LEN, SEQ_LEN, 4, 2, 6, 6, torch.float64)
    q, k, v = (ringattn.shard(x, layout, group) for x in t[:3])
    return {"q": q, "k": k, "v": v, "group": group, "mask": ringattn.causal(), "layout": layout, "scale": scale}


def call_wrongly(
    group: dist.ProcessGroup, name: str, others: bool, ranks: tuple[int, ...], scale: float
) -> tuple[str, str, list[str]]:
    """The error's class, message and bases on this rank; checks that nothing was sent, and that the group works."""
    options = good_call(group, scale)
    if group.rank() in ranks:
        change = OTHER[name][0] if others else WRONG[name].change
        change(options)
    with counted_sends() as sends, pytest.raises(ringattn.RingAttnError) as caught:
        ringattn.ring_attention(**options)
    assert not sends

    options = good_call(group, scale)
    with counted_sends() as sends:
        out = ringattn.ring_attention(**options)
    assert len(sends) > 0 or group.size() == 1, "the count counts nothing"
    t = tensors(5, 2, SEQ_LEN, SEQ_LEN, 4, 2, 6, 6, torch.float64)
    exact, _ = oracle.dense_attention(*t[:3], torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril(), scale=scale)
    assert_close(out, ringattn.shard(exact, options["layout"], group), atol=1e-10, name="out after the error")
    return type(caught.value).__name__, str(caught.value), [kind.__name__ for kind in type(caught.value).__mro__]


_scales = itertools.count(1)


def fresh_scale() -> float:
    return 0.3 + next(_scales) / 1024


@pytest.mark.parametrize("name", list(WRONG))
def test_mistakes(pool: RankPool, name: str) -> None:
    """On one rank alone, and on all of them, in groups of one to four."""
    wrong = WRONG[name]
    for world_size, ranks in ((1, (0,)), (2, (1,)), (3, (0, 1, 2)), (4, (0,)), (4, (1, 3))):
        told = pool.run(call_wrongly, world_size, name, False, ranks, fresh_scale())
        assert {kind for kind, _, _ in told} == {wrong.error}
        assert {"RingAttnError", "ValueError"} <= set(told[0][2])
        (message,) = {message for _, message, _ in told}
        assert re.search(wrong.message, message, re.DOTALL), message
        if len(ranks) < world_size:
            assert message.startswith(f"on rank {ranks[0]} of {world_size}: ")


@pytest.mark.parametrize("name", list(OTHER))
def test_disagreements(pool: RankPool, name: str) -> None:
    for world_size, rank in ((2, 1), (3, 0), (4, 2)):
        told = pool.run(call_wrongly, world_size, name, True, (rank,), fresh_scale())
        assert {kind for kind, _, _ in told} == {"DisagreementError"}
        assert "ValueError" in told[0][2]
        (message,) = {message for _, message, _ in told}
        assert f"disagree on {OTHER[name][1]} (rank 0: " in message
        assert all(f"rank {other}: " in message for other in range(world_size))


def disagree_on_kv_layout(group: dist.ProcessGroup) -> None:
    options = good_call(group, 0.25)
    kind = ringattn.striped if group.rank() else ringattn.contiguous
    k = torch.randn(2, 4, 2, 6, dtype=torch.float64)
    ringattn.ring_attention(**{**options, "k": k, "v": k, "kv_layout": kind(4 * group.size(), group.size())})


def test_disagreement_on_kv_layout(pool: RankPool) -> None:
    for error in pool.expect_error(disagree_on_kv_layout, 3):
        assert error.type_name == "DisagreementError"
        assert "disagree on kv_layout (rank 0: contiguous(12, 3)" in error.message


def disagree_on_grad_mode(group: dist.ProcessGroup) -> None:
    options = good_call(group, 0.2)
    options["q"].requires_grad_()
    with torch.set_grad_enabled(group.rank() == 0):
        ringattn.ring_attention(**options)


def test_disagreement_on_grad_mode(pool: RankPool) -> None:
    errors = pool.expect_error(disagree_on_grad_mode, 2)
    assert {error.type_name for error in errors} == {"DisagreementError"}
    assert "require gradients" in errors[0].message


def unequal_shards(group: dist.ProcessGroup) -> None:
    q = torch.randn(1, 5 + group.rank(), 2, 4)
    ringattn.ring_attention(q, q, q, group)


def test_without_a_layout_shards_are_equal(pool: RankPool) -> None:
    """Ranks of unlike lengths and no layout: their ideas of the whole differ."""
    errors = pool.expect_error(unequal_shards, 3)
    assert {error.type_name for error in errors} == {"DisagreementError"}
    assert "disagree on layout" in errors[0].message


def traffic(group: dist.ProcessGroup) -> list[set[str]]:
    """Which operations of torch.distributed the first and the later calls of a signature use, backward included."""
    found = []
    options = good_call(group, 0.77)
    for name in "qkv":
        options[name].requires_grad_()
    for _ in range(3):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            out = ringattn.ring_attention(**options)
            torch.autograd.grad(out, [options[name] for name in "qkv"], torch.ones_like(out))
        found.append(operations_of_c10d(profile))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_only_messages_after_the_first_call(pool: RankPool, world_size: int) -> None:
    """No collective, no barrier: only sends and receives between two ranks."""
    for first, *later in pool.run(traffic, world_size):
        messages = set() if world_size == 1 else {"c10d::send", "c10d::recv_"}
        assert (first - messages != set()) == (world_size > 1), "the profile does not show collectives"
        assert later == [messages] * 2


def call_an_exchange(group: dist.ProcessGroup, operations: list[str], stages: object) -> None:
    """Every rank calls the operation that stands at its place, the last with these stages."""
    options = good_call(group, fresh_scale())
    del options["scale"]
    last = group.rank() == group.size() - 1
    getattr(ringattn, f"{operations[group.rank()]}_attention")(**options, stages=stages if last else 2)


@pytest.mark.parametrize("operation", ["gather", "ulysses"])
@pytest.mark.parametrize("stages", [0, -1, 1.5, True, "2", None], ids=repr)
def test_stages_are_positive_integers(pool: RankPool, operation: str, stages: object) -> None:
    for error in pool.expect_error(call_an_exchange, 3, [operation] * 3, stages):
        assert error.type_name == "ArgumentError"
        assert error.message == f"on rank 2 of 3: stages={stages!r}: must be an integer of 1 or more"


def test_disagreement_on_stages_and_on_the_exchange(pool: RankPool) -> None:
    for error in pool.expect_error(call_an_exchange, 2, ["gather"] * 2, 3):
        assert error.type_name == "DisagreementError"
        assert "disagree on stages (rank 0: 2; rank 1: 3)" in error.message
    for error in pool.expect_error(call_an_exchange, 2, ["gather", "ulysses"], 2):
        assert error.type_name == "DisagreementError"
        assert "disagree on the operation (rank 0: gather_attention" in error.message
