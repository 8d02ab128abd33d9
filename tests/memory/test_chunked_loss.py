"""Chunked cross-entropy equals torch's on the whole logits."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.profiling import peak_bytes
from ringattn.errors import ArgumentError
from ringattn.memory import chunked_cross_entropy
from tests.harness.compare import assert_close, assert_within_rule
from tests.harness.poison import poisoned_empty

ATOL = 1e-10


@dataclass(frozen=True)
class Case:
    rows: tuple[int, ...]
    vocab_size: int = 13
    dim: int = 5
    chunk: int = 4
    bias: bool = False
    reduction: str = "mean"
    num_items: float | None = None
    scale: float = 1.0
    softcap: float | None = None
    valid: float = 0.7


CASES = [
    Case((2, 7)),
    Case((11,), bias=True, chunk=1),
    Case((3, 1, 5), chunk=100, reduction="sum"),
    Case((1, 9), num_items=37.0, bias=True, chunk=3),
    Case((2, 5), softcap=0.7, bias=True, scale=1.7),
    Case((2, 5), scale=0.3, num_items=4.0),
    Case((2, 0), bias=True),
    Case((0,), reduction="sum"),
    Case((2, 6), valid=0.0, bias=True),
    Case((8,), vocab_size=1, valid=1.0),
]


def problem(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(*case.rows, case.dim, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(case.vocab_size, case.dim, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(case.vocab_size, dtype=torch.float64).to(dtype).requires_grad_() if case.bias else None
    labels = torch.randint(case.vocab_size, case.rows).where(torch.rand(case.rows) < case.valid, -100)
    return hidden, weight, bias, labels


def dense(case: Case, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Torch's loss on the whole logits."""
    logits = F.linear(hidden, weight, bias) * case.scale
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    total = F.cross_entropy(logits.flatten(0, -2).to(dtype), labels.flatten(), reduction="sum")
    if case.reduction == "sum":
        return total
    return total / (case.num_items or max(1, int((labels != -100).sum())))


def chunked(case: Case, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    options = {"reduction": case.reduction, "num_items": case.num_items, "scale": case.scale, "softcap": case.softcap}
    return chunked_cross_entropy(hidden, weight, labels, bias=bias, chunk=case.chunk, **options)  # type: ignore[arg-type]


def results(loss: Tensor, *inputs: Tensor | None, factor: float = -1.3) -> list[Tensor]:
    wanted = [x for x in inputs if x is not None]
    return [loss.detach(), *torch.autograd.grad(loss * factor, wanted)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_torch_on_whole_logits(case: Case) -> None:
    hidden, weight, bias, labels = problem(case)
    expected = results(dense(case, hidden, weight, bias, labels), hidden, weight, bias)
    with poisoned_empty():
        found = results(chunked(case, hidden, weight, bias, labels), hidden, weight, bias)
    for name, a, b in zip(("loss", "dhidden", "dweight", "dbias"), found, expected, strict=False):
        assert_close(a, b, atol=ATOL, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [53, 20000])
def test_lower_precision(dtype: torch.dtype, vocab_size: int) -> None:
    """A vocabulary of 20,000 is larger than VOCAB_CHUNK."""
    case = Case((3, 33), vocab_size=vocab_size, dim=24, chunk=16, bias=True, softcap=5.0)
    inputs = problem(case, dtype)
    doubles = [None if x is None else x.detach().double().requires_grad_() for x in inputs[:3]]
    assert doubles[0] is not None
    assert doubles[1] is not None
    expected = results(dense(case, doubles[0], doubles[1], doubles[2], inputs[3]), *doubles)
    plain = results(dense(case, *inputs), *inputs[:3])
    found = results(chunked(case, *inputs), *inputs[:3])
    assert found[0].dtype == torch.float32
    for name, a, b, c in zip(("loss", "dhidden", "dweight", "dbias"), found, expected, plain, strict=True):
        assert_within_rule(a, b, c, name=name)


def test_a_small_factor_does_not_underflow_in_half_precision() -> None:
    """A loss divided by 2**24 tokens, and scaled up again as by a gradient scaler, keeps its gradients."""
    case = Case((64,), vocab_size=7, chunk=16, valid=1.0)
    hidden, weight, _, labels = problem(case, torch.float16)
    loss = chunked_cross_entropy(hidden, weight, labels, num_items=2.0**24) * 2.0**24
    found = torch.autograd.grad(loss, [hidden, weight])
    expected = torch.autograd.grad(chunked_cross_entropy(hidden, weight, labels, reduction="sum"), [hidden, weight])
    for name, a, b in zip(("dhidden", "dweight"), found, expected, strict=True):
        assert_close(a, b, atol=0.0, name=name)


def test_autocast_casts_like_a_linear_layer() -> None:
    case = Case((2, 40), vocab_size=31, dim=16, chunk=7, bias=True)
    inputs = problem(case, torch.float32)
    doubles = [None if x is None else x.detach().double().requires_grad_() for x in inputs[:3]]
    assert doubles[0] is not None
    assert doubles[1] is not None
    expected = results(dense(case, doubles[0], doubles[1], doubles[2], inputs[3]), *doubles)
    with torch.autocast("cpu", torch.bfloat16):
        plain_loss, loss = dense(case, *inputs), chunked(case, *inputs)
    plain, found = results(plain_loss, *inputs[:3]), results(loss, *inputs[:3])
    assert float((found[1] - expected[1]).abs().max()) > 1e-4, "computed in fp32, not in bf16"
    for name, a, b, c in zip(("loss", "dhidden", "dweight", "dbias"), found, expected, plain, strict=True):
        assert_within_rule(a, b, c, name=name)


def test_no_gradient_where_none_is_required() -> None:
    case = Case((2, 5))
    hidden, weight, bias, labels = problem(case)
    (expected,) = torch.autograd.grad(dense(case, hidden, weight, bias, labels), [hidden])
    loss = chunked(case, hidden, weight.detach(), bias, labels)
    (found,) = torch.autograd.grad(loss, [hidden])
    assert_close(found, expected, atol=ATOL, name="dhidden")
    with torch.no_grad():
        assert not chunked(case, hidden, weight, bias, labels).requires_grad


def test_a_second_backward_raises() -> None:
    loss = chunked(Case((4,)), *problem(Case((4,))))
    torch.autograd.backward(loss, retain_graph=True)
    with pytest.raises(RuntimeError, match="freed"):
        torch.autograd.backward(loss)


def test_losses_of_ranks_add_up_with_global_num_items() -> None:
    """Rows split in two, one part without a valid label, and num_items as a tensor."""
    case = Case((10,), valid=1.0)
    hidden, weight, _, labels = problem(case)
    labels[6:] = -100
    shares = [
        chunked_cross_entropy(hidden[rows], weight, labels[rows], num_items=torch.tensor(6))
        for rows in (slice(0, 6), slice(6, 10))
    ]
    assert float(shares[1].detach()) == 0.0
    assert_close(shares[0] + shares[1], F.cross_entropy(hidden @ weight.T, labels), atol=ATOL, name="loss")


def test_peak_memory_excludes_whole_logits() -> None:
    rows, vocab_size, dim = 2048, 4096, 16
    hidden = torch.randn(rows, dim, requires_grad=True)
    weight = torch.randn(vocab_size, dim, requires_grad=True)
    labels = torch.randint(vocab_size, (rows,))

    def once(chunk: int) -> None:
        torch.autograd.grad(chunked_cross_entropy(hidden, weight, labels, chunk=chunk), [hidden, weight])

    logits = 4 * rows * vocab_size
    assert peak_bytes(lambda: once(rows)) >= logits
    # The logits of a chunk, the gradients, and a margin.
    assert peak_bytes(lambda: once(64)) <= logits / 32 + 4 * 4 * dim * (rows + vocab_size) + 65536


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels have shape"),
        ({"labels": torch.zeros(4)}, "labels are torch.float32"),
        ({"weight": torch.zeros(13, 4)}, "weight has shape"),
        ({"bias": torch.zeros(5)}, "bias has shape"),
        ({"weight": torch.zeros(13, 5, dtype=torch.bfloat16)}, "dtypes differ"),
        ({"chunk": 0}, "chunk=0"),
        ({"reduction": "none"}, "reduction='none'"),
        ({"reduction": "sum", "num_items": 3}, "num_items=3"),
        ({"softcap": -1.0}, "softcap=-1.0"),
    ],
    ids=str,
)
def test_errors(change: dict[str, object], message: str) -> None:
    given = {"hidden": torch.zeros(4, 5), "weight": torch.zeros(13, 5), "labels": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ArgumentError, match=message):
        chunked_cross_entropy(**{**given, **change})  # type: ignore[arg-type]
