"""Saves a cache to files, and loads it on any number of ranks.

A folder holds `index.safetensors` with the page tables, and one file per rank and layer with the pages in use there.
Each page has a checksum, and each file the name of its snapshot. The index is written last: a folder without it holds
no snapshot.
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
from ringattn.cache.page_tables import PageTable
from ringattn.cache.pages import PageMove, PagePools
from ringattn.cache.tensor_files import read_tensors, write_tensors
from ringattn.comm.agreement import agree
from ringattn.comm.topology import RankMesh, rank_mesh, resolve_group
from ringattn.errors import RingAttnError, SnapshotError
from ringattn.types import Group

Result = TypeVar("Result")

_FORMAT = "ringattn cache 1"  # its keys "form" and "slots" are the spec and the positions
_INDEX = "index.safetensors"


def save_cache(cache: DistributedKVCache, folder: str | Path) -> None:
    """Writes a cache to a folder that all ranks share.

    Returns when the files of all ranks are complete. All ranks of the cache call this together. Sequences keep their
    numbers, and the pages that they share. Cached prefixes are not saved.

    Args:
        cache: it does not change.
        folder: created if it does not exist. A snapshot in it is replaced.
    Raises:
        SnapshotError: if files cannot be written; on every rank. An earlier snapshot in the folder may be lost.
        DisagreementError: on CUDA, if an earlier decoding call has found a difference; nothing is written then.
    Communication: a broadcast of a name, and two all-gathers of a few hundred bytes.
    """
    cache.mark_check.raise_pending()
    folder, mesh = Path(folder), cache.mesh
    name = _unique_name(mesh)

    def write(fingerprint: Mapping[str, str], function: Callable[[], None]) -> None:
        agree(mesh, None, lambda: (fingerprint, _as_snapshot_error(function)))

    write({"the folder": folder.name}, lambda: _save_rank(cache, folder, name))
    write({}, lambda: _save_index(cache, folder, name) if mesh.rank == 0 else None)


def load_cache(
    folder: str | Path, *, num_pages: int, device: torch.device | str = "cpu", group: Group = None
) -> DistributedKVCache:
    """Returns a saved cache over the ranks of a group, which may be another number of ranks than saved it.

    All ranks of the group call this together.

    Args:
        folder: the folder of `save_cache`.
        num_pages: pages per rank.
        device: of the keys and values.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the default group.
    Raises:
        SnapshotError: if the snapshot does not exist, is incomplete, or is corrupt; on every rank.
        OutOfPagesError: if the cache does not fit; on every rank.
    Communication: one all-gather of a few hundred bytes.
    """
    folder, mesh = Path(folder), rank_mesh(resolve_group(group))

    def prepare() -> tuple[Mapping[str, str], DistributedKVCache]:
        return _as_snapshot_error(lambda: _load(folder, num_pages, torch.device(device), mesh))

    return agree(mesh, None, prepare)


def _as_snapshot_error(function: Callable[[], Result]) -> Result:
    """Calls a function; raises the errors of files and libraries as SnapshotError."""
    try:
        return function()
    except RingAttnError:
        raise
    except ImportError as error:
        raise SnapshotError('saving needs safetensors: pip install "ringattn[cache]"') from error
    except Exception as error:  # safetensors, json and the file system have errors of their own
        raise SnapshotError(f"{type(error).__name__}: {error}") from error


def _unique_name(mesh: RankMesh) -> str:
    """Returns a name that no other snapshot has, the same on all ranks."""
    name = [uuid.uuid4().hex]
    if mesh.size > 1:
        dist.broadcast_object_list(name, group=mesh.axes[0].group, group_src=0)
    return name[0]


def _used_pages(pages: PagePools, rank: int) -> list[int]:
    return sorted({page for sequence in pages.sequences for page in pages.table(sequence, rank).pages})


def _layer_file(folder: Path, rank: int, layer: int) -> Path:
    return folder / f"rank-{rank:05d}-layer-{layer:05d}.safetensors"


def _save_rank(cache: DistributedKVCache, folder: Path, name: str) -> None:
    """Writes this rank's files, one per layer."""
    rank = cache.mesh.rank
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        (folder / _INDEX).unlink(missing_ok=True)
    used = torch.tensor(_used_pages(cache.pages, rank), dtype=torch.int64, device=cache.device)
    for layer in range(cache.spec.num_layers):
        tensors = {}
        for key, pool in zip("kv", cache.storage(layer), strict=True):
            tensors[key] = pool[used].cpu()
            tensors[f"{key}_checksums"] = torch.tensor([_checksum(page) for page in tensors[key]], dtype=torch.int64)
        write_tensors(_layer_file(folder, rank, layer), tensors, {"format": _FORMAT, "snapshot": name})


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
            tensors[f"{sequence}.{rank}.slots"] = torch.from_numpy(table.positions)
    index = {
        "form": {**asdict(cache.spec), "dtype": str(cache.spec.dtype).removeprefix("torch.")},
        "world_size": pages.world_size,
        "num_pages": pages.num_pages,
        "next_sequence": pages.next_sequence,
        "lengths": lengths,
        "tables": _tables_digest(tensors),
    }
    write_tensors(folder / _INDEX, tensors, {"format": _FORMAT, "snapshot": name, "cache": json.dumps(index)})


def _tables_digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load(
    folder: Path, num_pages: int, device: torch.device, mesh: RankMesh
) -> tuple[Mapping[str, str], DistributedKVCache]:
    """Returns (fingerprint, cache): distributes the saved pages over the mesh and reads this rank's pages."""
    if not (folder / _INDEX).is_file():
        raise SnapshotError(f"folder={str(folder)!r}: there is no {_INDEX} in it, so there is no snapshot")
    metadata, tensors = read_tensors(folder / _INDEX)
    if metadata.get("format") != _FORMAT:
        raise SnapshotError(f"{_INDEX} has format {metadata.get('format')!r}, not {_FORMAT!r}")
    index = json.loads(metadata["cache"])
    if index["tables"] != _tables_digest(tensors):
        raise SnapshotError(f"{_INDEX} is corrupt: its page tables do not match their checksum")
    spec = CacheSpec(**{**index["form"], "dtype": getattr(torch, index["form"]["dtype"])})
    saved = _saved_pages(index, tensors, spec.page_size)
    pages, moves = saved.resharded(mesh.size, num_pages)
    cache = DistributedKVCache.from_pages(spec, pages, mesh, device)
    for rank in range(saved.world_size):
        own = [move for move in moves if move.to_rank == mesh.rank and move.from_rank == rank]
        for layer in range(spec.num_layers) if own else ():
            path = _layer_file(folder, rank, layer)
            _load_pages(cache, layer, path, metadata["snapshot"], _used_pages(saved, rank), own)
    return {"the snapshot": metadata["snapshot"], "num_pages": str(num_pages)}, cache


def _saved_pages(index: Mapping[str, Any], tensors: Mapping[str, Tensor], page_size: int) -> PagePools:
    """Returns the page tables as they were saved."""
    world_size = index["world_size"]
    sequences = {}
    for sequence, length in index["lengths"].items():
        tables = []
        for rank in range(world_size):
            pages, positions = (tensors[f"{sequence}.{rank}.{key}"] for key in ("pages", "slots"))
            tables.append(PageTable(page_size, pages.tolist(), positions.reshape(-1).numpy()))
        sequences[int(sequence)] = (length, tables)
    saved = PagePools(world_size, index["num_pages"], page_size)
    saved.restore(index["next_sequence"], sequences)
    return saved


def _load_pages(
    cache: DistributedKVCache, layer: int, path: Path, name: str, saved: list[int], moves: list[PageMove]
) -> None:
    """Reads pages of one layer from the file of one saved rank, which holds the pages `saved` in this order."""
    if not path.is_file():
        raise SnapshotError(f"{path.name} is missing from the snapshot")
    row_of = {page: row for row, page in enumerate(saved)}
    metadata, tensors = read_tensors(path)
    if metadata.get("snapshot") != name:
        raise SnapshotError(f"{path.name} belongs to another snapshot")
    for key, pool in zip("kv", cache.storage(layer), strict=True):
        pages, checksums = tensors[key], tensors[f"{key}_checksums"].tolist()
        if pages.shape != (len(saved), *pool.shape[1:]) or pages.dtype != pool.dtype:
            raise SnapshotError(f"{path.name} holds {tuple(pages.shape)} {pages.dtype}: the index says otherwise")
        for move in moves:
            row = row_of[move.from_page]
            if _checksum(pages[row]) != checksums[row]:
                raise SnapshotError(f"{path.name} is corrupt: page {row} of {key} does not match its checksum")
            pool[move.to_page] = pages[row].to(pool.device)
