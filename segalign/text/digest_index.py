"""Digests of token sequences, and a sorted table of them."""

import hashlib
import struct
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from segalign.text.tokenizer import TokenIds

Digest: TypeAlias = tuple[int, int]


def digest_ids(sequence: TokenIds) -> Digest:
    """Hash token ids to 128 bits, as two int64."""
    packed = struct.pack(f"<{len(sequence)}i", *sequence)
    high, low = struct.unpack("<2q", hashlib.blake2b(packed, digest_size=16).digest())
    return high, low


class DigestIndex:
    """Find the place of a digest among many.

    Args:
        high: First halves, int64 ``(N,)``, increasing; may be mapped from a file.
        low: Second halves, int64 ``(N,)``.
    """

    def __init__(self, high: NDArray[np.int64], low: NDArray[np.int64]) -> None:
        self._high = high
        self._low = low

    def __len__(self) -> int:
        """Return N."""
        return len(self._high)

    def find(self, digest: Digest) -> int | None:
        """Return the place of a digest in [0, N), or None."""
        high, low = digest
        place = int(np.searchsorted(self._high, np.int64(high)))
        while place < len(self._high) and self._high[place] == high:
            if self._low[place] == low:
                return place
            place += 1
        return None


class DigestSet:
    """A growing set of digests, most of them in sorted arrays of 16 bytes each."""

    def __init__(self) -> None:
        self._sorted = np.empty((0, 2), dtype=np.int64)
        self._index = DigestIndex(*np.ascontiguousarray(self._sorted.T))
        self._recent: set[Digest] = set()

    def __contains__(self, digest: Digest) -> bool:
        """Tell whether a digest was added."""
        return digest in self._recent or self._index.find(digest) is not None

    def add(self, digest: Digest) -> None:
        """Add a digest."""
        self._recent.add(digest)
        if len(self._recent) > max(2**16, len(self._sorted) // 8):
            self.extend(np.array(list(self._recent), dtype=np.int64))
            self._recent.clear()

    def extend(self, digests: NDArray[np.int64]) -> None:
        """Add digests that are not in the set, int64 ``(N, 2)``."""
        merged = np.concatenate([self._sorted, digests])
        self._sorted = merged[np.lexsort((merged[:, 1], merged[:, 0]))]
        self._index = DigestIndex(*np.ascontiguousarray(self._sorted.T))
