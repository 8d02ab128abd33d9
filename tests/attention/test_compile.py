"""torch.compile: calls are traced without a graph break, and give what they give at once, bit for bit."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import ringattn
from ringattn.attention import autograd
from ringattn.attention.execution_plan import ExecutionPlan
from ringattn.comm.topology import RankMesh
from ringattn.geometry.layout import parse_layout
from ringattn.geometry.masks import parse_mask
from tests.attention.problem import FLAT_WAYS, MESH_WAYS, RING, Problem, Way, mesh_of, share_of
from tests.attention.test_training import PROBLEM, leaves
from tests.geometry.scratch_mask import diagonals
from tests.harness.cases import LAYOUT_CASES, MASK_CASES, layout_case, mask_case
from tests.harness.ranks import RankPool

# Other meshes are other plans, which a graph does not look into.
WAYS = (RING, *FLAT_WAYS, *[way for way in MESH_WAYS if way.mesh == (2, 2)])
Call = Callable[..., Any]


class Attend(nn.Module):
    """A module that calls an exchange with a problem's options, a little work before and after it."""

    def __init__(self, group: dist.ProcessGroup, problem: Problem, lse: bool = True) -> None:
        super().__init__()
        way = problem.way
        self.operation = getattr(ringattn, f"{way.operation}_attention{'_with_lse' if lse else ''}")
        self.group = group if way.mesh is None else mesh_of(group, way)
        layout, kv_layout = problem.layouts(group.size())
        self.options = {
            "mask": problem.built_mask(),
            "layout": layout,
            "kv_layout": kv_layout,
            "scale": problem.scale,
            "softcap": problem.softcap,
            "backend": problem.backend,
        }
        if way.operation != "ring":
            self.options["stages"] = way.stages

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None = None) -> Any:
        found = self.operation(q * 2, k, v, self.group, sink=sink, **self.options)
        return (found[0] + 1, found[1]) if isinstance(found, tuple) else found + 1


@contextmanager
def graphs(expected: int) -> Iterator[None]:
    """Checks how many graphs are made, and that nothing breaks them."""
    torch._dynamo.reset()
    counters.clear()
    yield
    assert not counters["graph_break"], counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == expected


def compiled(call: Call, backend: Any = "aot_eager", dynamic: bool = False) -> Call:
    found: Call = torch.compile(call, fullgraph=True, backend=backend, dynamic=dynamic)
    return found


def outcome(call: Call, inputs: Sequence[Tensor | None], cotangents: Sequence[Tensor]) -> list[Tensor | None]:
    """The outputs, and the gradients of the inputs that want them, of copies of the inputs."""
    copies = [None if x is None else x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    outputs = call(*copies)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if outputs[0].requires_grad:
        torch.autograd.backward(outputs, cotangents[: len(outputs)])
    return [x.detach() for x in outputs] + [None if x is None else x.grad for x in copies]


def assert_same(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)


def compare(call: Call, inputs: Sequence[Tensor | None], cotangents: Sequence[Tensor], **options: Any) -> None:
    """Runs a call at once and compiled, twice, with one graph."""
    wanted = outcome(call, inputs, cotangents)
    with graphs(1):
        made = compiled(call, **options)
        for _ in range(2):
            assert_same(outcome(made, inputs, cotangents), wanted)


def modules(group: dist.ProcessGroup, problem: Problem, backend: str) -> None:
    """The function that returns lse, and with other kv heads the other: keys travel in the backward, or queries do."""
    for kv_heads, lse in ((2, True), (4, False)):
        inputs, *cotangents = leaves(group, replace(problem, kv_heads=kv_heads))
        compare(Attend(group, problem, lse), inputs, cotangents, backend=backend)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_exchange(pool: RankPool, way: Way) -> None:
    pool.run(modules, 3 if way.mesh is None else 4, replace(PROBLEM, way=way), "aot_eager")


@pytest.mark.long
@pytest.mark.parametrize("way", [RING, *FLAT_WAYS], ids=str)
def test_every_exchange_of_two_ranks(pool: RankPool, way: Way) -> None:
    pool.run(modules, 2, replace(PROBLEM, way=way), "aot_eager")


def test_one_rank(pool: RankPool) -> None:
    for way in (RING, *FLAT_WAYS):
        pool.run(modules, 1, replace(PROBLEM, way=way), "aot_eager")


def test_options(pool: RankPool) -> None:
    """Masks for each batch row, other positions of keys, scale, softcap, backend."""
    base = replace(PROBLEM, mask=(mask_case("causal"), mask_case("documents")), scale=0.3)
    others = replace(PROBLEM, mask=mask_case("window_left"), k_len=17, kv_layout=layout_case("striped_3"))
    for problem in (base, replace(base, softcap=1.3, backend="reference"), others):
        pool.run(modules, 3, problem, "aot_eager")


def plain(group: dist.ProcessGroup, backend: str) -> None:
    """A graph of nothing but a call, with which inductor has no C++ to compile."""
    layout, _ = PROBLEM.layouts(group.size())
    mask = PROBLEM.built_mask()
    inputs, *cotangents = leaves(group)

    def call(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        return ringattn.ring_attention_with_lse(q, k, v, group, mask=mask, layout=layout, sink=sink)

    compare(call, inputs, cotangents, backend=backend)


def test_inductor(pool: RankPool) -> None:
    pool.run(plain, 2, "inductor")


def branches(group: dist.ProcessGroup) -> None:
    """Two calls of which neither needs the other, the second freeing more memory than the first: called in order."""
    sizes = []
    forward = autograd.forward

    def noted(job: ExecutionPlan, team: RankMesh, q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        sizes.append(q.shape[1])
        return forward(job, team, q, *others)

    def both(x: Tensor, y: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        wide = y @ up
        first = ringattn.ring_attention(x, x, x, group)
        return first, ringattn.ring_attention(wide, wide, wide, group) @ down

    shapes = (1, 512, 2, 16), (1, 64, 2, 4), (4, 16), (16, 1)
    with (
        pytest.MonkeyPatch.context() as patch,
        torch.compiler.config.patch(  # type: ignore[attr-defined]
            force_disable_caches=True
        ),
    ):
        patch.setattr(autograd, "forward", noted)
        with torch.no_grad(), graphs(1):
            compiled(both, "inductor")(*(torch.randn(shape) for shape in shapes))
    assert sizes == [512, 64]


def test_calls_in_parallel_branches_keep_their_order(pool: RankPool) -> None:
    pool.run(branches, 1)


@pytest.mark.long
def test_inductor_around_every_exchange(pool: RankPool) -> None:
    for way in WAYS:
        pool.run(modules, 3 if way.mesh is None else 4, replace(PROBLEM, way=way), "inductor", timeout_s=600.0)


MODEL = ringattn.CostModel(ringattn.Link(1e-5, 2e9), ringattn.Compute(1e12, 5e11, 1e10, 1e-6))


class Choose(nn.Module):
    """A module whose call leaves the exchange open."""

    def __init__(self, group: object, problem: Problem, world_size: int, lse: bool = True, **asked: Any) -> None:
        super().__init__()
        self.operation = getattr(ringattn, f"context_parallel_attention{'_with_lse' if lse else ''}")
        self.group, self.mask, self.layout = group, problem.built_mask(), problem.layouts(world_size)[0]
        self.asked = asked

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Any:
        options = {"mask": self.mask, "layout": self.layout, "sink": sink, **self.asked}
        found = self.operation(q * 2, k, v, self.group, **options)
        return (found[0] + 1, found[1]) if isinstance(found, tuple) else found + 1


def chosen(group: dist.ProcessGroup) -> None:
    inputs, *cotangents = leaves(group)
    asked: list[dict[str, Any]] = [{}, {"model": MODEL}, {"exchange": "gather", "stages": 2}, {"exchange": "ulysses"}]
    for number, options in enumerate(asked):
        compare(Choose(group, PROBLEM, group.size(), bool(number % 2), **options), inputs, cotangents)


def chosen_on_a_mesh(group: dist.ProcessGroup) -> None:
    inputs, *cotangents = leaves(group)
    compare(Choose(mesh_of(group, MESH_WAYS[0]), PROBLEM, group.size()), inputs, cotangents)


def test_a_choice(pool: RankPool) -> None:
    pool.run(chosen, 2)
    pool.run(chosen_on_a_mesh, 4)


def two_models(group: dist.ProcessGroup) -> None:
    """Another model is another graph, and an equal one the same."""
    inputs, dout, _ = leaves(group)
    slow = replace(MODEL, link=ringattn.Link(1e-3, 1e6))

    def call(q: Tensor, k: Tensor, v: Tensor, model: ringattn.CostModel) -> Tensor:
        out: Tensor = ringattn.context_parallel_attention(q, k, v, group, model=model, layout=PROBLEM.layouts(2)[0])
        return out

    with graphs(2):
        made = compiled(call)
        for model in (MODEL, slow, replace(MODEL)):
            found, wanted = (outcome(lambda *x, m=model, c=c: c(*x, m), inputs[:3], [dout]) for c in (made, call))
            assert_same(found, wanted)


def test_another_model_is_another_graph(pool: RankPool) -> None:
    pool.run(two_models, 2)


def no_such_exchange(group: dist.ProcessGroup) -> None:
    inputs, *_ = leaves(group)
    torch._dynamo.reset()
    compiled(Choose(group, PROBLEM, group.size(), exchange="mail"))(*inputs)


def test_an_exchange_that_there_is_not(pool: RankPool) -> None:
    for raised in pool.expect_error(no_such_exchange, 2):
        assert raised.type_name == "ArgumentError"
        assert "exchange='mail': must be 'auto', one of" in raised.message


def calls_in(graph: GraphModule) -> list[float]:
    """The scales of the calls in a graph, in its order."""
    nodes = [node for node in graph.graph.nodes if "ringattn" in str(node.target)]
    return [next(a for a in node.args if isinstance(a, float)) for node in nodes]


def independent_calls(group: dist.ProcessGroup) -> None:
    """Three calls that need nothing of each other: forward as they stand there, backward the other way round."""
    inputs, dout, _ = leaves(group)
    layout = PROBLEM.layouts(group.size())[0]
    orders: list[list[float]] = []

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return tuple([ringattn.ring_attention(q, k, v, group, scale=s, layout=layout) for s in (0.3, 0.2, 0.4)])

    def keep(graph: GraphModule, _: Sequence[Any]) -> Call:
        orders.append(calls_in(graph))
        found: Call = make_boxed_func(graph.forward)
        return found

    wanted = outcome(call, inputs[:3], [dout] * 3)
    with graphs(1):
        # Cut into forward and backward as inductor does it.
        cut = {"partition_fn": min_cut_rematerialization_partition}
        made = compiled(call, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep, **cut))
        assert_same(outcome(made, inputs[:3], [dout] * 3), wanted)
    assert orders == [[0.3, 0.2, 0.4], [0.4, 0.2, 0.3]]


def test_independent_calls_keep_their_order(pool: RankPool) -> None:
    pool.run(independent_calls, 3)


def subsets(group: dist.ProcessGroup, way: Way) -> None:
    inputs, *cotangents = leaves(group)
    module = Attend(group, replace(PROBLEM, way=way))
    for wanted in product([False, True], repeat=4):
        for x, wants in zip(inputs, wanted, strict=True):
            x.requires_grad_(wants)
        compare(module, inputs, cotangents)
    for x in inputs:
        x.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            compare(module, inputs, cotangents)


@pytest.mark.parametrize("way", [RING, pytest.param(Way("ulysses"), marks=pytest.mark.long)], ids=str)
def test_gradients_of_every_subset_and_of_none(pool: RankPool, way: Way) -> None:
    pool.run(subsets, 2, way)


def lse_or_out_alone(group: dist.ProcessGroup) -> None:
    module = Attend(group, PROBLEM)
    inputs, dout, dlse = leaves(group)
    compare(lambda *x: module(*x)[0], inputs, [dout])
    compare(lambda *x: module(*x)[1], inputs, [dlse])


def test_losses_of_one_output(pool: RankPool) -> None:
    pool.run(lse_or_out_alone, 2)


def through_a_checkpoint(group: dist.ProcessGroup, way: Way) -> None:
    module = Attend(group, replace(PROBLEM, way=way))
    inputs, *cotangents = leaves(group)
    compare(lambda *x: checkpoint(module, *x, use_reentrant=False), inputs, cotangents)


@pytest.mark.parametrize("way", [RING, Way("gather"), Way("ulysses")], ids=str)
def test_checkpoint(pool: RankPool, way: Way) -> None:
    pool.run(through_a_checkpoint, 2, way)


def under_autocast(group: dist.ProcessGroup) -> None:
    inputs, dout, dlse = leaves(group)
    inputs = [x.detach().float().requires_grad_() for x in inputs]
    module = Attend(group, PROBLEM)

    def call(*x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, lse = module(*x)
        assert out.dtype == torch.bfloat16
        return out, lse

    compare(call, inputs, [dout.bfloat16(), dlse.float()])


def test_autocast(pool: RankPool) -> None:
    pool.run(under_autocast, 2)


def masks_in_turn(group: dist.ProcessGroup) -> None:
    """An equal mask is the same graph, whoever made it when; another mask is another graph."""
    layout, _ = PROBLEM.layouts(group.size())
    inputs, dout, _ = leaves(group)

    def call(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, mask: ringattn.Mask) -> Tensor:
        return ringattn.ring_attention(q, k, v, group, mask=mask, layout=layout, sink=sink)

    with graphs(2):
        made = compiled(call)
        for _ in range(2):
            for mask in (ringattn.causal(), ringattn.documents([0, 9, 23]) & ringattn.causal()):
                found, wanted = (outcome(lambda *x, m=mask, c=c: c(*x, m), inputs, [dout]) for c in (made, call))
                assert_same(found, wanted)
            gc.collect()  # nothing but the graph may be needed


def test_another_mask_is_another_graph(pool: RankPool) -> None:
    pool.run(masks_in_turn, 2)


def made_inside(group: dist.ProcessGroup) -> None:
    inputs, *cotangents = leaves(group)
    size = group.size()

    def call(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        mask = ringattn.causal() & ringattn.sliding_window(5)
        layout = ringattn.zigzag(23, size)
        return ringattn.gather_attention_with_lse(q, k, v, group, mask=mask, layout=layout, sink=sink)

    compare(call, inputs, cotangents)


def test_masks_and_layouts_made_inside(pool: RankPool) -> None:
    pool.run(made_inside, 2)


def mask_of_another_module(group: dist.ProcessGroup) -> None:
    """Made outside and inside of what is compiled."""
    inputs, *cotangents = leaves(group)
    layout, _ = PROBLEM.layouts(group.size())
    outside = diagonals(-2, -1, 0)

    def call(mask: ringattn.Mask | None, q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        mask = diagonals(-2, -1, 0) if mask is None else mask
        return ringattn.ring_attention_with_lse(q, k, v, group, mask=mask, layout=layout, sink=sink)

    for mask in (None, outside):
        compare(partial(call, mask), inputs, cotangents)
    wanted = outcome(partial(call, ringattn.sliding_window(2)), inputs, cotangents)
    torch.testing.assert_close(outcome(partial(call, outside), inputs, cotangents), wanted)


def test_a_mask_of_another_module(pool: RankPool) -> None:
    pool.run(mask_of_another_module, 2)


def batches(group: dist.ProcessGroup) -> None:
    module = Attend(group, PROBLEM)
    with graphs(1):
        made = compiled(module, dynamic=True)
        for batch in (5, 7, 6):  # not a size that some other dim has: torch takes equal sizes for one
            inputs, *cotangents = leaves(group, replace(PROBLEM, batch=batch))
            assert_same(outcome(made, inputs, cotangents), outcome(module, inputs, cotangents))


def test_any_batch_size(pool: RankPool) -> None:
    pool.run(batches, 2)


class Two(nn.Module):
    """Two modules, one after the other, in one graph."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.first(q, k, v), self.second(q, k, v)


def two_groups(group: dist.ProcessGroup) -> None:
    """A model on the group and one on this rank alone, of one class: together, and each by itself."""
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True, backend="gloo")
    problem = Problem(mask_case("causal"), layout_case("contiguous"), 6 * group.size())
    small = Problem(mask_case("causal"), layout_case("contiguous"), 6)
    models = Attend(group, problem, lse=False), Attend(alone, small, lse=False)
    t, _ = share_of(problem, group.rank(), group.size())
    inputs = [x.detach().clone().requires_grad_() for x in t[:3]]
    wanted = [outcome(model, inputs, [t.dout]) for model in models]
    if group.rank():
        assert not torch.equal(*(result[0] for result in wanted))  # type: ignore[arg-type]
    with graphs(2):
        made = [compiled(model) for model in models]
        for _ in range(2):
            for model, result in zip(made, wanted, strict=True):
                assert_same(outcome(model, inputs, [t.dout]), result)
    compare(Two(*models), inputs, [t.dout, t.dout])

    def on_any(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
        return ringattn.ring_attention(q, k, v, group, mask=ringattn.causal()) + 0

    with graphs(2):
        call = compiled(on_any)
        for _ in range(2):
            for on in (group, alone):
                q, k, v = (x.detach() for x in inputs)
                assert torch.equal(call(q, k, v, on), on_any(q, k, v, on))
    dist.destroy_process_group(alone)


def test_two_models_with_two_groups(pool: RankPool) -> None:
    pool.run(two_groups, 3)


def only_the_first_compiles(group: dist.ProcessGroup) -> None:
    """The operator says on the wire just what a call at once says."""
    for way in (RING, *FLAT_WAYS):
        module = Attend(group, replace(PROBLEM, way=way, mask=mask_case("window_both")))
        inputs, *cotangents = leaves(group)
        mine = compiled(module) if group.rank() == 0 else module
        found = outcome(mine, inputs, cotangents)
        assert_same(found, outcome(module, inputs, cotangents))


def test_ranks_that_compile_with_ranks_that_do_not(pool: RankPool) -> None:
    pool.run(only_the_first_compiles, 3)


def unused_on_the_first(group: dist.ProcessGroup) -> None:
    module = Attend(group, PROBLEM)
    inputs, *_ = leaves(group)

    def call(*x: Tensor) -> Tensor:
        out, _ = module(*x)
        return x[0] * 3 if group.rank() == 0 else out

    with torch.no_grad():
        torch._dynamo.reset()
        found = compiled(call)(*inputs)
        assert torch.equal(found, call(*inputs))


def test_a_result_that_one_rank_does_not_use(pool: RankPool) -> None:
    pool.run(unused_on_the_first, 2)


# ---- errors


def another_mask_on_the_last(group: dist.ProcessGroup) -> None:
    name = "causal" if group.rank() + 1 < group.size() else "full"
    inputs, *_ = leaves(group)
    torch._dynamo.reset()
    compiled(Attend(group, replace(PROBLEM, mask=mask_case(name), scale=0.77)))(*inputs)


def too_many_rows_on_the_last(group: dist.ProcessGroup) -> None:
    inputs, *_ = leaves(group)
    if group.rank() + 1 == group.size():
        inputs[0] = torch.cat([inputs[0]] * 2, 1)
    torch._dynamo.reset()
    compiled(Attend(group, replace(PROBLEM, scale=0.78)))(*inputs)


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (another_mask_on_the_last, "DisagreementError", "disagree on mask"),
        (too_many_rows_on_the_last, "LayoutError", "on rank 2 of 3"),
    ],
)
def test_every_rank_raises(pool: RankPool, call: Any, error: str, told: str) -> None:
    for raised in pool.expect_error(call, 3):
        assert raised.type_name == error
        assert told in raised.message


def wrong_options(group: dist.ProcessGroup) -> None:
    """What cannot be written into a graph is refused when it is made; without fullgraph, as it is at once."""
    inputs, *_ = leaves(group)
    options: list[dict[str, Any]] = [{"scale": True}, {"softcap": "1"}, {"stages": True}, {"backend": 3}, {"mask": "a"}]
    for option in options:

        def call(q: Tensor, k: Tensor, v: Tensor, *, option: dict[str, Any] = option) -> Tensor:
            return ringattn.gather_attention(q, k, v, group, **option)

        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="Observed exception"):
            compiled(call)(*inputs[:3])
        with pytest.raises((ringattn.ArgumentError, ringattn.BackendError), match=next(iter(option))):
            torch.compile(call, backend="aot_eager")(*inputs[:3])


def test_wrong_options(pool: RankPool) -> None:
    pool.run(wrong_options, 2)


# ---- texts


def test_texts_mean_what_they_were_written_from() -> None:
    for case in MASK_CASES:
        mask = case.build(23)
        assert parse_mask(mask.text) == mask
    for layout in (case.build(23, world_size) for case in LAYOUT_CASES for world_size in (1, 3, 30)):
        assert parse_layout(layout.text) == layout
        assert str(parse_layout(layout.text)) == str(layout)
    with pytest.raises(ringattn.MaskError, match="'mine', which is none of"):
        parse_mask("causal() & mine(3,)")


# ---- the operators


class Captured(Exception):
    """Ends a compilation, with what was wanted of it."""


def check_operators(group: dist.ProcessGroup) -> None:
    calls: list[tuple[Any, ...]] = []

    def capture(graph: GraphModule, _: list[Tensor]) -> Call:
        calls.extend(node.args for node in graph.graph.nodes if "ringattn" in str(node.target))
        return graph.forward

    for way in (RING, Way("ulysses", stages=2)):
        calls.clear()
        inputs, dout, _ = leaves(group)
        torch._dynamo.reset()
        compiled(Attend(group, replace(PROBLEM, way=way)), backend=capture)(*inputs)
        ((_, _, _, _, *call),) = calls
        torch.library.opcheck(torch.ops.ringattn.attention.default, (*inputs, *call))
        q, k, v, sink = (x.detach() for x in inputs)
        out, lse = torch.ops.ringattn.attention(q, k, v, sink, *call)
        arguments = (dout, None, q, k, v, sink, out, lse, *call)
        torch.library.opcheck(torch.ops.ringattn.attention_backward.default, arguments)


def test_operators_keep_torchs_rules(pool: RankPool) -> None:
    pool.run(check_operators, 1)


def stale_group(group: dist.ProcessGroup) -> None:
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True, backend="gloo")
    problem = Problem(mask_case("causal"), layout_case("contiguous"), 6)
    t = problem.tensors()
    graph: list[Call] = []

    def keep(module: GraphModule, _: list[Tensor]) -> Call:
        graph.append(copy.copy(module).forward)
        return module.forward

    torch._dynamo.reset()
    call = compiled(Attend(alone, problem, lse=False), backend=keep)
    call(t.q, t.k, t.v)
    dist.destroy_process_group(alone)
    with pytest.raises(ringattn.ArgumentError, match="compile again"):
        call(t.q, t.k, t.v)


def test_a_group_that_is_gone(pool: RankPool) -> None:
    pool.run(stale_group, 1)
