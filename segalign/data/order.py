"""The sequence of samples: an endless chain of epoch permutations, computed and never stored.

Position p of the sequence belongs to epoch p // N. In each epoch the shards are permuted, cut
into windows of a few shards, and the samples of a window are permuted among themselves: reads stay
nearly sequential, and a position costs the same to find at the start and after a billion samples.
"""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from segalign.errors import ConfigError

_CACHED_WINDOWS = 8


class EpochOrder:
    """Order of the samples as a pure function of (seed, epoch, position).

    Args:
        shard_sizes: Number of samples of each shard, in manifest order.
        seed: Seed of all permutations.
        shuffle_window: Shards whose samples are mixed with each other, >= 1.
        shuffle: False walks every epoch in manifest order.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        seed: int = 0,
        shuffle_window: int = 8,
        shuffle: bool = True,
    ) -> None:
        if shuffle_window < 1:
            raise ConfigError(
                f"`shuffle_window` must be at least 1 shard; got {shuffle_window}; raise it"
            )
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._first_ids = np.concatenate([[0], np.cumsum(self._sizes)[:-1]]).astype(np.int64)
        self.num_samples = int(self._sizes.sum())
        self.seed = seed
        self.shuffle = shuffle
        self._window = shuffle_window
        # Bound to the instance, so that the cache is freed with it.
        self._shard_order = lru_cache(maxsize=2)(self._compute_shard_order)
        self._window_ids = lru_cache(maxsize=_CACHED_WINDOWS)(self._compute_window_ids)

    def __reduce__(self) -> tuple[object, ...]:
        return (_restore_order, (self._sizes, self.seed, self._window, self.shuffle))

    def locate(self, position: int) -> tuple[int, int]:
        """Return (epoch, sample id) at a position >= 0 of the endless sequence.

        The sample id is the sample's place in the manifest, in [0, num_samples).
        """
        epoch, place = divmod(position, self.num_samples)
        if not self.shuffle:
            return epoch, place
        _, starts = self._shard_order(epoch)
        window = int(np.searchsorted(starts, place, side="right")) - 1
        return epoch, int(self._window_ids(epoch, window)[place - starts[window]])

    def _compute_shard_order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the shards of an epoch in order and the first place of each window."""
        order = _permutation(len(self._sizes), "shards", self.seed, epoch)
        ends = np.cumsum(self._sizes[order])
        starts = np.concatenate([[0], ends])[:-1][:: self._window]
        return order, starts.astype(np.int64)

    def _compute_window_ids(self, epoch: int, window: int) -> NDArray[np.int64]:
        order, _ = self._shard_order(epoch)
        shards = order[window * self._window : (window + 1) * self._window]
        ids = np.concatenate(
            [
                np.arange(self._sizes[shard], dtype=np.int64) + self._first_ids[shard]
                for shard in shards
            ]
        )
        return ids[_permutation(len(ids), "samples", self.seed, epoch, window)]


def _restore_order(
    sizes: NDArray[np.int64], seed: int, shuffle_window: int, shuffle: bool
) -> EpochOrder:
    return EpochOrder(sizes.tolist(), seed=seed, shuffle_window=shuffle_window, shuffle=shuffle)


def _permutation(length: int, purpose: str, *counters: int) -> NDArray[np.int64]:
    """Permute range(length) by sorting raw Philox words, whose stream NumPy keeps for ever."""
    packed = purpose.encode() + b"\0" + struct.pack(f"<{len(counters)}q", *counters)
    key = int.from_bytes(hashlib.blake2b(packed, digest_size=16).digest(), "little")
    words = np.random.Philox(key=key).random_raw(length)
    return np.argsort(words, kind="stable")


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Which positions of the sequence one rank reads for each of its micro-batches.

    Global step s covers positions [s G, (s + 1) G); micro-batch a of rank r covers the b
    positions from s G + a W b + r b on, with b = G / (W A). So the sequence of global batches is
    the same for every number of ranks W and every accumulation A.

    Attributes:
        global_batch_size: G, samples of one optimizer step over all ranks.
        world_size: W, number of ranks.
        global_rank: r, in [0, W).
        accumulate: A, micro-batches of one optimizer step.
    """

    global_batch_size: int
    world_size: int = 1
    global_rank: int = 0
    accumulate: int = 1

    def __post_init__(self) -> None:
        parts = self.world_size * self.accumulate
        if self.global_batch_size < 1 or self.global_batch_size % parts:
            raise ConfigError(
                f"`global_batch_size` must be a multiple of ranks x accumulation "
                f"({self.world_size} x {self.accumulate}); got {self.global_batch_size}; "
                f"change one of the three"
            )

    @property
    def batch_size(self) -> int:
        """Samples of one micro-batch on one rank."""
        return self.global_batch_size // (self.world_size * self.accumulate)

    def positions(self, micro_batch: int) -> range:
        """Return the positions of this rank's micro-batch, counted from the first step on."""
        step, slot = divmod(micro_batch, self.accumulate)
        size = self.batch_size
        start = (
            step * self.global_batch_size + slot * self.world_size * size + self.global_rank * size
        )
        return range(start, start + size)

    def micro_batches(
        self, *, start: int, stop: int | None, worker: int = 0, num_workers: int = 1
    ) -> Iterator[int]:
        """Yield the numbers of the micro-batches that one worker reads.

        A DataLoader asks its workers in turn, so worker w takes every ``num_workers``-th.
        """
        micro_batch = start + worker
        while stop is None or micro_batch < stop:
            yield micro_batch
            micro_batch += num_workers
