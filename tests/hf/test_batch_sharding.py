"""Sharding of batches: rows, labels, documents, padding; and no token sees what its mask hides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ringattn.hf as rhf
from ringattn import Layout, contiguous, zigzag
from tests.harness.compare import assert_close
from tests.harness.ranks import RankPool
from tests.hf.architectures import architecture
from tests.hf.comparison import CU_SEQ_LENS, PACKED, PLAIN, SIZES, VOCABULARY, handle_batch, one_process, sharded
from tests.hf.exact import Exact

LENGTH = SIZES[1]


def _logits(handle: rhf.Handle, batch: dict[str, Any]) -> Tensor:
    local_batch = handle.shard(batch)
    with torch.no_grad(), Exact():
        return handle.unshard(handle.model(**local_batch).logits, local_batch)


def _perturbed(batch: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    ids = batch["input_ids"].clone()
    ids[:, start:stop] = (ids[:, start:stop] + 5) % VOCABULARY
    return batch | {"input_ids": ids}


def _documents_stay_apart(group: dist.ProcessGroup, name: str, cu_seq_lens: bool) -> None:
    spec = CU_SEQ_LENS if cu_seq_lens else PACKED
    with rhf.patch(architecture(name).build(), group) as handle:
        batch = handle_batch(spec, spec.batch())
        before = _logits(handle, batch)
        start = 0
        for length in spec.documents:
            changed = (_logits(handle, _perturbed(batch, start, start + length)) != before).any(2).any(0)
            assert changed.nonzero()[:, 0].tolist() == list(range(start, start + length))
            start += length


@pytest.mark.parametrize("cu_seq_lens", [False, True], ids=["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("model", ["MistralForCausalLM", "ModernBertForMaskedLM"])
def test_documents_stay_apart(pool: RankPool, model: str, cu_seq_lens: bool) -> None:
    pool.run(_documents_stay_apart, 2, model, cu_seq_lens)


def _future_is_not_seen(group: dist.ProcessGroup, name: str) -> None:
    with rhf.patch(architecture(name).build(), group) as handle:
        before = _logits(handle, PLAIN.batch())
        for token in (0, 4, 11):
            changed = (_logits(handle, _perturbed(PLAIN.batch(), token, token + 1)) != before).any(2).any(0)
            assert int(changed.nonzero()[0]) == token


@pytest.mark.parametrize("model", ["GPT2LMHeadModel", "Gemma2ForCausalLM", "DeepseekV3ForCausalLM"])
def test_the_future_is_not_seen(pool: RankPool, model: str) -> None:
    pool.run(_future_is_not_seen, 3, model)


def _local_batch(group: dist.ProcessGroup, batch: dict[str, Any]) -> dict[str, Any]:
    with rhf.patch(architecture("LlamaForCausalLM").build(), group) as handle:
        local_batch = handle.shard(batch)
        context = local_batch.pop("ringattn")
        return local_batch | {"rows": context.rows, "num_tokens": context.num_tokens}


def test_sharded_and_unchanged_values(pool: RankPool) -> None:
    batch: dict[str, Any] = PLAIN.batch()
    batch |= {"mm_token_type_ids": batch["input_ids"] % 2, "pixel_values": torch.ones(2, 3, 5, 5), "name": "as it is"}
    local_batches = pool.run(_local_batch, 2, batch)
    layout = zigzag(LENGTH, 2)
    for rank, local_batch in enumerate(local_batches):
        rows = torch.as_tensor(layout.positions(rank))
        assert local_batch["rows"].layout == layout
        assert torch.equal(local_batch["input_ids"], batch["input_ids"][:, rows])
        assert torch.equal(local_batch["mm_token_type_ids"], batch["mm_token_type_ids"][:, rows])
        assert torch.equal(local_batch["position_ids"], rows[None])
        shifted = torch.cat([batch["labels"][:, 1:], torch.full((2, 1), -100)], 1)
        assert torch.equal(local_batch["shift_labels"], shifted[:, rows])
        assert local_batch["num_items_in_batch"] == 2 * (LENGTH - 1)
        assert torch.equal(local_batch["pixel_values"], batch["pixel_values"])
        assert local_batch["name"] == "as it is"


def test_padding_and_documents_of_the_whole_sequence(pool: RankPool) -> None:
    batch: dict[str, Any] = PLAIN.batch()
    batch["attention_mask"] = torch.ones(SIZES, dtype=torch.long)
    batch["attention_mask"][0, 9:] = 0
    batch["attention_mask"][1, :3] = 0
    (local_batch, _) = pool.run(_local_batch, 2, batch)
    assert local_batch["rows"].token_spans == ((0, 9), (3, LENGTH))
    assert "attention_mask" not in local_batch
    (local_batch, _) = pool.run(_local_batch, 2, PACKED.batch())
    assert local_batch["rows"].documents == ((0, 5, 6, 13),) * 2
    assert local_batch["position_ids"].tolist()[0] == [0, 1, 2, 3, *(4, 5, 6)]
    ends = torch.tensor([0, 5, 6, 13])
    batch = {"input_ids": torch.ones(1, 13, dtype=torch.long), "cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    (local_batch, _) = pool.run(_local_batch, 2, batch | {"max_length_q": 7, "max_length_k": 7})
    assert local_batch["rows"].documents == ((0, 5, 6, 13),)
    assert not {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"} & local_batch.keys()


def test_fewer_tokens_than_ranks(pool: RankPool) -> None:
    local_batches = pool.run(_local_batch, 4, {"input_ids": torch.ones(1, 3, dtype=torch.long)})
    assert [local_batch["input_ids"].shape[1] for local_batch in local_batches] == [1, 1, 1, 1]
    assert local_batches[0]["rows"].token_spans == ((0, 3),)
    assert local_batches[0]["num_tokens"] == 3


def _no_valid_token(group: dist.ProcessGroup) -> None:
    """Labels on one rank only, then on none: a loss of 0, and no NaN."""
    model = architecture("LlamaForCausalLM").build()
    batch = PLAIN.batch()
    batch["labels"][:, :-2] = -100
    _, loss, grads = one_process(model, batch)
    with rhf.patch(model, group, layout="contiguous") as handle:
        ours = sharded(model, handle, batch, group)
        assert_close(ours[1], loss, atol=1e-10, name="loss")
        for name, grad in ours[2].items():
            assert_close(grad, grads[name], atol=1e-10, name=name)
        batch["labels"][:] = -100
        _, loss, grads = sharded(model, handle, batch, group)
    assert float(loss) == 0
    assert all(not grad.any() for grad in grads.values())


def test_ranks_without_a_valid_token(pool: RankPool) -> None:
    pool.run(_no_valid_token, 3)


def _accumulated(group: dist.ProcessGroup) -> None:
    """A given num_items_in_batch is kept, for example the number of labels of several batches."""
    model = architecture("LlamaForCausalLM").build()
    batch = PLAIN.batch()
    _, loss, _ = one_process(model, batch)
    with rhf.patch(model, group) as handle:
        _, ours, _ = sharded(model, handle, batch | {"num_items_in_batch": torch.tensor(48)}, group)
    assert_close(ours, loss * 24 / 48, atol=1e-10, name="loss")


def test_the_number_of_items_may_be_given(pool: RankPool) -> None:
    pool.run(_accumulated, 2)


def _uneven(length: int, world_size: int) -> Layout:
    """All but one token on the last rank."""
    ranges = [(range(rank, rank + 1),) for rank in range(world_size - 1)]
    return Layout(length, (*ranges, (range(world_size - 1, length),)))


def _custom_layouts(group: dist.ProcessGroup) -> None:
    model = architecture("MistralForCausalLM").build()
    logits, _, _ = one_process(model, PLAIN.batch())
    for layout in (_uneven, contiguous):
        with rhf.patch(model, group, layout=layout) as handle:
            assert handle.shard(PLAIN.batch())["ringattn"].rows.layout == layout(LENGTH, 3)
            assert_close(_logits(handle, PLAIN.batch()), logits, atol=1e-10, name="logits")


def test_custom_layouts(pool: RankPool) -> None:
    pool.run(_custom_layouts, 3)
