"""Batches of real text: the Python standard library's own source, byte by byte, in one piece or as packed documents."""

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
    """What is trained on, the same on every rank.

    Args:
        context: tokens in a sequence.
        sequences: in a batch.
        steps: how many batches there are.
        window: how many tokens before itself a token sees; None is all.
        documents: mean length of the documents packed into each sequence, of other lengths in each; None is one.
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
        """Returns whole batches: input_ids, labels yet to be shifted, position_ids, all (sequences, context); mask."""
        rows = text(self.tokens * self.steps).view(self.steps, self.sequences, self.context)
        generator = torch.Generator().manual_seed(0)
        found = []
        for tokens in rows:
            starts = [self._starts(generator) for _ in range(self.sequences)]
            labels = tokens.clone()
            for row, begins in zip(labels, starts, strict=True):
                row[begins] = IGNORED_LABEL  # a document's first token is predicted by none
            positions = torch.stack([_within(begins, self.context) for begins in starts])
            batch = {"input_ids": tokens, "labels": labels, "position_ids": positions}
            found.append({**{name: x.to(device) for name, x in batch.items()}, "mask": self._mask(starts)})
        return found

    def allowed(self, positions: Tensor) -> Tensor | None:
        """Returns the definition of the mask, (B, S, S), from each token's position in its document; None is causal."""
        if self.window is None and self.documents is None:
            return None
        document = (positions == 0).cumsum(1)
        at = torch.arange(positions.shape[1], device=positions.device)
        back = at[:, None] - at[None]
        within = self.context if self.window is None else self.window
        return (document[:, :, None] == document[:, None]) & (back >= 0) & (back <= within)

    def _starts(self, generator: torch.Generator) -> list[int]:
        """Where the documents of a sequence begin."""
        if self.documents is None:
            return [0]
        lengths = torch.randint(1, 2 * self.documents, (self.context,), generator=generator).cumsum(0)
        return [0, *lengths[lengths < self.context].tolist()]

    def _mask(self, starts: list[list[int]]) -> ringattn.Mask | list[ringattn.Mask]:
        seen = ringattn.causal() if self.window is None else ringattn.sliding_window(self.window, right=0)
        if self.documents is None:
            return seen
        return [ringattn.documents([*begins, self.context]) & seen for begins in starts]


def text(num_bytes: int) -> Tensor:
    """Returns the first bytes of the standard library's source, (num_bytes,) int64, the same on every rank."""
    parts: list[bytes] = []
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        parts.append(path.read_bytes())
        size += len(parts[-1])
        if size >= num_bytes:
            break
    if size < num_bytes:
        raise SystemExit(
            f"the standard library holds {size:,} bytes of source; --steps x --sequences x --context wants "
            f"{num_bytes:,}"
        )
    return torch.frombuffer(bytearray(b"".join(parts)[:num_bytes]), dtype=torch.uint8).long()


def _within(starts: list[int], length: int) -> Tensor:
    """The position of each token in its document."""
    first = torch.tensor(starts)
    at = torch.arange(length)
    return at - first[torch.searchsorted(first, at, right=True) - 1]
