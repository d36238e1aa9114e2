"""Read samples by the manifest, in the order of a plan, for webdataset's stages.

What to read is settled before the workers start: rank and number of ranks are in the plan, and a
worker derives its share from its own number alone.
"""

import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import torch
import webdataset
from torch.utils.data import IterableDataset, get_worker_info

from segalign.data.faults import SampleFault
from segalign.data.manifest import Manifest
from segalign.data.order import BatchPlan, EpochOrder
from segalign.data.transforms import (
    PADDING_ID,
    RESERVED,
    CollateRows,
    DecodeRow,
    RawSample,
)

_MAX_OPEN_SHARDS = 64
_MAX_MEMBER_BYTES = 1 << 28  # more than an image of the largest size without compression


class ShardFiles:
    """Read byte ranges of shards; handles are opened when needed and the oldest closed.

    Args:
        folder: Where the shards lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handles: OrderedDict[str, int] = OrderedDict()

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on; fewer at the end of the file.

        A shard that cannot be read is opened anew once: on network file systems a handle may have
        become stale while the file is sound.

        Raises:
            OSError: If the shard cannot be read.
        """
        try:
            return os.pread(self._handle(shard), size, offset)
        except OSError:
            if shard in self._handles:
                os.close(self._handles.pop(shard))
            return os.pread(self._handle(shard), size, offset)

    def _handle(self, shard: str) -> int:
        if shard not in self._handles:
            self._handles[shard] = os.open(self._folder / shard, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._handles) > _MAX_OPEN_SHARDS:
                os.close(self._handles.popitem(last=False)[1])
        self._handles.move_to_end(shard)
        return self._handles[shard]

    def close(self) -> None:
        """Close all handles; reading opens them again."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def __getstate__(self) -> dict[str, object]:
        return {"_folder": self._folder, "_handles": OrderedDict()}

    def __del__(self) -> None:
        self.close()


class IndexedShardReader(IterableDataset[RawSample]):
    """Yield raw samples of the manifest in plan order.

    A sample that cannot be read keeps its slot: it is yielded with ``__fault__`` and no members.

    Args:
        manifest: What the shards hold.
        order: The endless sequence of samples.
        plan: Which positions this rank reads.
        start: First micro-batch to read (a resumed run starts here, at no cost).
        num_micro_batches: How many to read; None never ends.
        num_positions: Length of a finite sequence (validation): slots from there on are padding.
            None: the sequence is endless.
    """

    def __init__(
        self,
        manifest: Manifest,
        order: EpochOrder,
        plan: BatchPlan,
        *,
        start: int = 0,
        num_micro_batches: int | None = None,
        num_positions: int | None = None,
    ) -> None:
        self._manifest = manifest
        self._order = order
        self._plan = plan
        # Shared memory, because workers that outlive an iteration keep their copy of the reader.
        self._start = torch.tensor([start])
        self._start.share_memory_()  # type: ignore[no-untyped-call]
        self._num_micro_batches = num_micro_batches
        self._num_positions = num_positions
        self._files = ShardFiles(manifest.folder)

    def seek(self, micro_batch: int) -> None:
        """Begin the next iteration at this micro-batch, in all worker processes."""
        self._start[0] = micro_batch

    def __iter__(self) -> Iterator[RawSample]:
        start = int(self._start[0])
        stop = None if self._num_micro_batches is None else start + self._num_micro_batches
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        for micro_batch in self._plan.micro_batches(
            start=start, stop=stop, worker=worker, num_workers=num_workers
        ):
            for position in self._plan.positions(micro_batch):
                yield self._read(position)

    def _read(self, position: int) -> RawSample:
        if self._num_positions is not None and position >= self._num_positions:
            return {
                "__key__": "",
                "__url__": "",
                "__index__": PADDING_ID,
                "__epoch__": 0,
                "__padding__": True,
            }
        epoch, sample_id = self._order.locate(position)
        return {**self.read_sample(sample_id, epoch=epoch), "__position__": position}

    def read_sample(self, sample_id: int, *, epoch: int = 0) -> RawSample:
        """Read one sample by its place in the manifest, in [0, num_samples)."""
        shard_number, place = self._manifest.locate(sample_id)
        shard = self._manifest.shards[shard_number]
        key, members = self._manifest.samples(shard_number)[place]
        raw: RawSample = {
            "__key__": key,
            "__url__": str(self._manifest.folder / shard.name),
            "__index__": sample_id,
            "__epoch__": epoch,
            "__offset__": members[0].offset if members else -1,
        }
        try:
            for suffix, offset, size, crc32 in members:
                if not suffix.startswith(RESERVED):
                    raw[suffix] = self._read_member(shard.name, offset, size, crc32)
        except SampleFault as fault:
            raw["__fault__"] = fault
        return raw

    def _read_member(self, shard: str, offset: int, size: int, crc32: int) -> bytes:
        if size > _MAX_MEMBER_BYTES:
            raise SampleFault("member_too_large", f"{size} bytes, at most {_MAX_MEMBER_BYTES}")
        try:
            content = self._files.read(shard, offset, size)
        except OSError as err:
            raise SampleFault("read_error", str(err.strerror or err)) from err
        if len(content) != size:
            raise SampleFault("read_error", f"{len(content)} of {size} bytes at {offset}")
        if zlib.crc32(content) != crc32:
            raise SampleFault("checksum", f"the bytes at {offset} are not those of the manifest")
        return content


def batch_pipeline(
    reader: IterableDataset[RawSample], decode: DecodeRow, collate: CollateRows, batch_size: int
) -> webdataset.DataPipeline:
    """Chain reader, decoder and collation with webdataset's own stages."""
    return webdataset.DataPipeline(
        reader,
        webdataset.map(decode),
        webdataset.batched(batch_size, collation_fn=collate, partial=False),
    )
