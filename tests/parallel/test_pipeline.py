"""Pipelines match the whole model on one process: losses and all gradients, in float64, for every schedule."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache, partial
from itertools import pairwise
from typing import cast
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import ringattn
from ringattn.errors import ArgumentError
from ringattn.parallel import (
    Decoder,
    DecoderConfig,
    MicroBatch,
    MixtureOfExperts,
    MoESpec,
    Pipeline,
    PipelineOp,
    PipelineSchedule,
    bubble_formula,
    bubble_fraction,
    cut_stages,
    make_moe,
    plan_pipeline,
    simulate_timeline,
    simulated_bubble,
)
from ringattn.parallel.pipeline_eval import check_activation
from ringattn.parallel.pipeline_schedule import SCHEDULES
from ringattn.types import Masks
from tests.harness.compare import assert_close
from tests.harness.ranks import RankPool

MOE = MoESpec(num_experts=4, top_k=2, hidden=6, every=2, aux_loss_weight=0.3)
CONFIG = DecoderConfig(vocab_size=19, num_layers=5, dim=8, num_heads=2, num_kv_heads=1, hidden=10)
LENGTH, BATCHES = 14, 4


def whole_model(moe: MoESpec | None) -> Decoder:
    torch.manual_seed(3)
    config = DecoderConfig(**{**CONFIG.__dict__, "moe": moe})
    return Decoder(config, moe_factory=partial(make_moe, num_micro_batches=BATCHES) if moe else None).double()


def cuts(index: int) -> list[int]:
    """Returns the document bounds of a micro-batch; each micro-batch is packed differently."""
    return [0, 3 + index, 9 + index // 2, LENGTH]


def inputs(index: int) -> tuple[Tensor, Tensor]:
    """Returns tokens and labels of a micro-batch; their numbers of valid labels differ."""
    generator = torch.Generator().manual_seed(index)
    tokens, labels = torch.randint(CONFIG.vocab_size, (2, 2, LENGTH), generator=generator)
    labels[:, index : 2 * index] = -100
    return tokens, labels


def positions(index: int) -> Tensor:
    ends = cuts(index)
    return torch.cat([torch.arange(b - a) for a, b in pairwise(ends)])[None]


def mask_of(index: int) -> ringattn.Mask:
    return ringattn.documents(cuts(index)) & ringattn.causal()


def num_valid() -> int:
    return sum(int((inputs(index)[1] != -100).sum()) for index in range(BATCHES))


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100) / num_valid()


def attend_here(q: Tensor, k: Tensor, v: Tensor, mask: Masks) -> Tensor:
    """Dense attention on one process, with the mask as a dense tensor."""
    assert isinstance(mask, Tensor)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(q.shape[2] // k.shape[2], dim=2))
    weights = (scores * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(q.shape[2] // v.shape[2], dim=2))


@cache
def whole_run(moe: MoESpec | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss of each micro-batch, and all gradients, on one process."""
    model = whole_model(moe)
    losses = []
    for index in range(BATCHES):
        tokens, labels = inputs(index)
        at = torch.arange(LENGTH)
        document = torch.searchsorted(torch.tensor(cuts(index)), at, right=True)
        dense = (at[None] <= at[:, None]) & (document[None] == document[:, None])
        logits = model(tokens, positions=positions(index), mask=cast(Masks, dense), attention_fn=attend_here)
        loss = loss_of(logits, labels)
        torch.autograd.backward(loss)
        losses.append(loss.detach())
    return torch.stack(losses), {name: cast(Tensor, p.grad) for name, p in model.named_parameters()}


def micro_batches(ring: DeviceMesh | None) -> list[MicroBatch]:
    layout = ringattn.zigzag(LENGTH, 1 if ring is None else ring.size())

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Masks) -> Tensor:
        if ring is None:
            dense = [] if mask is None else mask
            return ringattn.ring_attention(q, k, v, _alone(), mask=cast(ringattn.Mask, dense), layout=layout)
        return ringattn.ring_attention(q, k, v, ring, mask=mask, layout=layout)

    def local(x: Tensor) -> Tensor:
        return x if ring is None else ringattn.shard(x, layout, ring, dim=1)

    return [
        MicroBatch(
            local(inputs(index)[0]),
            {"positions": local(positions(index)), "mask": mask_of(index), "attention_fn": attend},
            local(inputs(index)[1]),
        )
        for index in range(BATCHES)
    ]


_ALONE: dict[int, dist.ProcessGroup] = {}


def _alone() -> dist.ProcessGroup:
    """Returns a group of this rank only."""
    rank = dist.get_rank()
    if rank not in _ALONE:
        for each in range(dist.get_world_size()):
            group = dist.new_group([each], backend="gloo")
            if each == rank:
                _ALONE[rank] = group
    return _ALONE[rank]


def check(stages: Sequence[Decoder], found: Tensor, moe: MoESpec | None, ring: DeviceMesh | None) -> None:
    """Compares a rank's loss and gradients with those of the whole model."""
    losses, grads = whole_run(moe)
    found = found.clone()
    if ring is not None:
        dist.all_reduce(found, group=ring.get_group())
    assert_close(found, losses.sum(), atol=1e-10, name="loss")
    names = []
    for stage in stages:
        for name, parameter in stage.named_parameters():
            grad = parameter.grad
            assert grad is not None, name
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()
            if ring is not None and ".experts." not in name:
                dist.all_reduce(grad, group=ring.get_group())
            assert_close(grad, grads[name], atol=1e-10, name=name)
            names.append(name)
    assert names


def check_timeline(pipeline: Pipeline) -> None:
    """Checks that every operation ran once, that none overlap, and that the bubble is the formula's."""
    parts = ("F", "I", "W") if pipeline.schedule.spec.split_backward else ("F", "B")
    stages = pipeline.schedule.stages_of(pipeline.pp_mesh.get_local_rank())
    planned = {PipelineOp(kind, stage, index) for kind in parts for stage in stages for index in range(BATCHES)}
    ops = [timed for timed in pipeline.timeline() if timed.op.kind != "L"]
    assert len(ops) == len(planned)
    assert {timed.op for timed in ops} == planned
    assert all(a.start_s <= a.stop_s <= b.start_s for a, b in pairwise(ops))
    everyone: list[list[PipelineOp]] = [[]] * pipeline.pp_mesh.size()
    dist.all_gather_object(everyone, [timed.op for timed in ops], group=pipeline.pp_mesh.get_group())
    found = simulated_bubble(dict(enumerate(everyone)), pipeline.schedule.num_stages)
    assert found == pytest.approx(formula(pipeline.schedule))


def formula(schedule: PipelineSchedule) -> float:
    fill_fraction = 1 / 3 if schedule.spec.split_backward else 1.0
    return bubble_formula(
        schedule.num_ranks, schedule.num_micro_batches, len(schedule.stages_of(0)), fill_fraction=fill_fraction
    )


def pipelined(group: dist.ProcessGroup, schedule: str, shape: tuple[int, int], moe: MoESpec | None) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("pp", "ring"))
    ring = mesh["ring"] if shape[1] > 1 else None
    plan = plan_pipeline(schedule, CONFIG.num_layers, shape[0], BATCHES)
    stages = cut_stages(copy.deepcopy(whole_model(moe)), plan, mesh["pp"].get_local_rank())
    for module in (module for stage in stages for module in stage.modules()):
        if ring is not None and isinstance(module, MixtureOfExperts):
            module.shard_experts(ring, batch_groups=[ring.get_group()])
    pipeline = Pipeline(stages, plan, mesh["pp"], loss_fn=loss_of, dim=CONFIG.dim, dtype=torch.float64)
    if ring is None:
        _alone()
    batches = micro_batches(ring)
    check_evaluation(pipeline, batches[:3], moe, ring)
    check(stages, pipeline.step(batches), moe, ring)
    check_evaluation(pipeline, batches, moe, ring)
    for stage in stages:  # a second step gives the same
        stage.zero_grad()
    check(stages, pipeline.step(batches), moe, ring)
    check_timeline(pipeline)


def check_evaluation(
    pipeline: Pipeline, batches: Sequence[MicroBatch], moe: MoESpec | None, ring: DeviceMesh | None
) -> None:
    """Compares the loss of an evaluation with the whole model's, and checks that gradients are unchanged."""
    before = [grad.clone() for grad in local_gradients(pipeline)]
    found = pipeline.evaluate(batches).clone()
    if ring is not None:
        dist.all_reduce(found, group=ring.get_group())
    assert_close(found, whole_run(moe)[0][: len(batches)].sum(), atol=1e-10, name="loss of the evaluation")
    assert all(torch.equal(was, now) for was, now in zip(before, local_gradients(pipeline), strict=True))


def local_gradients(pipeline: Pipeline) -> list[Tensor]:
    """Returns the local parts of all gradients."""
    found = [parameter.grad for stage in pipeline.stages for parameter in stage.parameters()]
    return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in found if grad is not None]


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_pipeline_with_ring_and_experts(pool: RankPool, schedule: str) -> None:
    pool.run(pipelined, 4, schedule, (2, 2), MOE)


def test_pipeline_only(pool: RankPool) -> None:
    pool.run(pipelined, 4, "1f1b", (4, 1), None)


@pytest.mark.long
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_pipeline_with_ring(pool: RankPool, schedule: str) -> None:
    pool.run(pipelined, 4, schedule, (2, 2), None)


@pytest.mark.long
@pytest.mark.parametrize("schedule", ["gpipe", "interleaved-zero-bubble"])
def test_pipeline_only_other_schedules(pool: RankPool, schedule: str) -> None:
    pool.run(pipelined, 4, schedule, (4, 1), None)


# ---- errors, before anything is sent


def plan_too_many_stages(group: dist.ProcessGroup) -> None:
    plan_pipeline("interleaved-1f1b", CONFIG.num_layers, group.size(), BATCHES)


def import_module(group: dist.ProcessGroup) -> None:
    """Makes the ranks import this module before the timed call: on a busy machine the import is slow."""


def test_more_stages_than_layers_raises_on_every_rank(pool: RankPool) -> None:
    pool.run(import_module, 4)
    for error in pool.expect_error(plan_too_many_stages, 4):
        assert error.type_name == "ArgumentError"
        assert "8 stages, but the model has 5 layers" in error.message


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("2f2b", 4, 2, 4), {}, "must be one of gpipe, 1f1b"),
        (("1f1b", 4, 2, 4), {"stages_per_rank": 2}, "1f1b needs 1$"),
        (("interleaved-1f1b", 4, 2, 4), {"stages_per_rank": 1}, "needs 2 or more"),
        (("zbv-zero-bubble", 8, 2, 4), {"stages_per_rank": 3}, "needs 2$"),
        (("1f1b", 4, 4, 3), {}, "num_micro_batches=3: 1f1b needs at least 4"),
        (("gpipe", 4, 4, 0), {}, "num_micro_batches=0"),
        (("interleaved-1f1b", 8, 4, 9), {}, "2 rounds"),
        (("gpipe", 4, 2, 4), {"layer_costs": [1, 2]}, "must be 4 numbers"),
    ],
)
def test_invalid_plans_raise(arguments: tuple[str, int, int, int], options: dict[str, int], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        plan_pipeline(*arguments, **options)  # type: ignore[arg-type]


def test_layers_are_split_evenly_or_by_cost() -> None:
    assert plan_pipeline("gpipe", 7, 3, 1).stage_layers == (range(3), range(3, 5), range(5, 7))
    weighted = plan_pipeline("gpipe", 5, 3, 1, layer_costs=[1, 1, 1, 1, 4])
    assert [sum((1, 1, 1, 1, 4)[i] for i in part) for part in weighted.stage_layers] == [2, 2, 4]


@pytest.mark.parametrize(("schedule", "num_layers"), [("gpipe", 3), ("interleaved-1f1b", 12), ("zbv-zero-bubble", 8)])
def test_ticks_are_unique_per_rank_and_follow_the_previous_stage(schedule: str, num_layers: int) -> None:
    per_rank = {"gpipe": 1, "interleaved-1f1b": 3, "zbv-zero-bubble": 2}[schedule]
    plan = plan_pipeline(schedule, num_layers, num_layers // per_rank, 4, stages_per_rank=per_rank)
    slots = [(stage, index) for stage in range(num_layers) for index in range(7)]
    assert len({(plan.rank_of(stage), plan.tick_of(stage, index)) for stage, index in slots}) == len(slots)
    for stage, index in slots:
        assert stage == 0 or plan.tick_of(stage, index) == plan.tick_of(stage - 1, index) + 1
    assert max(plan.tick_of(*slot) for slot in slots) < {1: 7 + 3, 3: 3 * 8 + 4, 2: 2 * 7 + 8}[per_rank]


def test_experts_for_other_num_micro_batches_raise() -> None:
    model = whole_model(MOE)  # made for BATCHES micro-batches
    with pytest.raises(ArgumentError, match=f"made for num_micro_batches={BATCHES}, but the schedule has 2"):
        cut_stages(model, plan_pipeline("gpipe", CONFIG.num_layers, 2, 2), 0)


def test_wrong_activations_raise() -> None:
    activation = torch.empty(1, 4, 8, device="meta")
    check_activation(torch.empty(1, 4, 8), activation, 0)
    for output in (torch.empty(1, 2, 8), torch.empty(1, 4, 8, dtype=torch.bfloat16)):
        with pytest.raises(ArgumentError, match="dim, dtype and tp_size must match the model"):
            check_activation(output, activation, 1)


def test_stage_placement() -> None:
    assert [plan_pipeline("interleaved-1f1b", 8, 2, 2).stages_of(rank) for rank in range(2)] == [(0, 2), (1, 3)]
    assert [plan_pipeline("zbv-zero-bubble", 8, 2, 2).stages_of(rank) for rank in range(2)] == [(0, 3), (1, 2)]


def wrong_batches(group: dist.ProcessGroup, count: int, shapes: list[tuple[int, int]]) -> None:
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("pp",))
    schedule = plan_pipeline("gpipe", CONFIG.num_layers, 2, count)
    stages = cut_stages(whole_model(None), schedule, group.rank())
    pipeline = Pipeline(stages, schedule, mesh, loss_fn=loss_of, dim=CONFIG.dim, dtype=torch.float64)
    pipeline.step([MicroBatch(torch.zeros(shape, dtype=torch.int64), {}, None) for shape in shapes])


@pytest.mark.parametrize(
    ("shapes", "message"), [([(1, 4)], "1 micro-batches"), ([(1, 4), (1, 5)], "must have the same shape")]
)
def test_invalid_micro_batches_raise(pool: RankPool, shapes: list[tuple[int, int]], message: str) -> None:
    pool.run(import_module, 2)
    assert all(message in error.message for error in pool.expect_error(wrong_batches, 2, 2, shapes))


def different_micro_batches(group: dist.ProcessGroup, evaluating: bool) -> None:
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("pp",))
    schedule = plan_pipeline("gpipe", CONFIG.num_layers, 2, 2)
    stages = cut_stages(whole_model(None), schedule, group.rank())
    pipeline = Pipeline(stages, schedule, mesh, loss_fn=loss_of, dim=CONFIG.dim, dtype=torch.float64)
    batches = [MicroBatch(torch.zeros(1, 4 + group.rank(), dtype=torch.int64), {}, None)] * 2
    pipeline.evaluate(batches) if evaluating else pipeline.step(batches)


@pytest.mark.parametrize("evaluating", [False, True])
def test_different_micro_batches_raise_disagreement(pool: RankPool, evaluating: bool) -> None:
    pool.run(import_module, 2)
    for error in pool.expect_error(different_micro_batches, 2, evaluating):
        assert error.type_name == "DisagreementError"
        assert "disagree on the shapes of micro-batches" in error.message


# ---- bubbles


def order_of_1f1b(num_ranks: int, count: int) -> dict[int, list[PipelineOp]]:
    """Returns the order of 1F1B in the paper: rank r starts with p - r forwards."""
    order = {}
    for rank in range(num_ranks):
        ahead = min(count, num_ranks - rank)
        ops = [PipelineOp("F", rank, index) for index in range(ahead)]
        for index in range(count):
            ops.append(PipelineOp("B", rank, index))
            if index + ahead < count:
                ops.append(PipelineOp("F", rank, index + ahead))
        order[rank] = ops
    return order


@pytest.mark.parametrize(("num_ranks", "count"), [(2, 2), (2, 7), (4, 4), (4, 9)])
def test_formula_equals_simulated_1f1b(num_ranks: int, count: int) -> None:
    timelines = simulate_timeline(order_of_1f1b(num_ranks, count), lambda op: 1.0 + (op.kind == "B"), num_ranks)
    step_s = max(timed.stop_s for each in timelines.values() for timed in each)
    for each in timelines.values():
        assert bubble_fraction(each, step_s) == pytest.approx(bubble_formula(num_ranks, count))


def order_of_torch(schedule: PipelineSchedule) -> dict[int, list[PipelineOp]]:
    """Returns the order of operations of each rank in torch's schedule."""
    kinds = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    stages = [
        Mock(
            group_size=schedule.num_ranks, group_rank=0, num_stages=schedule.num_stages, stage_index=index, submod=None
        )
        for index in schedule.stages_of(0)
    ]
    planned = schedule.spec.torch_class(stages, schedule.num_micro_batches, loss_fn=Mock()).pipeline_order
    return {
        rank: [
            PipelineOp(kinds[each.computation_type.name], each.stage_index, each.microbatch_index)
            for each in actions
            if each is not None and each.computation_type.name in kinds
        ]
        for rank, actions in planned.items()
    }


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("schedule", "per_rank"),
    [
        ("interleaved-1f1b", 2),
        ("interleaved-1f1b", 3),
        ("interleaved-zero-bubble", 1),
        ("interleaved-zero-bubble", 2),
        ("interleaved-zero-bubble", 3),
        ("zbv-zero-bubble", 2),
    ],
)
def test_formula_equals_simulated_torch_schedules(schedule: str, per_rank: int, num_ranks: int) -> None:
    enough = 2 * num_ranks - 1 if SCHEDULES[schedule].v_shaped else num_ranks
    for count in (1, enough, 2 * num_ranks, 3 * num_ranks):
        plan = plan_pipeline(schedule, num_ranks * per_rank, num_ranks, count, stages_per_rank=per_rank)
        simulated, expected = simulated_bubble(order_of_torch(plan), plan.num_stages), formula(plan)
        assert simulated > expected + 0.01 if count == 1 else simulated == pytest.approx(expected)


def test_deadlocked_order_raises() -> None:
    order = order_of_1f1b(2, 2)
    order[0].reverse()
    with pytest.raises(ArgumentError, match="deadlock"):
        simulate_timeline(order, lambda op: 1.0, 2)
