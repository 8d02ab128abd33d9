"""Sharding whole tensors and batches, and putting them together again."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ringattn
from ringattn.errors import ArgumentError, ArgumentTypeError, LayoutError
from tests.attention.problem import WORLDS, rows_of
from tests.harness.cases import LAYOUT_CASES, LayoutCase, case_ids
from tests.harness.ranks import RankPool

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def whole_tensor(seq_len: int, dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Three dims, the sequence along one of them; values that differ from row to row."""
    shape = [2, 3, 4]
    shape[dim] = seq_len
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    return numbers % 3 == 0 if dtype is torch.bool else (numbers % 251).to(dtype)


def round_trip(group: dist.ProcessGroup, case: LayoutCase) -> None:
    for seq_len in (0, 1, 13):
        layout = case.build(seq_len, group.size())
        for dim in (0, 1, 2, -1, -2, -3):
            for dtype in DTYPES if dim == 1 else DTYPES[:1]:
                x = whole_tensor(seq_len, dim, dtype)
                local = ringattn.shard(x, layout, group, dim=dim)
                assert torch.equal(local, rows_of(x, layout, group.rank(), dim))
                assert local.is_contiguous()
                back = ringattn.unshard(local, layout, group, dim=dim)
                assert back.dtype == dtype
                assert torch.equal(back, x)
                assert back.is_contiguous()


@pytest.mark.parametrize("layout", LAYOUT_CASES, ids=case_ids(LAYOUT_CASES))
def test_round_trip(pool: RankPool, layout: LayoutCase) -> None:
    for world_size in WORLDS:
        pool.run(round_trip, world_size, layout)


def gradients(group: dist.ProcessGroup, case: LayoutCase) -> None:
    """What is computed from the whole counts once, not once per rank."""
    for dim in (0, 1, -1):
        layout = case.build(13, group.size())
        weights = torch.randn(
            whole_tensor(13, dim).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        x = whole_tensor(13, dim)
        local = rows_of(x, layout, group.rank(), dim).requires_grad_()
        loss = (ringattn.unshard(local, layout, group, dim=dim).square() * weights).sum()
        (grad,) = torch.autograd.grad(loss, local)
        assert torch.equal(grad, rows_of(2 * x * weights, layout, group.rank(), dim))

        x.requires_grad_()
        (grad,) = torch.autograd.grad((ringattn.shard(x, layout, group, dim=dim) * 3).sum(), x)
        own = torch.zeros(13, dtype=torch.float64)
        own[torch.from_numpy(layout.positions(group.rank()))] = 3
        shape = [1, 1, 1]
        shape[dim] = 13
        assert torch.equal(grad, own.view(shape).expand(x.shape))


@pytest.mark.parametrize("layout", LAYOUT_CASES, ids=case_ids(LAYOUT_CASES))
def test_gradients(pool: RankPool, layout: LayoutCase) -> None:
    for world_size in WORLDS:
        pool.run(gradients, world_size, layout)


def of_views(group: dist.ProcessGroup) -> None:
    layout = ringattn.zigzag(13, group.size())
    x = whole_tensor(13, 1).transpose(0, 2)
    local = ringattn.shard(x, layout, group)
    assert torch.equal(local, rows_of(x, layout, group.rank()))
    wide = torch.empty(*local.shape, 2, dtype=local.dtype)
    wide[..., 0] = local
    assert torch.equal(ringattn.unshard(wide[..., 0], layout, group), x)


def test_views(pool: RankPool) -> None:
    pool.run(of_views, 3)


def a_batch_of(group: dist.ProcessGroup, case: LayoutCase) -> None:
    layout = case.build(13, group.size())
    positions = torch.from_numpy(layout.positions(group.rank()))
    ids = torch.arange(26).reshape(2, 13) + 100
    extra = torch.randn(2, 13, 3, 5)
    batch = {"input_ids": ids, "labels": ids, "extra": extra, "name": "x", "count": torch.tensor(3.0), "nothing": None}
    share = ringattn.shard_batch(batch, layout, group)
    assert set(share) == {"input_ids", "shift_labels", "extra", "name", "count", "nothing", "position_ids"}
    assert set(batch) == {"input_ids", "labels", "extra", "name", "count", "nothing"}
    assert torch.equal(share["input_ids"], ids[:, positions])
    assert torch.equal(share["extra"], extra[:, positions])
    assert share["name"] == "x"
    assert share["nothing"] is None
    assert share["count"] is batch["count"]
    assert share["position_ids"].dtype == torch.int64
    assert torch.equal(share["position_ids"], positions[None])
    # Each token predicts the one after it in the whole sequence, whoever holds that; the last predicts nothing.
    expected = torch.where(positions == 12, -100, ids[:, positions] + 1)
    assert torch.equal(share["shift_labels"], expected)

    given = torch.arange(13).flip(0).expand(2, 13)
    share = ringattn.shard_batch({"position_ids": given, "shift_labels": ids}, layout, group)
    assert torch.equal(share["position_ids"], given[:, positions])
    assert torch.equal(share["shift_labels"], ids[:, positions])
    # Ignored labels stay ignored, one place earlier.
    labels = ids.clone()
    labels[0, 5] = -100
    share = ringattn.shard_batch({"labels": labels}, layout, group)
    assert torch.equal(share["shift_labels"][0] == -100, (positions == 4) | (positions == 12))


def test_position_ids() -> None:
    layout = ringattn.zigzag(12, 2)
    ids = ringattn.position_ids(layout, 1, device="cpu")
    assert (ids.tolist(), ids.dtype, ids.device.type) == ([3, 4, 5, 6, 7, 8], torch.int64, "cpu")
    assert ringattn.position_ids(ringattn.contiguous(2, 3), 2).shape == (0,)
    assert ringattn.position_ids(layout, 0, device="meta").is_meta
    with pytest.raises(ringattn.LayoutError, match="rank=2"):
        ringattn.position_ids(layout, 2)


@pytest.mark.parametrize("layout", LAYOUT_CASES, ids=case_ids(LAYOUT_CASES))
def test_batches(pool: RankPool, layout: LayoutCase) -> None:
    for world_size in WORLDS:
        pool.run(a_batch_of, world_size, layout)


def empty_batches(group: dist.ProcessGroup) -> None:
    share = ringattn.shard_batch({"labels": torch.zeros(2, 0, dtype=torch.int64)}, ringattn.zigzag(0, 2), group)
    assert share["shift_labels"].shape == (2, 0)
    share = ringattn.shard_batch({"labels": torch.zeros(2, 1, dtype=torch.int64)}, ringattn.contiguous(1, 2), group)
    assert share["shift_labels"].tolist() == ([[-100], [-100]] if group.rank() == 0 else [[], []])


def test_sequences_of_one_token_and_none(pool: RankPool) -> None:
    pool.run(empty_batches, 2)


def wrong_batches(group: dist.ProcessGroup) -> None:
    layout = ringattn.zigzag(13, 2)
    ids = torch.zeros(2, 13, dtype=torch.int64)
    for name, bad in {
        "input_ids": ids[:, :12],
        "attention_mask": torch.ones(2, 13, 13, 13),
        "mask": torch.ones(2, 1, 13, 13),
        "labels": ids[0],
        "lengths": torch.ones(2),
    }.items():
        with pytest.raises(ArgumentError, match=rf"batch\['{name}'\] has shape .*must be \(batch, 13"):
            ringattn.shard_batch({"ids": ids, name: bad}, layout, group)
    with pytest.raises(ArgumentError, match="both labels and shift_labels"):
        ringattn.shard_batch({"labels": ids, "shift_labels": ids}, layout, group)
    with pytest.raises(LayoutError, match="made for 3 ranks, but the group has 2"):
        ringattn.shard_batch({"labels": ids}, ringattn.zigzag(13, 3), group)
    for not_a_batch in ([ids], ids, None):
        with pytest.raises(ArgumentTypeError, match="must be a mapping"):
            ringattn.shard_batch(not_a_batch, layout, group)  # type: ignore[arg-type]
    for not_labels in ([1, 2], None, 3):
        with pytest.raises(ArgumentError, match="labels"):
            ringattn.shard_batch({"labels": not_labels}, layout, group)


def test_wrong_batches(pool: RankPool) -> None:
    pool.run(wrong_batches, 2)


def wrong_shards(group: dist.ProcessGroup) -> None:
    layout, x = ringattn.zigzag(13, 2), whole_tensor(13, 1)
    for function in (ringattn.shard, ringattn.unshard):
        with pytest.raises(ArgumentTypeError, match=r"x=\[1\]: must be a tensor, not list"):
            function([1], layout, group)  # type: ignore[arg-type]
        for dim in (3, -4, True, "1"):
            with pytest.raises(ArgumentError, match=r"dim=.*x has 3 dims, so it must lie in \[-3, 2\]"):
                function(x, layout, group, dim=dim)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="layout='zigzag': must be a Layout"):
            function(x, "zigzag", group)  # type: ignore[arg-type]
        with pytest.raises(LayoutError, match="made for 3 ranks, but the group has 2"):
            function(x, ringattn.zigzag(13, 3), group)
    with pytest.raises(LayoutError, match=r"x has 12 rows along dim 1, but layout=zigzag\(13, 2\) has 13 positions"):
        ringattn.shard(x[:, :12], layout, group)
    with pytest.raises(LayoutError, match=r"x has 13 rows along dim 1, but layout=zigzag\(13, 2\) gives rank 0 "):
        ringattn.unshard(x, layout, group)


def test_wrong_shards(pool: RankPool) -> None:
    pool.run(wrong_shards, 2)


def disagree(group: dist.ProcessGroup, what: str) -> None:
    layout = ringattn.contiguous(12, 3)
    odd = group.rank() == 1
    shape = (2, 5 if odd and what == "rows" else 4, 7 if odd and what == "width" else 3)
    if odd and what == "layout":
        layout = ringattn.striped(12, 3)
    dim = 1 if what != "dim" else (0 if odd else 1)
    shape = (4, 4, 3) if what == "dim" else shape
    ringattn.unshard(
        torch.zeros(shape, dtype=torch.int64 if odd and what == "dtype" else torch.float64), layout, group, dim
    )


@pytest.mark.parametrize("what", ["rows", "width", "layout", "dtype", "dim"])
def test_ranks_that_disagree(pool: RankPool, what: str) -> None:
    errors = pool.expect_error(disagree, 3, what)
    assert {error.type_name for error in errors} == {"LayoutError" if what == "rows" else "DisagreementError"}
    assert len({error.message for error in errors}) == 1
