"""Saves and loads the batch of a RingCache: the snapshot of its store, and rows.json with the sequence of each row."""

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

_ROWS_FILE = "rows.json"


class LoadedRows(NamedTuple):
    """A store, the sequence of each batch row, and the left padding of each row in columns."""

    store: DistributedKVCache
    sequences: tuple[int, ...]
    left_padding: tuple[int, ...]


def save_rows(
    store: DistributedKVCache, sequences: tuple[int, ...], left_padding: tuple[int, ...], folder: str | Path
) -> None:
    """Writes a store, and the sequence and left padding of each batch row; all ranks call it together.

    rows.json is removed first and written last, so that a folder with rows.json is complete.

    Raises:
        SnapshotError: when files cannot be written; on every rank.
    """
    folder = Path(folder)
    metadata = {"rows": sequences, "pads": left_padding, "lengths": [store.length(number) for number in sequences]}

    def write(content: str | None) -> tuple[Mapping[str, str], None]:
        if store.mesh.rank == 0:
            try:
                (folder / _ROWS_FILE).unlink(missing_ok=True)
                if content is not None:
                    partial_file = folder / f"{_ROWS_FILE}.part"
                    partial_file.write_text(content, encoding="utf-8")
                    os.replace(partial_file, folder / _ROWS_FILE)
            except OSError as error:
                raise SnapshotError(f"{type(error).__name__}: {error}") from error
        return {}, None

    agree(store.mesh, None, lambda: write(None))
    save_cache(store, folder)
    agree(store.mesh, None, lambda: write(json.dumps(metadata)))


def load_rows(
    folder: str | Path, *, num_layers: int, num_pages: int, device: torch.device, group: dist.ProcessGroup
) -> LoadedRows:
    """Returns what `save_rows` wrote, over the ranks of a group of any size; all of them call it together.

    Args:
        folder: where `save_rows` wrote.
        num_layers: layers of the model; must equal the snapshot's number.
        num_pages: pages of each rank.
        device: of the new store.
        group: its ranks.
    Raises:
        SnapshotError: when the folder is missing or incomplete, or has another number of layers; on every rank.
        OutOfPagesError: when the tokens do not fit into the pages; on every rank.
    """
    metadata = agree(rank_mesh(group), None, lambda: _read(Path(folder)))
    store = load_cache(folder, num_pages=num_pages, device=device, group=group)
    sequences, left_padding, lengths = (tuple(map(int, metadata[name])) for name in ("rows", "pads", "lengths"))
    stored = {sequence: store.length(sequence) for sequence in store.sequences}
    if not len(sequences) == len(left_padding) == len(lengths) or any(
        stored.get(sequence) != length for sequence, length in zip(sequences, lengths, strict=True)
    ):
        raise SnapshotError(
            f"folder={str(folder)!r}: {_ROWS_FILE} lists sequences {sequences} of {lengths} tokens, but the snapshot "
            "holds others; save the cache again"
        )
    if store.spec.num_layers != num_layers:
        raise SnapshotError(
            f"folder={str(folder)!r}: the snapshot has {store.spec.num_layers} layers, the model has {num_layers}; "
            "load it for the model that it was saved with"
        )
    for sequence in set(stored) - set(sequences):
        store.free(sequence)  # of a fork of the cache, which shared the store
    return LoadedRows(store, sequences, left_padding)


def _read(folder: Path) -> tuple[Mapping[str, str], dict[str, Any]]:
    """Returns the content of rows.json, as text for the agreement of all ranks, and parsed."""
    try:
        content = (folder / _ROWS_FILE).read_text(encoding="utf-8")
        metadata: dict[str, Any] = json.loads(content)
    except (OSError, ValueError) as error:
        raise SnapshotError(f"folder={str(folder)!r}: {type(error).__name__}: {error}") from error
    return {_ROWS_FILE: content}, metadata
