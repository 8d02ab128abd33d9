"""One attention problem, solved by every rank of a group and by the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import ringattn
from tests.harness import oracle
from tests.harness.cases import Bools, LayoutCase, MaskCase, Positions, Tensors, tensors
from tests.harness.compare import assert_close
from tests.harness.poison import poisoned_empty
from tests.harness.ranks import RankPool

WORLDS = (1, 2, 3, 4)


@dataclass(frozen=True)
class OwnCase(MaskCase):
    """A mask of a test's own numbers, which travels to a rank by them."""

    make: tuple[Callable[..., MaskCase], tuple[int, ...]] = (MaskCase, ())

    def __reduce__(self) -> tuple[Callable[..., MaskCase], tuple[int, ...]]:  # type: ignore[override]
        return self.make


def window_case(left: int, right: int) -> MaskCase:
    """A sliding window of these widths, whatever the length."""

    def sees(q: Positions, k: Positions, _: int) -> Bools:
        return (-left <= k - q) & (k - q <= right)

    made = (window_case, (left, right))
    return OwnCase(f"window_{left}_{right}", lambda _: ringattn.sliding_window(left, right), sees, make=made)


def documents_case(*lengths: int) -> MaskCase:
    """Documents of these lengths, causal: a packed batch."""
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]

    def sees(q: Positions, k: Positions, _: int) -> Bools:
        together = [(a <= q) & (q < b) & (a <= k) & (k < b) for a, b in pairwise(ends)]
        return sum(together[1:], together[0]) & (k <= q)

    made = (documents_case, lengths)
    return OwnCase(
        f"documents_{lengths}", lambda _: ringattn.documents(ends) & ringattn.causal(), sees, cross=False, make=made
    )


@dataclass(frozen=True)
class Way:
    """An exchange: the function's name, its stages, and the mesh of two axes that it runs on, if it does."""

    operation: str = "ring"
    mesh: tuple[int, int] | None = None
    stages: int = 1

    def __str__(self) -> str:
        mesh = "" if self.mesh is None else f"_{self.mesh[0]}x{self.mesh[1]}"
        return f"{self.operation}{mesh}" + (f"_{self.stages}_stages" if self.stages > 1 else "")


RING = Way()
# On any number of ranks.
FLAT_WAYS = (Way("gather"), Way("gather", stages=3), Way("ulysses"), Way("ulysses", stages=2))
# On as many as the mesh has.
MESH_WAYS = (
    Way("hybrid", (2, 2)),
    Way("hybrid", (2, 2), stages=2),
    Way("hybrid", (4, 1)),
    Way("hybrid", (1, 4)),
    Way("ring", (2, 2)),
    Way("ring", (4, 1)),
    Way("ring", (1, 4)),
)


@dataclass(frozen=True)
class Problem:
    """Everything that defines a problem; tensors follow from it, the same on every rank."""

    mask: MaskCase | tuple[MaskCase, ...]
    layout: LayoutCase
    q_len: int
    k_len: int | None = None
    kv_layout: LayoutCase | None = None
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    dim: int = 4
    v_dim: int = 4
    dtype: torch.dtype = torch.float64
    scale: float | None = None
    softcap: float | None = None
    sink: bool = False
    backend: str | None = None
    poison: bool = False
    way: Way = RING

    @property
    def keys(self) -> int:
        return self.q_len if self.k_len is None else self.k_len

    def told(self) -> str:
        """What differs from the defaults, for messages."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return ", ".join(
            f"{f.name}={getattr(values[f.name], 'name', str(values[f.name]))}"
            for f in fields(self)
            if values[f.name] != f.default
        )

    def tensors(self) -> Tensors:
        """The whole tensors."""
        return tensors(
            7, self.batch, self.q_len, self.keys, self.heads, self.kv_heads, self.dim, self.v_dim, self.dtype
        )

    def sink_logits(self) -> Tensor | None:
        if not self.sink:
            return None
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.linspace(-1.0, 2.0, self.heads, dtype=dtype)

    def allowed(self) -> Tensor:
        """(B, Sq, Sk) bool, from the masks' definitions."""
        cases = self.mask if isinstance(self.mask, tuple) else (self.mask,) * self.batch
        return torch.stack([torch.from_numpy(case.allowed(self.q_len, self.keys)) for case in cases])

    def layouts(self, world_size: int) -> tuple[ringattn.Layout, ringattn.Layout]:
        """Of the queries, and of the keys/values."""
        layout = self.layout.build(self.q_len, world_size)
        if self.k_len is None and self.kv_layout is None:
            return layout, layout
        return layout, (self.kv_layout or self.layout).build(self.keys, world_size)

    def built_mask(self) -> ringattn.Mask | list[ringattn.Mask]:
        longest = max(self.q_len, self.keys)
        if isinstance(self.mask, tuple):
            return [case.build(longest) for case in self.mask]
        return self.mask.build(longest)

    def expected(self) -> oracle.Gradients:
        """The oracle's answer, whole, in float64."""
        t = self.tensors()
        q, k, v, dout, dlse = (x.double() for x in t)
        sink = self.sink_logits()
        return oracle.dense_gradients(
            q, k, v, self.allowed(), dout, dlse, scale=self.scale, softcap=self.softcap,
            sink=None if sink is None else sink.double(),
        )  # fmt: skip


def solve(group: dist.ProcessGroup, problem: Problem) -> dict[str, Tensor]:
    """Runs on one rank: the local out, lse and gradients; kv gradients under the keys' layout."""
    if problem.poison:
        with poisoned_empty():
            return _solve(group, problem)
    return _solve(group, problem)


def _solve(group: dist.ProcessGroup, problem: Problem) -> dict[str, Tensor]:
    layout, kv_layout = problem.layouts(group.size())
    t = problem.tensors()
    q, dout = (ringattn.shard(x, layout, group) for x in (t.q, t.dout))
    k, v = (ringattn.shard(x, kv_layout, group) for x in (t.k, t.v))
    dlse = ringattn.shard(t.dlse, layout, group, dim=2)
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    sink = problem.sink_logits()
    leaves = [q, k, v] if sink is None else [q, k, v, sink.requires_grad_()]
    out, lse = attend(group, problem, q, k, v, sink)
    grads = torch.autograd.grad([out, lse], leaves, [dout, dlse])
    result = {"out": out.detach(), "lse": lse.detach()}
    result.update(zip(("dq", "dk", "dv", "dsink"), grads, strict=False))
    return result


def whole(problem: Problem, results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Puts the ranks' results together in global order; the sink's gradient is the sum of the ranks' shares."""
    layout, kv_layout = problem.layouts(len(results))
    found = {}
    for name in results[0]:
        if name == "dsink":
            found[name] = torch.stack([r[name] for r in results]).sum(0)
            continue
        dim = 2 if name == "lse" else 1
        held = kv_layout if name in ("dk", "dv") else layout
        order = torch.cat([torch.from_numpy(held.positions(rank)) for rank in range(len(results))])
        parts = torch.cat([r[name] for r in results], dim)
        found[name] = parts.index_select(dim, torch.argsort(order))
    return found


def solve_each(group: dist.ProcessGroup, problems: Sequence[Problem]) -> list[dict[str, Tensor]]:
    """Runs on one rank: `solve` for one problem after the other."""
    return [solve(group, problem) for problem in problems]


def check(pool: RankPool, problems: Sequence[Problem], worlds: Sequence[int] = WORLDS, atol: float = 1e-10) -> None:
    """Solves the problems on groups of these sizes and compares everything with the oracle."""
    expected = [problem.expected() for problem in problems]
    for world_size in worlds:
        by_rank = pool.run(solve_each, world_size, tuple(problems))
        for problem, wanted, results in zip(problems, expected, zip(*by_rank, strict=True), strict=True):
            for name, actual in whole(problem, list(results)).items():
                assert_close(
                    actual, getattr(wanted, name), atol=atol, name=f"{name} of {world_size} ranks, {problem.told()}"
                )


def rows_of(x: Tensor, layout: ringattn.Layout, rank: int, dim: int = 1) -> Tensor:
    """A rank's rows, by the layout's positions."""
    return x.index_select(dim, torch.from_numpy(layout.positions(rank)))


def share_of(problem: Problem, rank: int, world_size: int) -> tuple[Tensors, oracle.Gradients]:
    """A rank's rows of the tensors and of the oracle's answer; the sink's gradient is whole."""
    held = dict(zip(("q", "k"), problem.layouts(world_size), strict=True))

    def local(x: Tensor, of: str, dim: int = 1) -> Tensor:
        return rows_of(x, held[of], rank, dim)

    t, e = problem.tensors(), problem.expected()
    return (
        Tensors(local(t.q, "q"), local(t.k, "k"), local(t.v, "k"), local(t.dout, "q"), local(t.dlse, "q", 2)),
        oracle.Gradients(
            local(e.out, "q"), local(e.lse, "q", 2), local(e.dq, "q"), local(e.dk, "k"), local(e.dv, "k"), e.dsink
        ),
    )


_MESHES: dict[tuple[dist.ProcessGroup, tuple[int, int], str], DeviceMesh] = {}


def mesh_of(group: dist.ProcessGroup, way: Way) -> DeviceMesh:
    """The mesh of a way, over all ranks there are; made once."""
    assert way.mesh is not None
    assert dist.get_world_size() == group.size() == way.mesh[0] * way.mesh[1]
    key = group, way.mesh, way.operation
    if key not in _MESHES:
        axes = ("ring", "ulysses") if way.operation == "hybrid" else ("outer", "inner")
        _MESHES[key] = init_device_mesh("cpu", way.mesh, mesh_dim_names=axes)
    return _MESHES[key]


def attend(
    group: dist.ProcessGroup, problem: Problem, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Calls the problem's exchange on local rows, with its options."""
    layout, kv_layout = problem.layouts(group.size())
    way = problem.way
    call: Callable[..., tuple[Tensor, Tensor]] = getattr(ringattn, f"{way.operation}_attention_with_lse")
    if way.operation != "ring":
        call = partial(call, stages=way.stages)
    return call(
        q,
        k,
        v,
        group if way.mesh is None else mesh_of(group, way),
        mask=problem.built_mask(),
        layout=layout,
        kv_layout=kv_layout,
        scale=problem.scale,
        softcap=problem.softcap,
        sink=sink,
        backend=problem.backend,
    )


def operations_of_c10d(profile: torch.profiler.profile) -> set[str]:
    """Which operations of torch.distributed were recorded; to make torch's own tables takes most of a second."""
    recorded = None if profile.profiler is None else profile.profiler.kineto_results
    assert recorded is not None
    names = (event.name() for event in recorded.events())
    return {name for name in names if name.startswith("c10d::")}
