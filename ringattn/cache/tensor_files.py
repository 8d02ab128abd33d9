"""Files of named tensors, as safetensors writes them: written at once, read as they lie in the file.

A tensor that safetensors itself returns costs two integers that are never freed (0.8.0), and a server which loads
snapshots for weeks would grow by them. So safetensors checks a file, and its bytes are mapped here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file, or leaves the one that is there as it is.

    Args:
        path: of the file.
        tensors: on the CPU, contiguous.
        metadata: texts that go with them.
    """
    from safetensors.torch import save_file

    part = path.with_suffix(".part")
    save_file(dict(tensors), part, metadata=dict(metadata))
    os.replace(part, path)


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Returns the metadata and the tensors of a file.

    The tensors are mapped: memory holds only what of them is looked at, for as long as the system has room. Writing to
    them does not change the file.

    Raises:
        SafetensorError: when the file is not whole, or not such a file.
        KeyError: when a tensor has a dtype that caches do not have.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as checked:
        metadata: dict[str, str] = checked.metadata() or {}
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(num_bytes))
    header.pop("__metadata__", None)
    mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    data = mapped[8 + num_bytes :]
    tensors = {}
    for name, told in header.items():
        start, stop = told["data_offsets"]
        tensors[name] = data[start:stop].view(_DTYPES[told["dtype"]]).view(told["shape"])
    return metadata, tensors
