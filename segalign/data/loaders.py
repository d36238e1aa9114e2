"""Build the loaders of training, evaluation and streams from a few settings."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import webdataset
from torch.utils.data import DataLoader

from segalign.data.captions import read_caption
from segalign.data.faults import SampleFault
from segalign.data.images import decode_image
from segalign.data.manifest import Manifest, load_manifest
from segalign.data.order import BatchPlan, EpochOrder
from segalign.data.reader import IndexedShardReader, batch_pipeline
from segalign.data.streaming import ShardStream, stream_pipeline
from segalign.data.transforms import (
    CollateRows,
    Content,
    DecodeRow,
    RawSample,
    read_image,
    to_unit_range,
)
from segalign.errors import ConfigError, DataError
from segalign.types import CaptionBatch, PreferenceBatch

Batch: TypeAlias = CaptionBatch | PreferenceBatch
_MAX_PROBES = 50


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """What a batch holds and how it is delivered.

    Attributes:
        content: See ``DecodeRow``.
        image_size: Side of the square images, in pixels; None keeps their size.
        num_workers: Worker processes of a loader; 0 reads in the main process.
        pin_memory: Copy batches to page-locked memory.
    """

    content: Content
    image_size: int | None = None
    num_workers: int = 0
    pin_memory: bool = False


class BatchLoader:
    """Deliver batches in plan order for any number of workers.

    No ``DataLoader`` itself, so that trainers do not rebuild it around a sampler. Its state lies
    in the step counter of the run; the two state methods tell trainers so.

    Args:
        pipeline: Source and stages.
        settings: See ``BatchSettings``.
        seek: Called before each iteration, to set the source to the position of the run.
    """

    def __init__(
        self,
        pipeline: webdataset.DataPipeline,
        settings: BatchSettings,
        *,
        seek: Callable[[], None] | None = None,
    ) -> None:
        self._loader: DataLoader[Batch] = DataLoader(
            pipeline,
            batch_size=None,
            num_workers=settings.num_workers,
            pin_memory=settings.pin_memory,
            persistent_workers=settings.num_workers > 0,
        )
        self._seek = seek

    def __iter__(self) -> Iterator[Batch]:
        if self._seek is not None:
            self._seek()
        # Workers pass images on as bytes, which is most of what passing them on costs.
        return map(to_unit_range, iter(self._loader))

    def state_dict(self) -> dict[str, int]:
        """Return nothing: the position follows from the number of steps."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take nothing."""


class SizedBatchLoader(BatchLoader):
    """A ``BatchLoader`` that ends.

    Args:
        pipeline: Source and stages.
        settings: See ``BatchSettings``.
        num_batches: How many batches it delivers.
    """

    def __init__(
        self, pipeline: webdataset.DataPipeline, settings: BatchSettings, *, num_batches: int
    ) -> None:
        super().__init__(pipeline, settings)
        self._num_batches = num_batches

    def __len__(self) -> int:
        return self._num_batches


def open_shards(folder: Path) -> Manifest:
    """Load a manifest and see that its shards are there.

    Raises:
        DataError: If not, or if they hold no sample.
    """
    manifest = load_manifest(folder)
    manifest.check_files()
    if manifest.num_samples == 0:
        raise DataError(f"`{folder}` must hold samples; its manifest lists none; pack it again")
    return manifest


def train_loader(
    manifest: Manifest,
    plan: BatchPlan,
    settings: BatchSettings,
    *,
    seed: int,
    start: Callable[[], int] = lambda: 0,
    shuffle_window: int = 8,
    caption_dropout: float = 0.0,
) -> BatchLoader:
    """Deliver the endless training sequence.

    Args:
        manifest: What to read.
        plan: Which positions this rank reads.
        settings: See ``BatchSettings``.
        seed: Seed of the order and of the caption dropout.
        start: Asked for the number of the first micro-batch whenever an iteration begins.
        shuffle_window: See ``EpochOrder``.
        caption_dropout: See ``DecodeRow``.
    """
    order = EpochOrder(manifest.shard_sizes, seed=seed, shuffle_window=shuffle_window)
    manifest.num_cached_shards = 2 * shuffle_window
    reader = IndexedShardReader(manifest, order, plan)
    hw = _image_hw(manifest, settings)
    decode = DecodeRow(
        settings.content,
        image_size=settings.image_size,
        expected_size=hw,
        caption_dropout=caption_dropout,
        seed=seed,
        as_bytes=True,
    )
    collate = CollateRows(settings.content, image_hw=hw)
    pipeline = batch_pipeline(reader, decode, collate, plan.batch_size)
    return BatchLoader(pipeline, settings, seek=lambda: reader.seek(start()))


def eval_loader(
    manifest: Manifest, plan: BatchPlan, settings: BatchSettings, *, limit: int | None = None
) -> SizedBatchLoader:
    """Deliver every sample once, in manifest order, padded so that all ranks get equal batches.

    Args:
        manifest: What to read.
        plan: One step is one batch over all ranks; ``accumulate`` must be 1.
        settings: See ``BatchSettings``.
        limit: Read only the first so many samples.
    """
    order = EpochOrder(manifest.shard_sizes, shuffle=False)
    length = manifest.num_samples if limit is None else min(limit, manifest.num_samples)
    num_batches = -(-length // plan.global_batch_size)
    reader = IndexedShardReader(
        manifest, order, plan, num_micro_batches=num_batches, num_positions=length
    )
    hw = _image_hw(manifest, settings)
    decode = DecodeRow(
        settings.content, image_size=settings.image_size, expected_size=hw, as_bytes=True
    )
    collate = CollateRows(settings.content, image_hw=hw)
    pipeline = batch_pipeline(reader, decode, collate, plan.batch_size)
    return SizedBatchLoader(pipeline, settings, num_batches=num_batches)


def stream_loader(
    urls: list[str],
    plan: BatchPlan,
    settings: BatchSettings,
    *,
    samples_per_epoch: int,
    seed: int,
    start: int = 0,
    caption_dropout: float = 0.0,
) -> BatchLoader:
    """Deliver an endless stream of shards that have no manifest.

    Raises:
        ConfigError: If the images' size is left open.
    """
    side = settings.image_size
    if settings.content != "caption" and side is None:
        raise ConfigError("streams of images need `image_size`; got none; set it")
    stream = ShardStream(urls, plan, samples_per_epoch=samples_per_epoch, seed=seed, start=start)
    decode = DecodeRow(
        settings.content,
        image_size=side,
        caption_dropout=caption_dropout,
        seed=seed,
        as_bytes=True,
    )
    collate = CollateRows(settings.content, image_hw=None if side is None else (side, side))
    return BatchLoader(stream_pipeline(stream, decode, collate, plan.batch_size), settings)


def _image_hw(manifest: Manifest, settings: BatchSettings) -> tuple[int, int] | None:
    """Return (H, W) of the images: the setting, or else the size of the first sound image."""
    if settings.content == "caption":
        return None
    side = settings.image_size
    faults = []
    prefix = "0." if settings.content == "preference" else ""
    for raw in _first_samples(manifest):
        try:
            if "__fault__" in raw:
                raise raw["__fault__"]
            pixels = decode_image(read_image(raw, prefix))
            read_caption(raw)
        except SampleFault as fault:
            faults.append(fault)
            continue
        return (pixels.shape[0], pixels.shape[1]) if side is None else (side, side)
    # With a size, a bad start may be bad luck; shards without a single image are a wrong setting.
    if side is not None and any(fault.reason != "image_missing" for fault in faults):
        return side, side
    raise DataError(
        f"`{manifest.folder}` must hold samples with `{settings.content}` content; the first "
        f"{len(faults)} have none ({faults[-1]}); check `content`"
    )


def _first_samples(manifest: Manifest) -> Iterator[RawSample]:
    order = EpochOrder(manifest.shard_sizes, shuffle=False)
    reader = IndexedShardReader(manifest, order, BatchPlan(global_batch_size=1))
    for sample_id in range(min(_MAX_PROBES, manifest.num_samples)):
        yield reader.read_sample(sample_id)


def first_captions(folder: Path, count: int) -> list[str]:
    """Read the first captions of a folder of shards, in manifest order; bad samples are left out.

    Raises:
        DataError: If the folder has no manifest or no samples.
    """
    plan = BatchPlan(global_batch_size=count, world_size=1, global_rank=0, accumulate=1)
    settings = BatchSettings(content="caption")
    (batch,) = eval_loader(open_shards(folder), plan, settings, limit=count)
    return [c for c, valid in zip(batch["captions"], batch["valid"].tolist(), strict=True) if valid]
