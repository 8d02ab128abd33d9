"""Process groups and meshes: which ranks are meant, their numbers, and the route to another rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import ringattn
from ringattn.comm.topology import rank_mesh, resolve_group
from ringattn.errors import ArgumentError, ArgumentTypeError
from tests.attention.problem import Problem, solve, whole
from tests.harness.cases import layout_case, mask_case
from tests.harness.compare import assert_close
from tests.harness.ranks import RankPool

PROBLEM = Problem(mask_case("documents&causal"), layout_case("zigzag"), 23, batch=2, heads=4, kv_heads=2)


def check_exact(results: list[dict[str, Tensor]]) -> None:
    expected = PROBLEM.expected()
    for name, actual in whole(PROBLEM, results).items():
        assert_close(actual, getattr(expected, name), atol=1e-10, name=name)


# ---- resolve


@pytest.mark.parametrize("group", ["ring", 3])
def test_without_torch_distributed(group: object) -> None:
    with pytest.raises(ArgumentError, match=r"init_process_group\(\) first"):
        resolve_group(group)


def resolve_groups(group: dist.ProcessGroup) -> None:
    assert resolve_group(group) is group
    assert resolve_group(None) is dist.group.WORLD
    for bad in ("ring", 3, [0, 1], torch.distributed, True):
        with pytest.raises(ArgumentTypeError, match="must be a ProcessGroup, a 1-D DeviceMesh, or None"):
            resolve_group(bad)


def test_resolve(pool: RankPool) -> None:
    pool.run(resolve_groups, 4)


def resolve_meshes(_: dist.ProcessGroup) -> None:
    line = init_device_mesh("cpu", (4,))
    found = resolve_group(line)
    assert (found.rank(), found.size()) == (dist.get_rank(), 4)
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    with pytest.raises(ArgumentError, match=r"a mesh of 2 dimensions.*mesh\['ring'\]"):
        resolve_group(square)
    ring = resolve_group(square["ring"])
    assert dist.get_process_group_ranks(ring) == [dist.get_rank() % 2, dist.get_rank() % 2 + 2]


def test_resolve_meshes(pool: RankPool) -> None:
    pool.run(resolve_meshes, 4)


def resolve_others(_: dist.ProcessGroup, mesh: bool) -> None:
    other = DeviceMesh("cpu", [1, 3]) if mesh else dist.new_group([1, 3])
    if dist.get_rank() in (1, 3):
        assert resolve_group(other).size() == 2
    else:
        with pytest.raises(ArgumentError, match="not a member"):
            resolve_group(other)


def test_groups_of_others_are_refused(pool: RankPool) -> None:
    pool.run(resolve_others, 4, False)


def test_meshes_of_others_are_refused(pool: RankPool) -> None:
    """Torch's own get_group() fails with a bare IndexError there."""
    pool.run(resolve_others, 4, True)


# ---- groups that do not begin with rank 0


def attend_in_subgroup(_: dist.ProcessGroup) -> dict[str, Tensor] | None:
    group = dist.new_group([1, 3])
    return solve(group, PROBLEM) if dist.get_rank() in (1, 3) else None


def test_attention_in_a_group_of_ranks_1_and_3(pool: RankPool) -> None:
    results = pool.run(attend_in_subgroup, 4)
    assert results[0] is results[2] is None
    check_exact([result for result in results if result is not None])


def attend_in_two_groups(_: dist.ProcessGroup) -> dict[str, Tensor]:
    """Two rings side by side, of ranks [0, 2] and [1, 3], each with its own data."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "other"))
    return solve(resolve_group(mesh["ring"]), PROBLEM)


def test_attention_in_groups_side_by_side(pool: RankPool) -> None:
    results = pool.run(attend_in_two_groups, 4)
    check_exact(results[::2])
    check_exact(results[1::2])


def attend_on_a_mesh(_: dist.ProcessGroup) -> Tensor:
    mesh, layout = init_device_mesh("cpu", (4,)), PROBLEM.layouts(4)[0]
    q, k, v = (ringattn.shard(x, layout, resolve_group(mesh)) for x in PROBLEM.tensors()[:3])
    mask = PROBLEM.built_mask()
    out = ringattn.ring_attention(q, k, v, mesh, mask=mask, layout=layout)
    assert torch.equal(out, ringattn.ring_attention(q, k, v, None, mask=mask, layout=layout))
    return out


def test_attention_on_a_mesh(pool: RankPool) -> None:
    outs = [{"out": out} for out in pool.run(attend_on_a_mesh, 4)]
    check_exact(outs)


# ---- meshes


def check_routes(group: dist.ProcessGroup, mesh_ranks: list[list[int]]) -> tuple[int, int, tuple[int, ...]]:
    """Returns (rank, size, shape) of the mesh; checks the route to every peer."""
    mesh = DeviceMesh("cpu", torch.tensor(mesh_ranks), mesh_dim_names=("outer", "inner"))
    ranks = rank_mesh(mesh, ("outer", "inner"))
    flat = [rank for row in mesh_ranks for rank in row]
    for peer in range(4):
        coordinates = [divmod(number, len(mesh_ranks[0])) for number in (ranks.rank, peer)]
        differing = sum(a != b for a, b in zip(*coordinates, strict=True))
        if differing != 1:
            with pytest.raises(ValueError, match="on no axis"):
                ranks.route(peer)
            continue
        axis, group_rank = ranks.route(peer)
        assert dist.get_global_rank(ranks.axes[axis].group, group_rank) == flat[peer]
    return ranks.rank, ranks.size, ranks.shape


@pytest.mark.parametrize(
    "mesh", [[[0, 1], [2, 3]], [[0, 1], [3, 2]], [[3, 1], [0, 2]], [[2, 0, 3, 1]], [[1], [3], [0], [2]]], ids=str
)
def test_ranks_and_routes(pool: RankPool, mesh: list[list[int]]) -> None:
    """Ranks are numbered row by row, in any order of the processes in the mesh."""
    flat = [rank for row in mesh for rank in row]
    for rank, (number, size, shape) in enumerate(pool.run(check_routes, 4, mesh)):
        assert (number, size, shape) == (flat.index(rank), 4, (len(mesh), len(mesh[0])))


def meshes_that_do_not_fit(group: dist.ProcessGroup) -> None:
    x = torch.randn(1, 4, 2, 4)
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    turned = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ulysses", "ring"))
    with pytest.raises(ArgumentError, match=r"must have the axes \('outer', 'inner'\).*mesh\['outer'\]"):
        ringattn.ring_attention(x, x, x, square)
    with pytest.raises(ArgumentError, match=r"must have the axes \('ring', 'ulysses'\)"):
        ringattn.hybrid_attention(x, x, x, turned)
    with pytest.raises(ArgumentError, match="a mesh of 2 dimensions"):
        ringattn.gather_attention(x, x, x, square)
    with pytest.raises(ArgumentError, match="a mesh of 2 dimensions"):
        ringattn.ulysses_attention(x, x, x, square)
    with pytest.raises(ArgumentError, match="must have two dims"):
        ringattn.hybrid_attention(x, x, x, square["ring"])
    with pytest.raises(ringattn.ArgumentTypeError, match="must be a 2-D DeviceMesh"):
        ringattn.hybrid_attention(x, x, x, group)  # type: ignore[arg-type]


def test_meshes_that_do_not_fit(pool: RankPool) -> None:
    pool.run(meshes_that_do_not_fit, 4)


def shard_and_unshard(group: dist.ProcessGroup, mesh_ranks: list[list[int]]) -> None:
    """Shards over a mesh unshard to the whole tensor, and so do their gradients."""
    mesh = DeviceMesh("cpu", torch.tensor(mesh_ranks), mesh_dim_names=("ring", "ulysses"))
    for layout in (ringattn.zigzag(13, 4), ringattn.contiguous(3, 4)):
        x = torch.randn(2, layout.seq_len, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        own = ringattn.shard(x, layout, mesh).requires_grad_()
        assert own.shape[1] == layout.num_tokens(rank_mesh(mesh).rank)
        whole = ringattn.unshard(own, layout, mesh)
        assert torch.equal(whole, x)
        (grad,) = torch.autograd.grad(whole, own, x)
        assert torch.equal(grad, own)


@pytest.mark.parametrize("mesh", [[[0, 1], [2, 3]], [[3, 1], [0, 2]], [[0], [2], [1], [3]]], ids=str)
def test_shards_of_a_mesh(pool: RankPool, mesh: list[list[int]]) -> None:
    pool.run(shard_and_unshard, 4, mesh)
