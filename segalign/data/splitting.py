"""Split shards: a seeded choice of their samples, such as those that are kept for evaluation."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from segalign.data.faults import SampleFault
from segalign.data.manifest import Manifest
from segalign.data.order import BatchPlan, EpochOrder
from segalign.data.packing import PackReport, pack
from segalign.data.reader import IndexedShardReader
from segalign.data.sources import Members
from segalign.errors import ConfigError

Choice: TypeAlias = Literal["random", "first"]


class ShardSource:
    """Samples of other shards, copied byte for byte; a pack numbers their keys anew.

    Args:
        manifest: The shards.
        sample_ids: Which samples, by their place in the manifest, in the order of the new shards.
    """

    def __init__(self, manifest: Manifest, sample_ids: Sequence[int]) -> None:
        self._manifest = manifest
        self._ids = sample_ids
        order = EpochOrder(manifest.shard_sizes, shuffle=False)
        self._reader = IndexedShardReader(manifest, order, BatchPlan(global_batch_size=1))

    def __len__(self) -> int:
        return len(self._ids)

    def settings(self) -> dict[str, Any]:
        """See ``Source``."""
        chosen = hashlib.sha256(json.dumps(list(self._ids)).encode()).hexdigest()
        return {"kind": "shards", "content": self._manifest.digest, "sample_ids": chosen}

    def origin(self, index: int) -> str:
        """See ``Source``."""
        number, place = self._manifest.locate(self._ids[index])
        shard = self._manifest.shards[number].name
        return f"{shard}, key {self._manifest.samples(number)[place].key}"

    def members(self, index: int) -> Members:
        """See ``Source``; a member that is not as the manifest says makes the sample faulty."""
        raw = self._reader.read_sample(self._ids[index])
        fault = raw.get("__fault__")
        if isinstance(fault, SampleFault):
            raise fault
        return [(name, content) for name, content in raw.items() if not name.startswith("__")]


def choose_samples(manifest: Manifest, count: int, *, seed: int, choice: Choice) -> list[int]:
    """Choose samples of shards; a choice of fewer is part of a choice of more.

    Args:
        manifest: The shards.
        count: How many, in [1, number of samples).
        seed: Seed of a random choice, which depends on it and the samples' keys alone. Samples of
            equal keys, which different shards may have, are told apart by the shard's name.
        choice: ``random``, or the ``first`` in manifest order.

    Returns:
        Their places in the manifest, ascending.

    Raises:
        ConfigError: If there are not more samples than that.
    """
    if count >= manifest.num_samples:
        raise ConfigError(
            f"expected `--count` below the {manifest.num_samples} samples of `{manifest.folder}`; "
            f"got {count}; lower it"
        )
    if choice == "first":
        return list(range(count))
    draws = (_draw(seed, shard.name, sample.key) for shard, sample in manifest)
    order = sorted((draw, sample_id) for sample_id, draw in enumerate(draws))
    return sorted(sample_id for _, sample_id in order[:count])


def split_shards(
    manifest: Manifest,
    out: Path,
    *,
    count: int,
    seed: int = 0,
    choice: Choice = "random",
    rest: Path | None = None,
    samples_per_shard: int = 1000,
) -> list[PackReport]:
    """Copy chosen samples into shards of their own, and all others into further ones.

    Args:
        manifest: The shards to split.
        out: Folder for the chosen samples.
        count: See ``choose_samples``.
        seed: See ``choose_samples``.
        choice: See ``choose_samples``.
        rest: Folder for the others; None leaves them out.
        samples_per_shard: Samples of a new shard.

    Returns:
        The report of each pack.

    Raises:
        ConfigError: If there are too few samples.
        DataError: See ``pack``.
    """
    chosen = choose_samples(manifest, count, seed=seed, choice=choice)
    reports = [
        pack(ShardSource(manifest, chosen), out, samples_per_shard=samples_per_shard, title="split")
    ]
    if rest is not None:
        others = sorted(set(range(manifest.num_samples)) - set(chosen))
        source = ShardSource(manifest, others)
        reports.append(pack(source, rest, samples_per_shard=samples_per_shard, title="rest"))
    return reports


def _draw(seed: int, shard: str, key: str) -> tuple[bytes, bytes]:
    """Hash seed and key; the shard's name decides between equal keys."""
    packed = f"split\0{seed}\0{key}"
    return _hash(packed), _hash(f"{packed}\0{shard}")


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
