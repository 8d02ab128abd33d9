"""What torch.ops.ringattn_native refuses, whoever calls: all that a kernel would not survive, before it writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ringattn.kernels.native import NativeKernel

Arguments = dict[str, Tensor]
ROWS, KEYS = 9, 7
FORWARD = ("q", "k", "v", "tiles", "out", "lse")
BACKWARD = ("dout", "q", "k", "v", "lse", "delta", "tiles", "dq", "dk", "dv")


@pytest.fixture(autouse=True)
def _loaded() -> None:
    assert not NativeKernel().available()


def arguments(dtype: torch.dtype = torch.float32) -> Arguments:
    """A call that is right: 2 batch rows, 4 heads, 2 kv heads, dims 6 and 5."""
    torch.manual_seed(0)
    shapes = {"q": (2, ROWS, 4, 6), "k": (2, KEYS, 2, 6), "v": (2, KEYS, 2, 5), "dout": (2, ROWS, 4, 5)}
    given = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    given |= {"out": torch.zeros(2, ROWS, 4, 5), "lse": torch.zeros(2, 4, ROWS), "delta": torch.zeros(2, 4, ROWS)}
    given |= {f"d{name}": torch.zeros(given[name].shape) for name in "qkv"}
    return given | {"tiles": tiles([0, ROWS, 0, KEYS, -20, 20, -1])}


def tiles(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 7)


def forward(given: Arguments, isa: str = "") -> None:
    q, k, v, table, out, lse = (given[name] for name in FORWARD)
    torch.ops.ringattn_native.forward(q, k, v, table, 0.4, 0.0, out, lse, isa)


def backward(given: Arguments, isa: str = "") -> None:
    *inputs, table, dq, dk, dv = (given[name] for name in BACKWARD)
    torch.ops.ringattn_native.backward(*inputs, table, 0.4, 0.0, dq, dk, dv, isa)


CALLS = {"forward": (forward, FORWARD), "backward": (backward, BACKWARD)}
WRITTEN = {"forward": ("out", "lse"), "backward": ("dq", "dk", "dv")}

TILES = {
    "rows beyond q": [0, ROWS + 1, 0, KEYS, -20, 20, -1],
    "rows before q": [-1, ROWS, 0, KEYS, -20, 20, -1],
    "keys beyond k": [0, ROWS, 0, KEYS + 1, -20, 20, -1],
    "keys before k": [0, ROWS, -1, KEYS, -20, 20, -1],
    "no row": [3, 3, 0, KEYS, -20, 20, -1],
    "no key": [0, ROWS, 2, 2, -20, 20, -1],
    "rows backwards": [5, 2, 0, KEYS, -20, 20, -1],
    "rows beyond all integers": [0, (1 << 63) - 1, 0, KEYS, -20, 20, -1],
    "a batch row too many": [0, ROWS, 0, KEYS, -20, 20, 2],
}


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Arguments], Arguments]:
    return lambda given: given | {name: change(given[name])}


def spread(x: Tensor) -> Tensor:
    """The same numbers, two elements apart."""
    return torch.stack([x, x], -1).flatten(-2)[..., ::2]


WRONG: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "q of 3 dims": ("q", lambda x: x[0], r"\(batch, rows, heads, dim\)"),
    "q strided": ("q", spread, "contiguous dims"),
    "v strided": ("v", spread, "contiguous dims"),
    "dout strided": ("dout", spread, "contiguous dims"),
    "out strided": ("out", spread, "contiguous dims"),
    "dk strided": ("dk", spread, "contiguous dims"),
    "q in float64": ("q", Tensor.double, "float32, bfloat16 or float16"),
    "k of another dtype": ("k", Tensor.half, "one dtype"),
    "v of another dtype": ("v", Tensor.bfloat16, "one dtype"),
    "dout of another dtype": ("dout", Tensor.half, "dout must fit"),
    "k of another batch": ("k", lambda x: x[:1], "k must fit"),
    "k of another dim": ("k", lambda x: x[..., :5], "k must fit"),
    "k without heads": ("k", lambda x: x[:, :, :0], "multiple"),
    "heads that do not divide": ("q", lambda x: x[:, :, :3], "multiple"),
    "v of other rows": ("v", lambda x: x[:, 1:], "v must fit"),
    "v of other heads": ("v", lambda x: x[:, :, :1], "v must fit"),
    "q and k without dims": ("q", lambda x: x[..., :0], "must have dims"),
    "v without dims": ("v", lambda x: x[..., :0], "must have dims"),
    "out in bfloat16": ("out", Tensor.bfloat16, "must be float32"),
    "out too short": ("out", lambda x: x[:, 1:], "out must fit"),
    "out too narrow": ("out", lambda x: x[..., 1:], "out must fit"),
    "dout too short": ("dout", lambda x: x[:, 1:], "dout must fit"),
    "lse in float64": ("lse", Tensor.double, "must be float32"),
    "lse of rows before heads": ("lse", lambda x: x.transpose(1, 2), "must fit q"),
    "lse of 2 dims": ("lse", lambda x: x[0], "must be float32"),
    "delta too short": ("delta", lambda x: x[..., 1:], "must fit q"),
    "dq too short": ("dq", lambda x: x[:, 1:], "dq must fit"),
    "dk of q's heads": ("dk", lambda x: x.repeat_interleave(2, 2), "dk must fit"),
    "dv in float64": ("dv", Tensor.double, "must be float32"),
    "dv too narrow": ("dv", lambda x: x[..., 1:], "dv must fit"),
    "tiles in int32": ("tiles", Tensor.int, r"\(n, 7\) int64"),
    "tiles of 6 columns": ("tiles", lambda x: x[:, :6], r"\(n, 7\) int64"),
    "tiles strided": ("tiles", lambda x: x.repeat(2, 1).t().contiguous().t(), r"\(n, 7\) int64"),
    "a flat tile": ("tiles", lambda x: x[0], r"\(n, 7\) int64"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("what", [*WRONG, *TILES])
def test_refusals(name: str, what: str) -> None:
    call, taken = CALLS[name]
    argument, change, told = WRONG[what] if what in WRONG else ("tiles", lambda _: tiles(TILES[what]), "lies outside")
    if argument not in taken:
        pytest.skip(f"{name} has no {argument}")
    given = changed(argument, change)(arguments())
    with pytest.raises(RuntimeError, match=told):
        call(given)
    assert all((given[x] == 0).all() for x in WRITTEN[name]), "nothing is written"


@pytest.mark.parametrize("name", CALLS)
def test_what_was_changed_was_right(name: str) -> None:
    given = arguments()
    CALLS[name][0](given)
    assert any((given[x] != 0).any() for x in WRITTEN[name])


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("isa", ["avx3", "emulated_bf16", "AVX2"])
def test_instruction_sets_that_are_not_there(name: str, isa: str) -> None:
    with pytest.raises(RuntimeError, match=f"isa='{isa}' does not run"):
        CALLS[name][0](arguments(), isa)


@pytest.mark.parametrize("name", CALLS)
def test_no_tiles_no_work(name: str) -> None:
    """Neither a list without tiles, nor tensors without rows, nor a batch without any, is an error."""
    whole = arguments() | {"tiles": tiles()}
    none = {key: x[:, :, :0] if x.dim() == 3 else x[:, :0] for key, x in whole.items() if x.dim() > 2}
    empty = {key: x[:0] for key, x in whole.items() if x.dim() > 2}
    for given in (whole, whole | none, whole | empty):
        CALLS[name][0](given)
        assert all((given[x] == 0).all() for x in WRITTEN[name])


@pytest.mark.parametrize("name", CALLS)
def test_meta_tensors_only_pass_through(name: str) -> None:
    CALLS[name][0]({key: x.to("meta") for key, x in arguments().items()})


def test_transposed_and_expanded_views_are_taken() -> None:
    """Any strides but the last one's, zero among them: kv heads that are one and the same, rows of another order."""
    given = arguments()
    shared = given | {"k": given["k"][:, :, :1].expand(-1, -1, 2, -1), "v": given["v"][:, :, :1].expand(-1, -1, 2, -1)}
    shared["q"] = given["q"].transpose(1, 2).contiguous().transpose(1, 2)
    shared["lse"] = torch.full((2, ROWS, 4), -torch.inf).transpose(1, 2)
    plain = {key: x.clone() for key, x in shared.items()} | {"out": torch.zeros(2, ROWS, 4, 5)}
    forward(shared)
    forward(plain)
    assert torch.equal(shared["out"], plain["out"])
    assert torch.equal(shared["lse"], plain["lse"])
    assert shared["lse"].isfinite().all()


MERGES: dict[str, Callable[[Arguments], Arguments]] = {
    "lses of other heads": changed("lses", lambda x: x[:, :, :3]),
    "lses of fewer parts": changed("lses", lambda x: x[:2]),
    "an out of other rows": changed("out", lambda x: x[:, :1]),
    "outs in double": changed("outs", Tensor.double),
    "an out that is spread": changed("out", spread),
    "outs that are spread": changed("outs", spread),
    "a sink of other heads": changed("sink", lambda x: x[:3]),
    "a sink in half": changed("sink", Tensor.half),
    "no parts": lambda given: given | {"outs": given["outs"][:0], "lses": given["lses"][:0]},
}


def merge(given: Arguments, first: int = 2) -> None:
    torch.ops.ringattn_native.merge(given["outs"], given["lses"], first, given["sink"], given["out"])


def partials() -> Arguments:
    """Of 3 ranks, 2 batch rows, 2 rows, 4 heads, dim 5."""
    return {
        "outs": torch.ones(3, 2, 2, 4, 5), "lses": torch.zeros(3, 2, 4, 2), "sink": torch.zeros(4),
        "out": torch.zeros(2, 2, 4, 5),
    }  # fmt: skip


@pytest.mark.parametrize("wrong", MERGES)
def test_merging_refuses(wrong: str) -> None:
    given = MERGES[wrong](partials())
    with pytest.raises(RuntimeError):
        merge(given)
    assert not given["out"].any()


@pytest.mark.parametrize("first", [-1, 3])
def test_merging_refuses_a_place_where_no_part_is(first: int) -> None:
    given = partials()
    with pytest.raises(RuntimeError):
        merge(given, first)
    merge(given)
    assert torch.allclose(given["out"], torch.tensor(0.75))
