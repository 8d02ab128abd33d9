"""The contents of a RingCache between calls of generate: save, load, fork, crop, select rows, free."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DynamicCache

import ringattn.hf as rhf
from ringattn.errors import OutOfPagesError
from ringattn.hf import RingCache
from tests.harness.compare import assert_within_rule
from tests.harness.ranks import RankPool
from tests.hf.generate_cases import (
    PAGE_SIZE,
    beams,
    build,
    first_turn,
    generate_in_one_process,
    padded,
    prompts,
    second_turn,
)

NAME = "MistralForCausalLM"


def save(group: dist.ProcessGroup, folder: str) -> Tensor:
    model = build(NAME)
    with rhf.patch(model, group) as handle:
        cache = RingCache(handle, num_pages=40, page_size=PAGE_SIZE, shard_from=5)
        sequences = first_turn(model, cache)[0]
        other = cache.fork()  # which is no part of what is saved
        cache.save(folder)
        other.reset()
    return sequences


def load(group: dist.ProcessGroup, folder: str, sequences: Tensor) -> tuple[list[Tensor], int]:
    model = build(NAME)
    with rhf.patch(model, group) as handle:
        cache = RingCache.load(handle, folder, num_pages=40, shard_from=5)
        assert cache.store is not None
        return second_turn(model, cache, sequences), len(cache.store.sequences)


@pytest.mark.parametrize(
    ("saving", "loading"),
    [(3, 2), *(pytest.param(a, b, marks=pytest.mark.long) for a in (1, 2, 4) for b in (1, 3, 4))],
)
def test_saved_and_continued_on_other_ranks(pool: RankPool, tmp_path: Path, saving: int, loading: int) -> None:
    dtypes = (torch.float32, torch.float64)
    plain, exact = (generate_in_one_process(NAME, "padded_conversation", dtype) for dtype in dtypes)
    sequences = pool.run(save, saving, str(tmp_path))[0]
    for found, num_sequences in pool.run(load, loading, str(tmp_path), sequences):
        assert num_sequences == 2
        assert torch.equal(found[0], plain[0])
        logits = found[1:]
        for x, e, p in zip(logits, exact[-len(logits) :], plain[-len(logits) :], strict=True):
            assert_within_rule(x, e.double(), p, name="logits")


def load_wrong(group: dist.ProcessGroup, folder: str) -> None:
    with rhf.patch(build(NAME, num_hidden_layers=1), group) as handle:
        RingCache.load(handle, folder, num_pages=40)


def test_a_snapshot_that_does_not_fit(pool: RankPool, tmp_path: Path) -> None:
    for error in pool.expect_error(load_wrong, 2, str(tmp_path)):
        assert error.type_name == "SnapshotError"
        assert "rows.json" in error.message
    pool.run(save, 2, str(tmp_path))
    for error in pool.expect_error(load_wrong, 2, str(tmp_path)):
        assert error.type_name == "SnapshotError"
        assert "the snapshot has 2 layers, the model has 1" in error.message


def free(cache: RingCache) -> int:
    """How many pages of all ranks are free; those of a cache that has none yet count as well."""
    return 0 if cache.store is None else sum(cache.store.num_free_pages)


def use_up(group: dist.ProcessGroup) -> list[tuple[int, int]]:
    """Goes through what changes rows; returns (columns, pages in use) after each step."""
    model = build("LlamaForCausalLM")
    with rhf.patch(model, group) as handle:
        cache = RingCache(handle, num_pages=60, page_size=PAGE_SIZE, shard_from=5)
        assert (cache.get_seq_length(), cache.batch_size, len(cache), bool(cache)) == (0, -1, 2, True)
        seen = []

        def note() -> None:
            seen.append((cache.get_seq_length(), 60 * group.size() - free(cache) if cache.store else 0))

        def pads() -> list[int]:
            return list(cache.past.left_padding)

        ids, mask = padded([11, 6], 11)
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
        note()
        cache.batch_repeat_interleave(3)
        assert cache.batch_size == 6
        note()
        cache.reorder_cache(torch.tensor([5, 5, 0, 0, 1, 3]))
        assert pads() == [5, 5, 0, 0, 0, 5]
        note()
        cache.batch_select_indices(torch.tensor([False, True, False, True, False, False]))
        assert pads() == [5, 0]
        note()
        cache.crop(0)
        note()
        cache.crop(-3)
        note()
        cache.crop(4)
        assert pads() == [4, 0]
        note()
        other = cache.fork()
        cache.reset()
        note()
        assert other.get_seq_length() == 4
        other.reset()
        assert other.store is None
        note()
        beams(model, cache)
        assert cache.store is not None
        assert len(cache.store.sequences) == 6
        cache.reset()
        note()
    return seen


def test_pages_follow_what_is_held(pool: RankPool) -> None:
    results = pool.run(use_up, 2)
    assert results[0] == results[1]
    columns, pages = zip(*results[0], strict=True)
    assert columns == (11, 11, 11, 11, 11, 8, 4, 0, 0, 0)
    # 11 and 6 tokens, zigzag over two ranks in pages of four: 6 and 5 of them are 4 pages, 3 and 3 are 2.
    assert pages[:5] == (6, 6, 6, 6, 6)
    assert pages[-2:] == (0, 0)
    assert 0 < pages[6] < pages[5] < 6


def longer_than(group: dist.ProcessGroup) -> list[tuple[str, int, int]]:
    """Runs out of pages in a prefill, in the middle of a batch, and while decoding; goes on each time."""
    model = build("LlamaForCausalLM")
    errors = []
    with rhf.patch(model, group) as handle:
        cache = RingCache(handle, num_pages=4, page_size=PAGE_SIZE, shard_from=5)
        half = 12 * group.size()  # more than half of what there is room for
        for ids, mask in (padded([90], 90), padded([half, half], half)):
            with pytest.raises(OutOfPagesError) as raised:
                model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4)
            errors.append((str(raised.value), cache.get_seq_length(), free(cache)))
        with torch.no_grad():
            model(prompts(1, 9), past_key_values=cache)
        with pytest.raises(OutOfPagesError) as raised:
            model.generate(prompts(1, 10), past_key_values=cache, max_new_tokens=90)
        errors.append((str(raised.value), cache.get_seq_length(), free(cache)))
        cache.reset()
        model.generate(prompts(1, 10), past_key_values=cache, max_new_tokens=3)
    return errors


@pytest.mark.parametrize("world_size", [1, 3])
def test_out_of_pages_everywhere_and_nothing_lost(pool: RankPool, world_size: int) -> None:
    results = pool.run(longer_than, world_size)
    assert all(errors == results[0] for errors in results)
    prefill, batch, decode = results[0]
    assert "num_pages" in prefill[0]
    assert prefill[1:] == batch[1:] == (0, 4 * world_size)
    assert "num_pages" in decode[0]
    assert decode[1:] == (4 * 4 * world_size, 0)  # the last step found no free slot; all steps before it did


def test_one_process_of_transformers_is_what_we_compare_with() -> None:
    """The conversation in one process is one with a cache, not one that is computed anew."""
    model = build(NAME)
    cache = DynamicCache(config=model.config)
    first = first_turn(model, cache)
    assert cache.get_seq_length() == first[0].shape[1] - 1
