"""The adapters to FlashAttention over stand-ins: the whole contract, and what each generation does its own way."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from ringattn.geometry.tiles import Tiles
from ringattn.kernels import BACKENDS, ProblemSpec, flash, flash_ops, refusals, varlen
from ringattn.kernels.flash import FlashKernel
from ringattn.kernels.flash_import import interface_mismatch
from ringattn.kernels.flash_ops import Flash2, Flash3, Flash4
from ringattn.kernels.varlen import Window
from ringattn.score import Score
from ringattn.softmax import merge_
from tests.kernels.contract_suite import CASES, LARGE, Case, check, forward, tile
from tests.kernels.flash_standins import installed, module2, module3, module4

GENERATIONS = ("flash2", "flash3", "flash4")


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    with installed(module2(), module3(), module4()):
        yield


# No segment of more than one query, but some of none: the keys between.
SINGLES = tuple(tile(range(i, i + 1), range(i, i + 1)) for i in range(0, 11, 2))
# More queries than keys, and more to the right of the diagonal than there are keys; or all to the right of it.
TALL = tile(range(300), range(100), hi=50), tile(range(300), range(100), lo=-260)
DOCUMENTS = tuple(tile(range(a, b), range(a, b), hi=0) for a, b in ((0, 4), (4, 5), (5, 11)))
WINDOWS = tuple(tile(range(a, b), range(a, b), -3, 0) for a, b in ((0, 2), (3, 11)))
# Keys in the other order than queries, and keys that two share.
CROSSED = tuple(tile(range(a, a + 3), range(b, b + 4)) for a, b in ((0, 6), (4, 0), (8, 2)))
# Each step takes the keys of the one before, or its queries.
STAIRCASE = (
    tuple(tile(range(i, i + 2), range(i)) for i in range(2, 11, 2)),
    tuple(tile(range(i, 13), range(i, i + 1)) for i in range(5)),
)

OWN = (
    Case("single queries", (SINGLES,), heads=4, kv_heads=2, batch=1),
    Case("single queries of some batch rows", (tuple(t._replace(batch=1) for t in SINGLES),), batch=3),
    *(replace(LARGE, name=f"tall {i}", blocks=((t,),), cols=100, batch=1 + i) for i, t in enumerate(TALL)),
    Case("packed documents", (DOCUMENTS,), heads=4, kv_heads=2),
    Case("packed documents with gradients of lse", (DOCUMENTS,), lse_grad=True, zero_dout=True),
    Case("packed documents, strided", (DOCUMENTS, WINDOWS), strided=True, previous=True),
    Case("packed windows of different lengths", (WINDOWS,)),
    Case("crossed", (CROSSED,), batch=3),
    *(Case(f"staircase {i}", (t,), cols=12, heads=4, kv_heads=2) for i, t in enumerate(STAIRCASE)),
    Case("packed documents, bfloat16", (DOCUMENTS, WINDOWS), dtype=torch.bfloat16, dim=64, v_dim=64),
    Case("latent heads", (DOCUMENTS,), dim=136, v_dim=100, lse_grad=True),
    Case("wide heads", (DOCUMENTS,), dim=200, v_dim=180),
    Case("no head dim left for gradients of lse", (DOCUMENTS,), dim=16, v_dim=256, lse_grad=True),
)
ALL = tuple(case for case in CASES if case.dtype is not torch.float32) + OWN


@pytest.mark.parametrize("case", ALL, ids=[case.name for case in ALL])
@pytest.mark.parametrize("name", GENERATIONS)
def test_case(name: str, case: Case) -> None:
    check(name, "cpu", case)


def named(name: str) -> Case:
    return next(case for case in ALL if case.name == name)


def mutate_merge(patch: pytest.MonkeyPatch) -> None:
    """Rows without keys merged as they come: FlashAttention-2 says lse = +inf."""

    def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: Tensor | None = None) -> None:
        merge_(out, lse, part, part_lse)

    patch.setattr(flash, "merge_part_", merge)


def mutate_alignment(patch: pytest.MonkeyPatch) -> None:
    """Windows counted from the first query and key."""
    real = varlen._segments

    def segments(tiles: Tiles, batch: int, num_q: int, num_k: int) -> list[varlen._Segment]:
        found = []
        for s in real(tiles, batch, num_q, num_k):
            surplus = (s.k_stop - s.k_start) - (s.q_stop - s.q_start)
            found.append(s._replace(left=max(s.left - surplus, 0), right=max(s.right + surplus, 0)))
        return found

    patch.setattr(varlen, "_segments", segments)


def mutate_causal(patch: pytest.MonkeyPatch) -> None:
    """Causal whatever the window's right end is."""
    patch.setattr(Window, "causal", property(lambda window: window.left is None and window.right is not None))


def mutate_lse_layout(patch: pytest.MonkeyPatch) -> None:
    """lse of packed rows, the batch before the heads."""
    patch.setattr(
        flash, "_pack_lse", lambda x, segments: x.contiguous() if segments is None else x.reshape(x.shape[1], -1)
    )


def mutate_single_queries(patch: pytest.MonkeyPatch) -> None:
    """FlashAttention-2 told of segments of one query."""
    real = Flash2._varlen_kwargs

    def told(self: Flash2, segments: flash_ops.VarlenArgs, window: Window) -> dict[str, object]:
        return real(self, segments, window) | {"max_seqlen_q": segments.max_q}

    patch.setattr(Flash2, "_varlen_kwargs", told)


def mutate_lengths(patch: pytest.MonkeyPatch) -> None:
    """FlashAttention-2 told of fewer keys than a limit reaches over."""
    real = Flash2._varlen_kwargs

    def told(self: Flash2, segments: flash_ops.VarlenArgs, window: Window) -> dict[str, object]:
        return real(self, segments, window) | {"max_seqlen_k": segments.max_k}

    patch.setattr(Flash2, "_varlen_kwargs", told)


def mutate_dense(patch: pytest.MonkeyPatch) -> None:
    """A tall window without segments."""
    patch.setattr(varlen, "_fits_dense_call", lambda segment, window: True)


def mutate_no_limit(patch: pytest.MonkeyPatch) -> None:
    """FlashAttention-4 told of no limit as the others are."""
    real = flash_ops._window_kwargs
    patch.setattr(flash_ops, "_window_kwargs", lambda window, unlimited: real(window, -1))


def mutate_delta(patch: pytest.MonkeyPatch) -> None:
    """An out of zeros for kernels that compute delta from it."""
    patch.setattr(flash, "out_for_delta", lambda dout, delta, column: torch.zeros_like(dout))


def mutate_dlse(patch: pytest.MonkeyPatch) -> None:
    """The column of the others for FlashAttention-4, and no gradient of lse."""
    patch.setattr(Flash4, "takes_dlse", False)
    patch.setattr(flash, "out_for_delta", lambda dout, delta, column: torch.zeros_like(dout))


MUTATIONS: tuple[tuple[Callable[[pytest.MonkeyPatch], None], str, str], ...] = (
    (mutate_merge, "flash2", "single queries"),
    *((mutate_alignment, name, "causal") for name in GENERATIONS),
    *((mutate_causal, name, "causal") for name in GENERATIONS),
    *((mutate_lse_layout, name, "packed documents") for name in GENERATIONS),
    (mutate_single_queries, "flash2", "single queries"),
    (mutate_lengths, "flash2", "tall 0"),
    (mutate_lengths, "flash2", "tall 1"),
    (mutate_dense, "flash2", "tall 0"),
    (mutate_no_limit, "flash4", "tall 0"),
    (mutate_delta, "flash2", "packed documents"),
    (mutate_delta, "flash3", "gradients of lse"),
    (mutate_dlse, "flash4", "packed documents"),
)


@pytest.mark.parametrize(
    ("mutate", "name", "case"), MUTATIONS, ids=[f"{m.__name__}, {n}, {c}" for m, n, c in MUTATIONS]
)
def test_a_mistake_is_caught(
    mutate: Callable[[pytest.MonkeyPatch], None], name: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-ins are as peculiar as the kernels: what an adapter overlooks shows."""
    check(name, "cpu", named(case))
    with monkeypatch.context() as patch:
        mutate(patch)
        varlen.varlen_launches.cache_clear()
        with pytest.raises(AssertionError):
            check(name, "cpu", named(case))
    varlen.varlen_launches.cache_clear()


def test_refuses_what_it_cannot_take() -> None:
    call = ProblemSpec("cuda", torch.bfloat16, 4, 2, 128, 128, True, Score(0.1, 30.0))
    for name in GENERATIONS:
        kernel = BACKENDS[name]
        assert kernel.unsupported(call) == []
        assert kernel.unsupported(replace(call, head_dim=192)) == []
        assert kernel.unsupported(replace(call, device_type="cpu")) == ["runs on cuda, not on cpu"]
        told = kernel.unsupported(ProblemSpec("cuda", torch.float64, 4, 2, 257, 64, True, Score(0.0)))
        assert len(told) == 3
        for words in ("float64", "257", "positive scale"):
            assert sum(words in reason for reason in told) == 1


@pytest.mark.parametrize(
    ("name", "capability", "wanted"),
    [
        ("flash2", (7, 5), "compute capability 8.0 and newer"),
        ("flash3", (8, 0), "compute capability 9.0"),
        ("flash3", (10, 0), "compute capability 9.0"),
        ("flash4", (8, 9), "compute capabilities 9.0 to 12.x"),
        ("flash2", (8, 0), None),
        ("flash2", (12, 0), None),
        ("flash3", (9, 0), None),
        ("flash4", (9, 0), None),
        ("flash4", (10, 3), None),
    ],
)
def test_devices(name: str, capability: tuple[int, int], wanted: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    told = f"is made for {wanted}, not {capability[0]}.{capability[1]}"
    assert BACKENDS[name].available() == ([] if wanted is None else [told])


def test_softcap_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    call = ProblemSpec("cuda", torch.bfloat16, 4, 2, 128, 128, True, Score(0.1, 30.0))
    assert BACKENDS["flash4"].unsupported(call) == ["has no gradient of softcap on compute capability 12.0"]
    for other in (replace(call, needs_grad=False), replace(call, score=Score(0.1))):
        assert BACKENDS["flash4"].unsupported(other) == []


@pytest.mark.parametrize(("name", "capability"), [("flash3", (9, 0)), ("flash4", (12, 0))])
def test_determinism(name: str, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    call = ProblemSpec("cuda", torch.bfloat16, 4, 2, 256, 256, True, Score(0.1))
    assert BACKENDS[name].unsupported(call) == []
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert [reason[:30] for reason in BACKENDS[name].unsupported(call)] == ["has no deterministic gradients"]
    assert BACKENDS[name].unsupported(replace(call, needs_grad=False)) == []


def test_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """An MI300 calls itself 9.4, which is not Hopper's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for name in GENERATIONS:
        assert BACKENDS[name].available() == ["runs on NVIDIA GPUs, not on AMD's"]


def test_another_version() -> None:
    older = ModuleType("flash_attn.cute.interface")
    older._flash_attn_fwd = module4()._flash_attn_fwd  # type: ignore[attr-defined]
    with installed(older):
        assert "has no _flash_attn_bwd" in str(interface_mismatch(Flash4.module, Flash4.functions))
        older._flash_attn_bwd = lambda q, cu_seqlens_q, window_size_left, softcap, dq: None  # type: ignore[attr-defined]
        assert "_flash_attn_bwd has no dlse" in str(interface_mismatch(Flash4.module, Flash4.functions))
    for op in (Flash2, Flash3, Flash4):
        assert interface_mismatch(op.module, op.functions) is None


def test_torch_operators_tell_their_parameters() -> None:
    """FlashAttention 2 and 3 are wrapped in torch's custom operators."""
    module = module3()

    @torch.library.custom_op("ringattn_tests::flash_backward", mutates_args=())
    def _flash_attn_backward(q: Tensor, window_size: int) -> Tensor:
        return q.clone()

    module._flash_attn_backward = _flash_attn_backward  # type: ignore[attr-defined]
    with installed(module):
        assert "has no cu_seqlens_q" in str(interface_mismatch(Flash3.module, Flash3.functions))


def test_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FlashKernel("flash9", "", Flash2())
    monkeypatch.setattr(Flash2, "module", "flash_attn_that_nobody_has.interface")
    assert kernel.available()[0] == "flash_attn_that_nobody_has is not installed"


IMPORTS = """
import sys
import torch
import ringattn, ringattn.cli
from ringattn.kernels import BACKENDS, ProblemSpec, refusals, select
from ringattn.score import Score
from ringattn.kernels.flash_import import interface_mismatch
print(ringattn.cli.info())
select(None, ProblemSpec("cpu", torch.bfloat16, 4, 2, 64, 64, True, Score(0.1)))
assert not [name for name in sys.modules if name.startswith("flash_attn")], "imported before it was asked for"
for name in ("flash2", "flash3", "flash4"):
    op = BACKENDS[name].op
    print(interface_mismatch(op.module, op.functions))
"""


def test_import_is_lazy_and_told_of_when_broken(tmp_path: Path) -> None:
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("import flash_attn_2_cuda\n")
    (tmp_path / "flash_attn_interface.py").write_text("raise OSError('undefined symbol: x\\nmore')\n")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{IMPORTS}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *_, second, third, fourth = done.stdout.splitlines()
    assert second == fourth == "flash_attn_2_cuda is not installed"
    assert third == "importing flash_attn_interface fails: OSError: undefined symbol: x"
    assert "unavailable: torch sees no CUDA device" in done.stdout or torch.cuda.is_available()


@pytest.mark.parametrize("name", GENERATIONS)
def test_nothing_is_copied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for a rectangle within a larger batch, nor for packed rows."""
    kernel = BACKENDS[name]
    assert isinstance(kernel, FlashKernel)
    seen: list[int] = []
    real = type(kernel.op).forward

    def forward_once(self: flash_ops.FlashOp, operands: flash_ops.FlashOperands) -> tuple[Tensor, Tensor]:
        seen.extend(x.untyped_storage().data_ptr() for x in operands[:3])
        return real(self, operands)

    monkeypatch.setattr(type(kernel.op), "forward", forward_once)
    for batch, tiles in ((2, (tile(range(4, 13), range(3, 11)),)), (2, DOCUMENTS), (1, WINDOWS)):
        q, k, v = (torch.randn(batch, rows, 2, 16, dtype=torch.bfloat16) for rows in (13, 11, 11))
        seen.clear()
        forward(kernel, q, k, v, Tiles.of(*tiles), Score(0.1))
        assert seen == [x.untyped_storage().data_ptr() for x in (q, k, v)], "one call, on the tensors themselves"


def test_a_stand_in_without_a_spec_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    assert BACKENDS["flash3"].available()[0] == "flash_attn_interface is not installed"


def test_not_chosen_on_a_cpu() -> None:
    call = ProblemSpec("cpu", torch.bfloat16, 4, 2, 64, 64, True, Score(0.1))
    assert all(refusals(name, call) for name in GENERATIONS)
