"""Batches of real text: the Python standard library's source, byte by byte, whole or as packed documents."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ringattn
from ringattn.attention.sharding import IGNORED_LABEL

VOCABULARY = 256  # bytes


@dataclass(frozen=True)
class Corpus:
    """Training data, equal on every rank.

    Args:
        context: tokens in a sequence.
        sequences: in a batch.
        steps: number of batches.
        window: how many tokens before itself a token sees; None is all.
        documents: mean length of the documents packed into each sequence; None is one document.
    """

    context: int
    sequences: int
    steps: int
    window: int | None = None
    documents: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.context * self.sequences

    def batches(self, device: torch.device) -> list[dict[str, Any]]:
        """Returns whole batches: input_ids, labels before the shift, position_ids, all (sequences, context); mask."""
        rows = text(self.tokens * self.steps).view(self.steps, self.sequences, self.context)
        generator = torch.Generator().manual_seed(0)
        found = []
        for tokens in rows:
            starts = [self._starts(generator) for _ in range(self.sequences)]
            labels, positions = tokens.clone(), torch.zeros_like(tokens)
            for row, of_row, first in zip(labels, positions, starts, strict=True):
                row[first] = IGNORED_LABEL  # nothing predicts a document's first token
                for start, stop in zip(first, [*first[1:], self.context], strict=True):
                    of_row[start:stop] = torch.arange(stop - start)
            batch = {"input_ids": tokens, "labels": labels, "position_ids": positions}
            found.append({**{name: x.to(device) for name, x in batch.items()}, "mask": self._mask(starts)})
        return found

    def dense_mask(self, positions: Tensor) -> Tensor | None:
        """Returns the mask, (B, S, S) bool, from each token's position in its document; None is causal."""
        if self.window is None and self.documents is None:
            return None
        document = (positions == 0).cumsum(1)
        row = torch.arange(positions.shape[1], device=positions.device)
        distance = row[:, None] - row[None]
        window = self.context if self.window is None else self.window
        return (document[:, :, None] == document[:, None]) & (distance >= 0) & (distance <= window)

    def _starts(self, generator: torch.Generator) -> list[int]:
        """Returns where the documents of a sequence start."""
        if self.documents is None:
            return [0]
        ends = torch.randint(1, 2 * self.documents, (self.context,), generator=generator).cumsum(0)
        return [0, *ends[ends < self.context].tolist()]

    def _mask(self, starts: list[list[int]]) -> ringattn.Mask | list[ringattn.Mask]:
        causal = ringattn.causal() if self.window is None else ringattn.sliding_window(self.window, right=0)
        if self.documents is None:
            return causal
        return [ringattn.documents([*first, self.context]) & causal for first in starts]


def text(num_bytes: int) -> Tensor:
    """Returns the first bytes of the standard library's source, (num_bytes,) int64, equal on every rank."""
    data = b""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        data += path.read_bytes()
        if len(data) >= num_bytes:
            return torch.frombuffer(bytearray(data[:num_bytes]), dtype=torch.uint8).long()
    raise SystemExit(
        f"the standard library has {len(data):,} bytes of source; --steps x --sequences x --context is {num_bytes:,}"
    )
