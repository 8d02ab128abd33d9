"""Saving a cache to files, and loading it on any number of ranks.

A folder holds `index.safetensors`, the tables, and a file for each rank and layer: the pages in use there. Each page
has a checksum, and each file the name of its snapshot. The index is written last: without it there is no snapshot.
"""

from __future__ import annotations

import hashlib
import json
import uuid
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.cache.kv_cache import CacheSpec, DistributedKVCache
from ringattn.cache.page_tables import RankTable
from ringattn.cache.pages import PageMove, PagePools
from ringattn.cache.tensor_files import read_tensors, write_tensors
from ringattn.comm.agreement import agree
from ringattn.comm.topology import RankMesh, rank_mesh, resolve_group
from ringattn.errors import RingAttnError, SnapshotError
from ringattn.types import Group

Result = TypeVar("Result")

_FORMAT = "ringattn cache 1"
_INDEX = "index.safetensors"


def save_cache(cache: DistributedKVCache, folder: str | Path) -> None:
    """Writes a cache into a folder that all ranks reach. All of them call it together.

    Returns when every rank's files are there. Sequences keep their names, and what they share. What `remember` was told
    is not saved.

    Args:
        cache: what to save; it is not changed.
        folder: made if it is not there. One snapshot replaces another.
    Raises:
        SnapshotError: when files cannot be written; on every rank. An earlier snapshot in the folder may be lost.
        DisagreementError: on CUDA, when the ranks have disagreed in what was decoded last; nothing is written then.
    Communication: a name of 16 bytes, and two all-gathers of a few hundred bytes.
    """
    cache.agreement.settle()
    folder, team = Path(folder), cache.team
    name = _common_name(team)
    agree(team, None, lambda: ({"the folder": folder.name}, _guarded(lambda: _save_rank(cache, folder, name))))
    agree(team, None, lambda: ({}, _guarded(lambda: _save_index(cache, folder, name) if team.rank == 0 else None)))


def load_cache(
    folder: str | Path, *, num_pages: int, device: torch.device | str = "cpu", group: Group = None
) -> DistributedKVCache:
    """Returns a cache as it was saved, over the ranks of this group, however many they are.

    All of them call it together.

    Args:
        folder: where `save_cache` wrote it.
        num_pages: pages of each rank.
        device: where keys and values shall be.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the default group.
    Raises:
        SnapshotError: when it is not there, not whole, or not what was written; OutOfPagesError when it does not fit.
            On every rank.
    Communication: one all-gather of a few hundred bytes.
    """
    folder, team = Path(folder), rank_mesh(resolve_group(group))

    def prepare() -> tuple[Mapping[str, str], DistributedKVCache]:
        return _guarded(lambda: _load(folder, num_pages, torch.device(device), team))

    return agree(team, None, prepare)


def _guarded(work: Callable[[], Result]) -> Result:
    """Runs it; whatever files do wrong is a SnapshotError."""
    try:
        return work()
    except RingAttnError:
        raise
    except ImportError as error:
        raise SnapshotError('saving needs safetensors: pip install "ringattn[cache]"') from error
    except Exception as error:  # safetensors, json and the file system have errors of their own
        raise SnapshotError(f"{type(error).__name__}: {error}") from error


def _common_name(team: RankMesh) -> str:
    """A name that no other snapshot has: the first rank's."""
    name = [uuid.uuid4().hex]
    if team.size > 1:
        dist.broadcast_object_list(name, group=team.axes[0].group, group_src=0)
    return name[0]


def _used(pages: PagePools, rank: int) -> list[int]:
    return sorted({page for sequence in pages.sequences for page in pages.table(sequence, rank).pages})


def _file(folder: Path, rank: int, layer: int) -> Path:
    return folder / f"rank-{rank:05d}-layer-{layer:05d}.safetensors"


def _save_rank(cache: DistributedKVCache, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if cache.team.rank == 0:
        (folder / _INDEX).unlink(missing_ok=True)
    rank = cache.team.rank
    used = torch.tensor(_used(cache.pages, rank), dtype=torch.int64, device=cache.device)
    for layer in range(cache.form.num_layers):
        tensors = {}
        for what, pool in zip("kv", cache.storage(layer), strict=True):
            tensors[what] = pool[used].cpu()
            tensors[f"{what}_checksums"] = torch.tensor([_checksum(page) for page in tensors[what]], dtype=torch.int64)
        write_tensors(_file(folder, rank, layer), tensors, {"format": _FORMAT, "snapshot": name})


def _checksum(page: Tensor) -> int:
    return zlib.crc32(page.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _save_index(cache: DistributedKVCache, folder: Path, name: str) -> None:
    pages = cache.pages
    tensors, lengths = {}, {}
    for sequence in pages.sequences:
        lengths[sequence] = pages.length(sequence)
        for rank in range(pages.world_size):
            table = pages.table(sequence, rank)
            tensors[f"{sequence}.{rank}.pages"] = torch.tensor(table.pages, dtype=torch.int64)
            tensors[f"{sequence}.{rank}.slots"] = torch.from_numpy(table.slots)
    told = {
        "form": {**asdict(cache.form), "dtype": str(cache.form.dtype).removeprefix("torch.")},
        "world_size": pages.world_size,
        "num_pages": pages.num_pages,
        "next_sequence": pages.next_sequence,
        "lengths": lengths,
        "tables": _digest(tensors),
    }
    write_tensors(folder / _INDEX, tensors, {"format": _FORMAT, "snapshot": name, "cache": json.dumps(told)})


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load(
    folder: Path, num_pages: int, device: torch.device, team: RankMesh
) -> tuple[Mapping[str, str], DistributedKVCache]:
    if not (folder / _INDEX).is_file():
        raise SnapshotError(f"folder={str(folder)!r}: there is no {_INDEX} in it, so there is no snapshot")
    metadata, tensors = read_tensors(folder / _INDEX)
    if metadata.get("format") != _FORMAT:
        raise SnapshotError(f"{_INDEX} has format {metadata.get('format')!r}, not {_FORMAT!r}")
    told = json.loads(metadata["cache"])
    if told["tables"] != _digest(tensors):
        raise SnapshotError(f"{_INDEX} is corrupt: its tables are not those that were saved")
    form = CacheSpec(**{**told["form"], "dtype": getattr(torch, told["form"]["dtype"])})
    old = _tables(told, tensors, form.page_size)
    pages, moves = old.resharded(team.size, num_pages)
    cache = DistributedKVCache.of(form, pages, team, device)
    for rank in range(old.world_size):
        mine = [move for move in moves if move.to_rank == team.rank and move.from_rank == rank]
        for layer in range(form.num_layers) if mine else ():
            _load_pages(cache, layer, _file(folder, rank, layer), metadata["snapshot"], _used(old, rank), mine)
    return {"the snapshot": metadata["snapshot"], "num_pages": str(num_pages)}, cache


def _tables(told: Mapping[str, Any], tensors: Mapping[str, Tensor], page_size: int) -> PagePools:
    world = told["world_size"]
    found = {}
    for sequence, length in told["lengths"].items():
        tables = []
        for rank in range(world):
            listed, slots = (tensors[f"{sequence}.{rank}.{what}"] for what in ("pages", "slots"))
            tables.append(RankTable(page_size, listed.tolist(), slots.reshape(-1).numpy()))
        found[int(sequence)] = (length, tables)
    old = PagePools(world, told["num_pages"], page_size)
    old.adopt(told["next_sequence"], found)
    return old


def _load_pages(
    cache: DistributedKVCache, layer: int, path: Path, name: str, saved: list[int], moves: list[PageMove]
) -> None:
    if not path.is_file():
        raise SnapshotError(f"{path.name} is missing from the snapshot")
    row_of = {page: row for row, page in enumerate(saved)}
    metadata, tensors = read_tensors(path)
    if metadata.get("snapshot") != name:
        raise SnapshotError(f"{path.name} belongs to another snapshot")
    for what, pool in zip("kv", cache.storage(layer), strict=True):
        whole, checksums = tensors[what], tensors[f"{what}_checksums"].tolist()
        if whole.shape != (len(saved), *pool.shape[1:]) or whole.dtype != pool.dtype:
            raise SnapshotError(f"{path.name} holds {tuple(whole.shape)} {whole.dtype}: not what the index says")
        for move in moves:
            row = row_of[move.from_page]
            if _checksum(whole[row]) != checksums[row]:
                raise SnapshotError(f"{path.name} is corrupt: page {row} of {what} is not what was saved")
            pool[move.to_page] = whole[row].to(pool.device)
