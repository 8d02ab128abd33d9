"""Teams: the ranks of a group or a mesh, their numbers, the way to another, and trading packets along an axis."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import ringattn
from ringattn.comm.all_to_all import AllToAll
from ringattn.comm.group import MeshAxis, RankMesh, agree, rank_mesh
from ringattn.comm.packet import Field, Packet
from ringattn.errors import ArgumentError, DisagreementError, LayoutError
from tests.harness.ranks import RankPool


def numbers(group: dist.ProcessGroup, mesh_ranks: list[list[int]]) -> tuple[int, int, tuple[int, ...]]:
    """This rank's number in a mesh, and what each reachable peer says when it is asked along the way to it."""
    mesh = DeviceMesh("cpu", torch.tensor(mesh_ranks), mesh_dim_names=("outer", "inner"))
    team = rank_mesh(mesh, ("outer", "inner"))
    flat = [rank for row in mesh_ranks for rank in row]
    for peer in range(4):
        places = [divmod(number, len(mesh_ranks[0])) for number in (team.rank, peer)]
        differing = sum(a != b for a, b in zip(*places, strict=True))
        if differing != 1:
            with pytest.raises(ValueError, match="on no axis"):
                team.route(peer)
            continue
        axis, member = team.route(peer)
        assert dist.get_global_rank(team.axes[axis].group, member) == flat[peer]
    assert team.along(1).shape == (len(mesh_ranks[0]),)
    return team.rank, team.size, team.shape


@pytest.mark.parametrize(
    "mesh", [[[0, 1], [2, 3]], [[0, 1], [3, 2]], [[3, 1], [0, 2]], [[2, 0, 3, 1]], [[1], [3], [0], [2]]], ids=str
)
def test_numbers_and_ways(pool: RankPool, mesh: list[list[int]]) -> None:
    """Row by row, whatever order the mesh holds its ranks in."""
    flat = [rank for row in mesh for rank in row]
    for rank, (number, size, shape) in enumerate(pool.run(numbers, 4, mesh)):
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


def wrong_on_one_rank(group: dist.ProcessGroup, wrong: str, operation: str) -> tuple[str, str]:
    """The same error on all ranks of a mesh, though each hears only its own row and column; and the mesh goes on."""
    axes = ("ring", "ulysses") if operation == "hybrid" else ("outer", "inner")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=axes)
    call = getattr(ringattn, f"{operation}_attention")
    last = group.rank() == 3
    x = torch.randn(1, 4, 2, 4)
    q = x
    options: dict[str, object]
    if wrong == "rows":
        q, options = torch.randn(1, 5, 2, 4) if last else x, {"layout": ringattn.contiguous(16, 4)}
    elif wrong == "scale":
        options = {"scale": 0.5 if last else 0.25}
    else:
        options = {"stages": 0 if last else 1}
    with pytest.raises(ringattn.RingAttnError) as caught:
        call(q, x, x, mesh, **options)
    assert call(x, x, x, mesh).shape == x.shape
    return type(caught.value).__name__, str(caught.value)


@pytest.mark.parametrize(
    ("operation", "wrong", "error", "message"),
    [
        ("ring", "rows", LayoutError, "on rank 3 of 4: q has 5 rows"),
        ("hybrid", "rows", LayoutError, "on rank 3 of 4: q has 5 rows"),
        (
            "ring",
            "scale",
            DisagreementError,
            "disagree on scale (rank 0: 0.25; rank 1: 0.25; rank 2: 0.25; rank 3: 0.5)",
        ),
        ("hybrid", "stages", ArgumentError, "on rank 3 of 4: stages=0: must be an integer of 1 or more"),
    ],
)
def test_all_ranks_of_a_mesh_raise(
    pool: RankPool, operation: str, wrong: str, error: type[Exception], message: str
) -> None:
    for kind, told in pool.run(wrong_on_one_rank, 4, wrong, operation):
        assert kind == error.__name__
        assert message in told


def agree_on_meshes(group: dist.ProcessGroup) -> int:
    """Two meshes that share an axis' group are two teams: what one agreed on, the other has not."""
    first, second = (init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")) for _ in range(2))
    teams = [rank_mesh(first), RankMesh((rank_mesh(first).axes[0], rank_mesh(second).axes[1]))]
    made = []
    for team in (*teams, *teams):
        agree(team, "together", lambda: made.append(1) or ({}, 1))  # type: ignore[func-returns-value]
    return len(made)


def test_teams_agree_apart(pool: RankPool) -> None:
    assert pool.run(agree_on_meshes, 4) == [2] * 4


def gathered(group: dist.ProcessGroup, mesh_ranks: list[list[int]]) -> None:
    """Shards of a mesh, put together again; and their gradients."""
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
    pool.run(gathered, 4, mesh)


def trade(group: dist.ProcessGroup) -> None:
    """Packets of every size, none among them, of two dtypes."""
    rank, world = group.rank(), group.size()
    axis = MeshAxis(group, tuple(range(world)), rank)

    def fields(sender: int, receiver: int) -> list[Field]:
        return [Field((sender * receiver,), torch.bfloat16), Field((2, receiver), torch.float64)]

    parts: list[Packet | None] = []
    for peer in range(world):
        packet = Packet.empty(fields(rank, peer), torch.device("cpu"))
        for tensor in packet.tensors:
            tensor.fill_(10 * rank + peer)
        parts.append(None if peer == rank else packet)
    trades = [AllToAll(axis, parts, [fields(peer, rank) for peer in range(world)]) for _ in range(2)]
    for under_way in trades:
        came = under_way.wait()
        assert sorted(came) == [peer for peer in range(world) if peer != rank]
        for peer, packet in came.items():
            assert all((tensor == 10 * peer + rank).all() for tensor in packet.tensors)
            assert [(tuple(t.shape), t.dtype) for t in packet.tensors] == fields(peer, rank)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_trades(pool: RankPool, world: int) -> None:
    pool.run(trade, world)
