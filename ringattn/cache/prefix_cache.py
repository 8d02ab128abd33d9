"""Prefixes: which sequence of a cache begins with the same tokens as a new one. Integers only.

The keys and values of a token depend on all tokens before it. So a sequence is known by the digests of its tokens up
to every multiple of a block, each digest taking in the one before. Whoever finds its own there can fork that
sequence and truncate the fork. Digests are SHA-256: a hit is a hit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class PrefixMatch(NamedTuple):
    """A sequence of the cache, and how many tokens it shares with the one looked for."""

    sequence: int
    num_tokens: int


class PrefixIndex:
    """The beginnings of sequences.

    Args:
        block: tokens between two digests.
    """

    def __init__(self, block: int) -> None:
        self._block = block
        self._holders: dict[bytes, dict[int, None]] = {}
        self._known: dict[int, list[bytes]] = {}

    def record(self, sequence: int, tokens: Sequence[int]) -> None:
        """Takes down what a sequence begins with."""
        self.keep(sequence, 0)
        self._known[sequence] = list(self._digests(tokens))
        for digest in self._known[sequence]:
            self._holders.setdefault(digest, {})[sequence] = None

    def longest(self, tokens: Sequence[int]) -> PrefixMatch | None:
        """Returns the sequence with the longest beginning in common, in whole blocks; the first recorded of several."""
        found = None
        for count, digest in enumerate(self._digests(tokens), start=1):
            holders = self._holders.get(digest)
            if not holders:
                break
            found = PrefixMatch(next(iter(holders)), count * self._block)
        return found

    def keep(self, sequence: int, num_tokens: int) -> None:
        """Forgets what a sequence holds from token `num_tokens` on."""
        known = self._known.get(sequence, [])
        for digest in known[num_tokens // self._block :]:
            holders = self._holders[digest]
            holders.pop(sequence, None)
            if not holders:
                del self._holders[digest]
        del known[num_tokens // self._block :]
        if not known:
            self._known.pop(sequence, None)

    def _digests(self, tokens: Sequence[int]) -> Iterable[bytes]:
        whole = np.asarray(tokens, dtype=np.int64)
        digest = b""
        for start in range(0, len(whole) - self._block + 1, self._block):
            digest = hashlib.sha256(digest + whole[start : start + self._block].astype("<i8").tobytes()).digest()
            yield digest
