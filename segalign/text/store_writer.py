"""Make a feature store: every distinct token sequence of many captions is encoded once.

Finished files of features are kept when a run is killed; the next run goes on behind them and
makes the same files as one that was never killed. Memory holds one file of features, and 16 bytes
for each sequence; the index at the end takes some 50 bytes for each.

Dims: N sequences of a file, T their tokens, D text width, E width of pooled features.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save

from segalign.atomic import make_directory, recover_directory, write_bytes_atomic, write_text_atomic
from segalign.data.caption_stream import CaptionStream
from segalign.data.faults import SampleFault
from segalign.data.progress import show_progress
from segalign.errors import DataError
from segalign.text.caption_plan import LongSegments, plan_caption
from segalign.text.clip_tower import ClipTower
from segalign.text.digest_index import Digest, DigestSet, digest_ids
from segalign.text.feature_shard import FeatureShard
from segalign.text.feature_store import (
    INDEX_NAME,
    STORE_FORMAT,
    STORE_NAME,
    dtype_name,
    features_name,
    open_file,
    weights_digest,
)
from segalign.text.segmenter import Segmenter
from segalign.text.special_tokens import SpecialTokenPolicy
from segalign.text.tokenizer import TokenIds

StoreDtype = Literal["float32", "float16", "bfloat16"]
_DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_PLAN_NAME: Final = "plan.json"
_LOCK_NAME: Final = ".encode.lock"
_LOCK_SECONDS: Final = 10.0
_MAX_BATCH_CAPTIONS: Final = 64
_MAX_BATCH_CHARS: Final = 2**17


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """How captions are split, and how features are kept.

    Attributes:
        segmenter: Splitting strategy.
        segmenter_description: The same as JSON, for the record.
        long_segments: What becomes of a segment that does not fit the context.
        dtype: Number type of the stored features. ``float32`` gives back the very numbers;
            ``float16`` half the size, each number within 0.05 % (2**-11) of its value, or within
            3e-8 of it where it is small; ``bfloat16`` half the size, and the very numbers of a
            tower in bfloat16.
        max_shard_bytes: Size at which a file of features is closed.
    """

    segmenter: Segmenter
    segmenter_description: dict[str, Any]
    long_segments: LongSegments = "cut_further"
    dtype: StoreDtype = "float32"
    max_shard_bytes: int = 256 * 10**6


@dataclass
class StoreReport:
    """What a store holds.

    Attributes:
        num_samples: Samples of the shards.
        num_sequences: Distinct token sequences.
        num_tokens: Their tokens.
        num_shards: Files of features.
        num_bytes: Bytes of these files.
        set_aside: Number of samples without a usable caption, by reason.
    """

    num_samples: int = 0
    num_sequences: int = 0
    num_tokens: int = 0
    num_shards: int = 0
    num_bytes: int = 0
    set_aside: dict[str, int] = field(default_factory=dict)


def write_store(
    captions: CaptionStream, tower: ClipTower, folder: Path, settings: StoreSettings
) -> StoreReport:
    """Encode the segments of all captions, and the empty caption, into a feature store.

    Args:
        captions: The captions.
        tower: A frozen tower; it needs no cache.
        folder: Made if it is missing. It may hold an unfinished store of the same captions, tower
            and settings, which is then finished, or a finished one, which is kept.
        settings: See :class:`StoreSettings`.

    Raises:
        DataError: If the folder holds another store or is being written by another process, or
            features do not fit ``float16``.
        StorageError: If the folder cannot be written.
    """
    make_directory(folder)
    try:
        with FileLock(folder / _LOCK_NAME, timeout=_LOCK_SECONDS):
            return _StoreWriter(captions, tower, folder, settings).write()
    except Timeout as error:
        raise DataError(
            f"`{folder}` must be written by one process at a time; another is at work on it; "
            "wait for it or choose another folder"
        ) from error


class _StoreWriter:
    """One run over the captions."""

    def __init__(
        self, captions: CaptionStream, tower: ClipTower, folder: Path, settings: StoreSettings
    ) -> None:
        self.captions = captions
        self.tower = tower
        self.folder = folder
        self.settings = settings
        self.known = DigestSet()
        self.set_aside: Counter[str] = Counter()
        self.num_shards = 0
        self.next_sample = 0

    def write(self) -> StoreReport:
        plan = self._settle_plan()
        if (self.folder / STORE_NAME).exists():
            return StoreReport(**json.loads((self.folder / STORE_NAME).read_bytes())["report"])
        recover_directory(self.folder)
        self._resume()
        with show_progress("encoding", len(self.captions), done=self.next_sample) as advance:
            self._encode(advance)
        report = self._write_index()
        content = {**plan, "report": vars(report)}
        write_text_atomic(self.folder / STORE_NAME, json.dumps(content, indent=1) + "\n")
        return report

    def _settle_plan(self) -> dict[str, Any]:
        """Write down what the store is made of, or see that it is what an earlier run wrote."""
        plan: dict[str, Any] = {
            **STORE_FORMAT,
            "weights": weights_digest(self.tower.text_model),
            "weights_dtype": dtype_name(self.tower.text_model),
            "layer": self.tower.layer,
            "dtype": self.settings.dtype,
            "segmenter": self.settings.segmenter_description,
            "long_segments": self.settings.long_segments,
            "captions": self.captions.digest,
        }
        path = self.folder / _PLAN_NAME
        if not path.exists():
            write_text_atomic(path, json.dumps(plan, indent=1) + "\n")
        stored, plan = json.loads(path.read_bytes()), json.loads(json.dumps(plan))
        if stored != plan:
            changed = ", ".join(f"`{key}`" for key in plan if stored.get(key) != plan[key])
            raise DataError(
                f"`{self.folder}` must be new or hold the same feature store; it holds one with "
                f"another {changed}; choose another folder or delete it"
            )
        return plan

    def _resume(self) -> None:
        """Count the files of features that are finished."""
        while (path := self.folder / features_name(self.num_shards)).exists():
            file = open_file(path)
            self.known.extend(file.get_tensor("digests").numpy())
            state = json.loads(file.metadata()["state"])
            self.next_sample = state["next_sample"]
            self.set_aside = Counter(state["set_aside"])
            self.num_shards += 1

    @torch.no_grad()
    def _encode(self, advance: Callable[[int], None]) -> None:
        """Write files of features until the captions end."""
        shard = FeatureShard(_DTYPES[self.settings.dtype])
        if self.next_sample == 0:
            empty = self.tower.wrap(())
            self._add(shard, [empty, self.tower.wrap((), padded=True)])
        for batch in _batches(self.captions.read(self.next_sample)):
            self._add(shard, self._sequences(batch))
            self.next_sample += len(batch)
            advance(len(batch))
            if shard.num_bytes >= self.settings.max_shard_bytes:
                shard = self._close(shard)
        if shard.sequences:
            self._close(shard)

    def _sequences(self, batch: Sequence[str | SampleFault]) -> Iterator[TokenIds]:
        """List the token sequences of the segments of some captions."""
        for caption in batch:
            if isinstance(caption, SampleFault):
                self.set_aside[caption.reason] += 1
                continue
            plan = plan_caption(
                self.settings.segmenter.split(caption),
                self.tower,
                policy=SpecialTokenPolicy(),
                token_budget=sys.maxsize,
                long_segments=self.settings.long_segments,
            )
            yield from (segment.input_ids for segment in plan.tokens)

    def _add(self, shard: FeatureShard, sequences: Iterator[TokenIds] | list[TokenIds]) -> None:
        """Encode the sequences that are new."""
        new: dict[TokenIds, Digest] = {}
        for sequence in sequences:
            if sequence not in new and (digest := digest_ids(sequence)) not in self.known:
                self.known.add(digest)
                new[sequence] = digest
        if new:
            shard.add(self.tower(new), new)

    def _close(self, shard: FeatureShard) -> FeatureShard:
        """Write a file of features and return an empty one."""
        state = {"next_sample": self.next_sample, "set_aside": dict(sorted(self.set_aside.items()))}
        path = self.folder / features_name(self.num_shards)
        # One entry, because safetensors writes several in no certain order.
        write_bytes_atomic(path, save(shard.tensors(), metadata={"state": json.dumps(state)}))
        self.num_shards += 1
        return FeatureShard(shard.dtype)

    def _write_index(self) -> StoreReport:
        """Sort the digests of all files, and count what is there."""
        report = StoreReport(len(self.captions), num_shards=self.num_shards)
        report.set_aside = dict(sorted(self.set_aside.items()))
        digests, files, places = [], [], []
        for number in range(self.num_shards):
            path = self.folder / features_name(number)
            file = open_file(path)
            digests.append(file.get_tensor("digests").numpy())
            files.append(np.full(len(digests[-1]), number, dtype=np.int32))
            places.append(np.arange(len(digests[-1]), dtype=np.int32))
            report.num_tokens += int(file.get_tensor("first_rows")[-1])
            report.num_bytes += path.stat().st_size
        high, low = np.ascontiguousarray(np.concatenate(digests).T)
        order = np.lexsort((low, high))
        columns = {
            "high": high[order],
            "low": low[order],
            "file": np.concatenate(files)[order],
            "place": np.concatenate(places)[order],
        }
        tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
        write_bytes_atomic(self.folder / INDEX_NAME, save(tensors))
        report.num_sequences = len(order)
        return report


def _batches(captions: Iterator[str | SampleFault]) -> Iterator[list[str | SampleFault]]:
    """Group captions, few of them where they are long."""
    batch: list[str | SampleFault] = []
    num_chars = 0
    for caption in captions:
        batch.append(caption)
        num_chars += len(caption) if isinstance(caption, str) else 0
        if len(batch) == _MAX_BATCH_CAPTIONS or num_chars >= _MAX_BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
