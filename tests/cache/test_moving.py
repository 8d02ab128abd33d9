"""Caches that are saved, loaded on another number of ranks, and moved to another group."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ringattn
from ringattn import DistributedKVCache, zigzag
from tests.cache.model import check_invariants
from tests.harness.cases import tensors
from tests.harness.compare import assert_close
from tests.harness.ranks import RankPool

LENGTH = 29


def made(group: dist.ProcessGroup) -> DistributedKVCache:
    """A sequence, an evicted fork of it, and a longer fork."""
    t = tensors(2, 1, 1, LENGTH + 2, 4, 2, 4, 6, torch.float64)
    cache = DistributedKVCache(
        num_layers=2, num_kv_heads=2, head_dim=4, v_head_dim=6, num_pages=30, page_size=3, dtype=torch.float64,
        group=group,
    )  # fmt: skip
    sequence = cache.new()
    layout = zigzag(LENGTH, group.size())
    mine = layout.positions(group.rank())
    extension = cache.extend([sequence], layout)
    for layer in range(2):
        cache.write(layer, extension, t.k[:, mine] + layer, t.v[:, mine] + layer)
    cache.evict(cache.fork(sequence), sinks=2, window=5)
    longer = cache.fork(sequence)
    extension = cache.extend([longer], 2)
    for layer in range(2):
        cache.write(layer, extension, t.k[:, LENGTH:] + layer, t.v[:, LENGTH:] + layer)
    return cache


def answers(cache: DistributedKVCache) -> list[Tensor]:
    """The attention of one more token to each sequence, for the same token in every cache."""
    check_invariants(cache.pages)
    t = tensors(3, 1, 1, 1, 4, 2, 4, 6, torch.float64)
    found = []
    for sequence in cache.sequences:
        extension = cache.extend([sequence], 1)
        found += [ringattn.decode_attention(*t[:3], cache, layer, extension) for layer in range(2)]
    return found


def save(group: dist.ProcessGroup, folder: str) -> list[Tensor]:
    cache = made(group)
    ringattn.save_cache(cache, folder)
    return answers(cache)


def load(group: dist.ProcessGroup, folder: str, num_pages: int = 40) -> list[Tensor]:
    return answers(ringattn.load_cache(folder, num_pages=num_pages, group=group))


@pytest.mark.parametrize("saving", [1, 3])
@pytest.mark.parametrize("loading", [1, 2, 4])
def test_a_snapshot_goes_to_any_number_of_ranks(pool: RankPool, tmp_path: Path, saving: int, loading: int) -> None:
    expected = pool.run(save, saving, str(tmp_path))[0]
    assert len(expected) == 6
    for found in pool.run(load, loading, str(tmp_path)):
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, atol=1e-12, name="answer")


def load_often(group: dist.ProcessGroup, folder: str, times: int) -> float:
    """The number of Python objects that each load leaks."""
    counts = []
    for _ in range(times):
        ringattn.load_cache(folder, num_pages=40, group=group)
        gc.collect()
        counts.append(sys.getallocatedblocks())
    return (counts[-1] - counts[times // 2]) / (times - 1 - times // 2)


def test_loading_leaks_nothing(pool: RankPool, tmp_path: Path) -> None:
    # safetensors' own way of reading leaves two integers for each tensor: here 2 x 14 a load.
    pool.run(save, 1, str(tmp_path))
    assert pool.run(load_often, 1, str(tmp_path), 21)[0] < 10


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


BREAKS: dict[str, Any] = {
    "no index": (lambda d: (d / "index.safetensors").unlink(), "there is no index.safetensors in it"),
    "a file is missing": (lambda d: next(d.glob("rank-00001-*")).unlink(), "is missing from the snapshot"),
    "a file is cut short": (lambda d: cut(d / "rank-00000-layer-00001.safetensors"), ""),
    "the index is cut short": (lambda d: cut(d / "index.safetensors"), ""),
    "a bit of the index flipped": (lambda d: flip(d / "index.safetensors", -5), "page tables do not match"),
    "a bit of a page flipped": (lambda d: flip(d / "rank-00001-layer-00000.safetensors", -99), "is corrupt"),
    "a file of another layer": (
        lambda d: (d / "rank-00000-layer-00000.safetensors").write_bytes(b"garbage"), "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_snapshot_is_refused_on_every_rank(pool: RankPool, tmp_path: Path, name: str) -> None:
    pool.run(save, 2, str(tmp_path))
    breaking, message = BREAKS[name]
    breaking(tmp_path)
    for error in pool.expect_error(load, 3, str(tmp_path)):
        assert error.type_name == "SnapshotError"
        assert message in error.message


def test_files_of_another_snapshot_and_too_few_pages_are_refused(pool: RankPool, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    pool.run(save, 2, str(one))
    pool.run(save, 2, str(two))
    for error in pool.expect_error(load, 2, str(one), 5):
        assert error.type_name == "OutOfPagesError"
    name = "rank-00001-layer-00000.safetensors"
    (one / name).write_bytes((two / name).read_bytes())
    for error in pool.expect_error(load, 2, str(one)):
        assert "belongs to another snapshot" in error.message


def fail_to_save(group: dist.ProcessGroup, file: str) -> None:
    cache = made(group)
    try:
        ringattn.save_cache(cache, file)
    finally:
        assert len(answers(cache)) == 6


def test_a_folder_that_cannot_be_written_is_an_error_and_nothing_is_lost(pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for error in pool.expect_error(fail_to_save, 2, str(tmp_path / "file")):
        assert error.type_name == "SnapshotError"


def move(group: dist.ProcessGroup, ranks_of: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    """From the first group of ranks to the next, and so on; every group answers, and each keeps what it had."""
    groups = [dist.new_group(list(ranks)) for ranks in ranks_of]
    cache = made(groups[0]) if group.rank() in ranks_of[0] else None
    found: list[Tensor] = []
    for following in groups[1:]:
        moved = ringattn.reshard(cache, num_pages=60, group=following, over=group)
        if cache is not None:
            found = answers(cache)
        cache = moved
    found = found if cache is None else answers(cache)
    for each in groups:
        if each != dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(each)
    return found


def test_a_cache_moves_between_groups(pool: RankPool, tmp_path: Path) -> None:
    expected = pool.run(save, 2, str(tmp_path))[0]
    (last,) = {len(f) for f in pool.run(move, 4, ((0, 1), (1, 2, 3), (0, 1, 2, 3)))}
    assert last == 6
    for found in pool.run(move, 4, ((0, 1), (1, 2, 3), (0, 1, 2, 3))):
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, atol=1e-12, name="answer")


def reshard_wrongly(group: dist.ProcessGroup, wrong: str) -> None:
    cache = made(group)
    free = cache.num_free_pages
    try:
        if wrong == "no room":
            ringattn.reshard(cache, num_pages=3, group=group, over=group)
        elif wrong == "half of it":
            ringattn.reshard(cache if group.rank() else None, num_pages=60, group=group, over=group)
    finally:
        assert cache.num_free_pages == free


@pytest.mark.parametrize(("wrong", "kind"), [("no room", "OutOfPagesError"), ("half of it", "ArgumentError")])
def test_what_cannot_be_moved_stays(pool: RankPool, wrong: str, kind: str) -> None:
    for error in pool.expect_error(reshard_wrongly, 2, wrong):
        assert error.type_name == kind
