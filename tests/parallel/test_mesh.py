"""The mesh: the ranks of each axis and of the derived groups; invalid sizes raise."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringattn.parallel import build_mesh
from ringattn.parallel import mesh as meshes
from tests.harness.ranks import RankPool

RANKS = 4


def _members(mesh: DeviceMesh | None) -> list[int] | None:
    return None if mesh is None else mesh.mesh.flatten().tolist()


def _shapes(group: dist.ProcessGroup, sizes: dict[str, int]) -> dict[str, object]:
    mesh = build_mesh(**sizes, device_type="cpu")
    context = meshes.context_mesh(mesh)
    return {
        "axes": mesh.mesh_dim_names,
        "context": (context.mesh_dim_names, _members(context)),
        "fsdp": _members(meshes.fsdp_mesh(mesh)),
        "loss": _members(meshes.loss_mesh(mesh)),
        "ep": _members(meshes.expert_mesh(mesh)),
        "efsdp": _members(meshes.expert_fsdp_mesh(mesh)),
        "batch": meshes.data_parallel_rank(mesh),
        "again": meshes.fsdp_mesh(mesh) == meshes.fsdp_mesh(mesh),
        "table": meshes.describe_mesh(mesh),
    }


def test_innermost_axes_are_neighbours(pool: RankPool) -> None:
    shapes = pool.run(_shapes, RANKS, {"dp_shard": 2, "tp": 2})
    assert [s["axes"] for s in shapes] == [("dp_shard", "ring", "tp")] * RANKS
    assert [s["fsdp"] for s in shapes] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [s["batch"] for s in shapes] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [s["context"] for s in shapes] == [(("ring",), [rank]) for rank in range(RANKS)]
    assert all(s["ep"] is None for s in shapes)


def test_ep_reuses_the_fsdp_ranks(pool: RankPool) -> None:
    shapes = pool.run(_shapes, RANKS, {"ring": 2, "ulysses": 2, "ep": 2})
    assert [s["context"] for s in shapes] == [(("ring", "ulysses"), [0, 1, 2, 3])] * RANKS
    assert [s["fsdp"] for s in shapes] == [[0, 1, 2, 3]] * RANKS
    assert [s["ep"] for s in shapes] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [s["efsdp"] for s in shapes] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [s["batch"] for s in shapes] == [(0, 1)] * RANKS
    assert all(s["again"] for s in shapes)
    assert [line.split()[:2] for line in str(shapes[0]["table"]).splitlines()] == [
        ["axis", "ranks"],
        ["ring", "2"],
        ["ulysses", "2"],
        ["ep", "2"],
    ]


def test_replicas_are_in_loss_but_not_in_fsdp(pool: RankPool) -> None:
    shapes = pool.run(_shapes, RANKS, {"dp_replicate": 2, "ring": 2, "ep": 2})
    assert [s["fsdp"] for s in shapes] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [s["ep"] for s in shapes] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [s["efsdp"] for s in shapes] == [None] * RANKS
    assert [s["loss"] for s in shapes] == [[0, 1, 2, 3]] * RANKS
    assert [s["batch"] for s in shapes] == [(0, 2), (0, 2), (1, 2), (1, 2)]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ring": 3}, "ring=3 is 3 ranks, but 4 were started"),
        ({}, "no axis is 1 ranks, but 4 were started"),
        ({"ring": 2, "tp": 4}, "ring=2 x tp=4 is 8 ranks"),
        ({"ring": 4, "ep": 3}, "ep=3: must divide the number of FSDP ranks, dp_shard=1 x ring=4 x ulysses=1 = 4"),
        ({"tp": 4, "ep": 2}, "ep=2: must divide"),
        ({"ring": 0}, "ring=0: must be an integer of 1 or more"),
        ({"ring": 2.0}, "ring=2.0: must be an integer of 1 or more"),
    ],
)
def test_invalid_sizes_raise_on_every_rank(pool: RankPool, sizes: dict[str, int], message: str) -> None:
    errors = pool.expect_error(_shapes, RANKS, sizes)
    assert all("ArgumentError" in error.mro_names and message in error.message for error in errors)


def _differ(group: dist.ProcessGroup) -> None:
    build_mesh(**{"ring" if group.rank() else "tp": RANKS}, device_type="cpu")


def test_different_sizes_raise_disagreement(pool: RankPool) -> None:
    errors = pool.expect_error(_differ, RANKS)
    assert all(error.type_name == "DisagreementError" and "the sizes of the axes" in error.message for error in errors)
