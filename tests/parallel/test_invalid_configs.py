"""Invalid configurations raise on every rank, before anything is changed or sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn.parallel import local_batch, make_cp_attention, parallelize
from tests.harness.ranks import RankPool
from tests.parallel.training import CONFIG, batches, make_model, mesh_of

RANKS = 4
FEW_KV_HEADS = replace(CONFIG, num_kv_heads=2)


def too_few_kv_heads(group: dist.ProcessGroup) -> None:
    parallelize(make_model(FEW_KV_HEADS), mesh_of((("tp", 4),)))


def indivisible_dims(group: dist.ProcessGroup) -> None:
    parallelize(make_model(replace(CONFIG, hidden=21, vocab_size=35)), mesh_of((("tp", 4),)))


def zero_1(group: dist.ProcessGroup) -> None:
    parallelize(make_model(CONFIG), mesh_of((("ring", 4),)), zero=1)


def zero_4(group: dist.ProcessGroup) -> None:
    parallelize(make_model(CONFIG), mesh_of((("ring", 4),)), zero=4)


def zero_0_with_dp_shard(group: dist.ProcessGroup) -> None:
    parallelize(make_model(CONFIG), mesh_of((("dp_shard", 2), ("tp", 2))), zero=0)


def pp_without_stages(group: dist.ProcessGroup) -> None:
    parallelize(make_model(CONFIG), mesh_of((("pp", 2), ("tp", 2))))


def odd_rows(group: dist.ProcessGroup) -> None:
    # Only the last rank of the ring has an odd number of rows.
    make_cp_attention(mesh_of((("ring", 2), ("tp", 2))), ringattn.contiguous(7, 2))


def odd_rows_in_batch(group: dist.ProcessGroup) -> None:
    local_batch({}, mesh_of((("ring", 2), ("tp", 2))), ringattn.contiguous(7, 2))


def layout_of_other_world_size(group: dist.ProcessGroup) -> None:
    make_cp_attention(mesh_of((("ring", 2), ("tp", 2))), ringattn.zigzag(16, 4))


def odd_sequences(group: dist.ProcessGroup) -> None:
    local_batch({"input_ids": torch.zeros(3, 8)}, mesh_of((("dp_shard", 2), ("tp", 2))), ringattn.contiguous(8, 1))


def odd_masks(group: dist.ProcessGroup) -> None:
    mesh = mesh_of((("dp_shard", 2), ("tp", 2)))
    local_batch({"input_ids": torch.zeros(2, 8), "mask": [ringattn.causal()] * 3}, mesh, ringattn.contiguous(8, 1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (too_few_kv_heads, "tp=4: must divide num_kv_heads=2 (kv heads are not replicated over tp: use a smaller tp)"),
        (indivisible_dims, "tp=4: must divide hidden=21, vocab_size=35"),
        (zero_1, "zero=1: must be 0, 2 or 3: for ZeRO-1 pass 2, and use no_sync"),
        (zero_4, "zero=4: must be 0, 2 or 3"),
        (zero_0_with_dp_shard, "zero=0 replicates all weights, but dp_shard=2 shards them"),
        (pp_without_stages, "pp=2: the model has all its 2 layers; cut it into stages first"),
        (odd_rows, "gives rank 1 3 rows, which tp=2 must divide"),
        (odd_rows_in_batch, "gives rank 1 3 rows, which tp=2 must divide"),
        (layout_of_other_world_size, "4 ranks"),
        (odd_sequences, "batch['input_ids'] has 3 sequences, which dp_replicate x dp_shard = 2 must divide"),
        (odd_masks, "batch['mask'] has 3 sequences"),
    ],
)
def test_invalid_configs_raise_on_every_rank(pool: RankPool, wrong: Callable[..., None], message: str) -> None:
    for error in pool.expect_error(wrong, RANKS):
        assert "ArgumentError" in error.mro_names
        assert message in error.message


def _model_unchanged(group: dist.ProcessGroup) -> None:
    """An invalid configuration leaves the model unchanged."""
    model = make_model(FEW_KV_HEADS)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ringattn.ArgumentError):
        parallelize(model, mesh_of((("tp", 4),)))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_invalid_config_leaves_the_model_unchanged(pool: RankPool) -> None:
    pool.run(_model_unchanged, RANKS)


def _local_batches(group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor, int]:
    mesh = mesh_of((("dp_shard", 2), ("ring", 2)))
    (batch,) = batches("packed", 37, 36, steps=1)
    share = local_batch(batch, mesh, ringattn.zigzag(37, 2))
    return share["input_ids"], share["position_ids"], len(share["mask"])


def test_local_batch_shards_sequences_and_tokens(pool: RankPool) -> None:
    (batch,) = batches("packed", 37, 36, steps=1)
    layout = ringattn.zigzag(37, 2)
    for rank, (tokens, positions, num_masks) in enumerate(pool.run(_local_batches, RANKS)):
        rows, columns = slice(4 * (rank // 2), 4 * (rank // 2) + 4), torch.as_tensor(layout.positions(rank % 2))
        assert torch.equal(tokens, batch["input_ids"][rows][:, columns])
        assert torch.equal(positions, batch["position_ids"][rows][:, columns])
        assert num_masks == 4
