"""Prefix cache: finds the sequence of a cache that begins with the same tokens as a new one. Integers only.

The keys and values of a token depend on all tokens before it. So the index stores, for each sequence, one digest per
block of tokens, and each digest includes the digest of the block before. A sequence with a matching digest can be
forked, and the fork truncated to the common prefix. Digests are SHA-256, so collisions are not checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class PrefixMatch(NamedTuple):
    """A sequence, and the number of its first tokens that match the tokens looked up."""

    sequence: int
    num_tokens: int


class PrefixIndex:
    """The prefixes of the sequences of a cache.

    Args:
        block_size: tokens per digest; prefixes match in whole blocks.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._sequences: dict[bytes, dict[int, None]] = {}  # by digest, in order of insertion
        self._digests: dict[int, list[bytes]] = {}  # by sequence

    def insert(self, sequence: int, tokens: Sequence[int]) -> None:
        """Stores the tokens of a sequence, instead of the tokens stored for it before."""
        self.truncate(sequence, 0)
        self._digests[sequence] = list(self._hash_blocks(tokens))
        for digest in self._digests[sequence]:
            self._sequences.setdefault(digest, {})[sequence] = None

    def longest_match(self, tokens: Sequence[int]) -> PrefixMatch | None:
        """Returns the sequence with the longest common prefix, in whole blocks; of several, the one inserted first."""
        match = None
        for count, digest in enumerate(self._hash_blocks(tokens), start=1):
            sequences = self._sequences.get(digest)
            if not sequences:
                break
            match = PrefixMatch(next(iter(sequences)), count * self._block_size)
        return match

    def truncate(self, sequence: int, num_tokens: int) -> None:
        """Drops the tokens of a sequence from token `num_tokens` on; does nothing for a sequence that is not stored."""
        digests = self._digests.get(sequence, [])
        for digest in digests[num_tokens // self._block_size :]:
            sequences = self._sequences[digest]
            sequences.pop(sequence, None)
            if not sequences:
                del self._sequences[digest]
        del digests[num_tokens // self._block_size :]
        if not digests:
            self._digests.pop(sequence, None)

    def _hash_blocks(self, tokens: Sequence[int]) -> Iterable[bytes]:
        """Yields the digest of the tokens up to the end of each whole block."""
        array = np.asarray(tokens, dtype=np.int64)
        digest = b""
        for start in range(0, len(array) - self._block_size + 1, self._block_size):
            block = array[start : start + self._block_size].astype("<i8").tobytes()
            digest = hashlib.sha256(digest + block).digest()
            yield digest
