"""A batch's rows to files and back: the snapshot of their store, and beside it which sequence each row is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ringattn.cache.kv_cache import DistributedKVCache
from ringattn.cache.snapshot import load_cache, save_cache
from ringattn.comm.agreement import agree
from ringattn.comm.topology import rank_mesh
from ringattn.errors import SnapshotError

_ROWS = "rows.json"


class LoadedRows(NamedTuple):
    """A store, the sequence of each row, and how many columns of padding each begins with."""

    store: DistributedKVCache
    rows: tuple[int, ...]
    pads: tuple[int, ...]


def save_rows(store: DistributedKVCache, rows: tuple[int, ...], pads: tuple[int, ...], folder: str | Path) -> None:
    """Writes a store and what belongs to a batch; all ranks call it together.

    Raises:
        SnapshotError: when files cannot be written; on every rank.
    """
    folder = Path(folder)
    told = {"rows": rows, "pads": pads, "lengths": [store.length(row) for row in rows]}

    def write(content: str | None) -> tuple[Mapping[str, str], None]:
        if store.mesh.rank == 0:
            try:
                (folder / _ROWS).unlink(missing_ok=True)
                if content is not None:
                    part = folder / f"{_ROWS}.part"
                    part.write_text(content, encoding="utf-8")
                    os.replace(part, folder / _ROWS)
            except OSError as error:
                raise SnapshotError(f"{type(error).__name__}: {error}") from error
        return {}, None

    agree(store.mesh, None, lambda: write(None))  # those of an earlier snapshot would fit no more
    save_cache(store, folder)
    agree(store.mesh, None, lambda: write(json.dumps(told)))


def load_rows(
    folder: str | Path, *, num_layers: int, num_pages: int, device: torch.device, group: dist.ProcessGroup
) -> LoadedRows:
    """Returns what `save_rows` wrote, over the ranks of this group; all of them call it together.

    Raises:
        SnapshotError: when it is not there, not whole, or of another number of layers; OutOfPagesError when it does not
            fit. On every rank.
    """
    told = agree(rank_mesh(group), None, lambda: _read(Path(folder)))
    store = load_cache(folder, num_pages=num_pages, device=device, group=group)
    rows, pads, lengths = (tuple(map(int, told[name])) for name in ("rows", "pads", "lengths"))
    found = {sequence: store.length(sequence) for sequence in store.sequences}
    if not len(rows) == len(pads) == len(lengths) or any(
        found.get(row) != length for row, length in zip(rows, lengths, strict=True)
    ):
        raise SnapshotError(f"{_ROWS} tells of rows {rows} with {lengths} tokens: not those that the snapshot holds")
    if store.spec.num_layers != num_layers:
        raise SnapshotError(f"the snapshot has {store.spec.num_layers} layers: the model has {num_layers}")
    for sequence in set(found) - set(rows):
        store.free(sequence)  # a fork's, which was saved along
    return LoadedRows(store, rows, pads)


def _read(folder: Path) -> tuple[Mapping[str, str], dict[str, Any]]:
    try:
        content = (folder / _ROWS).read_text(encoding="utf-8")
        told: dict[str, Any] = json.loads(content)
    except (OSError, ValueError) as error:
        raise SnapshotError(f"folder={str(folder)!r}: {type(error).__name__}: {error}") from error
    return {"the rows": content}, told
