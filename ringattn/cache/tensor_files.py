"""Files of named tensors in the safetensors format: written atomically, read as memory maps.

Reading a tensor with safetensors 0.8.0 leaks two integers, which adds up in a server that loads snapshots for weeks. So
safetensors only checks a file, and this module maps its bytes.
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
    """Writes a file; if that fails, a file at this path stays as it is.

    Args:
        path: of the file.
        tensors: by name; on the CPU, contiguous.
        metadata: texts, stored in the header.
    """
    from safetensors.torch import save_file

    part = path.with_suffix(".part")
    save_file(dict(tensors), part, metadata=dict(metadata))
    os.replace(part, path)


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Returns the metadata and the tensors of a file.

    The tensors are memory maps: the system loads the parts that are read. Writing to a tensor does not change the file.

    Raises:
        SafetensorError: if the file is incomplete or has another format.
        KeyError: if a tensor has a dtype that caches do not have.
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
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        tensors[name] = data[start:stop].view(_DTYPES[entry["dtype"]]).view(entry["shape"])
    return metadata, tensors
