"""Statistics of the real images of shards, which images made by a model are compared with.

They are computed once: see ``segalign.metrics.reference`` for where they are kept.

Dims: B images of a micro-batch, N images in all, d features, H/W pixels.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Final, cast

import torch
from torch import Tensor, distributed

from segalign.data.images import IMAGE_SUFFIXES
from segalign.data.loaders import BatchSettings, eval_loader
from segalign.data.manifest import Manifest
from segalign.data.order import BatchPlan
from segalign.data.sources import plain_suffix
from segalign.errors import ConfigError, DataError
from segalign.metrics.extractors.protocol import FeatureExtractor
from segalign.metrics.feature_statistics import FeatureStatistics
from segalign.metrics.fixed_point import FEATURE_BITS
from segalign.metrics.host_gather import gather_to_host
from segalign.metrics.reference_statistics import ReferenceStatistics
from segalign.pictures import to_bytes
from segalign.ranks import gather_objects, own_rank, together, world_size
from segalign.types import CaptionBatch

FORMAT: Final = 1
_FIT: Final = "short side to the size, centre crop; Pillow bicubic, JPEG decoded at reduced scale"
_ROWS_AT_ONCE: Final = 512
_MAX_NAMED: Final = 20


@dataclass(frozen=True, kw_only=True)
class ReferenceSettings:
    """Which images of shards are looked at, and how.

    Attributes:
        image_size: Side of the square that images are resized and cropped to, in pixels, as for
            training; None keeps their size, which must be the same for all.
        count: How many samples, the first in manifest order; None is all.
        batch_size: Images an extractor sees at a time; a GPU's features depend on it in the last
            bits.
        keep_rows: Keep the features themselves too, which kernel distances need: 4 N d bytes.
        grid_bits: Sums are of features rounded to multiples of ``2**-grid_bits``, at least 1; fewer
            leave room for larger features and for more images.
    """

    image_size: int | None = None
    count: int | None = None
    batch_size: int = 32
    keep_rows: bool = True
    grid_bits: int = FEATURE_BITS


def reference_key(
    manifest: Manifest, extractor: FeatureExtractor, settings: ReferenceSettings
) -> dict[str, Any]:
    """Say what statistics depend on, as far as it is known before they are computed.

    Raises:
        ConfigError: If more samples are asked for than there are.
    """
    count = manifest.num_samples if settings.count is None else settings.count
    if not 1 <= count <= manifest.num_samples:
        raise ConfigError(
            f"expected `count` of reference images in [1, {manifest.num_samples}], the samples of "
            f"`{manifest.folder}`; got {count}; change it, or leave it out for all"
        )
    # Names of files that were made before there was a choice stay what they are.
    grid = {"grid_bits": settings.grid_bits} if settings.grid_bits != FEATURE_BITS else {}
    return {
        "format": FORMAT,
        **grid,
        "extractor": extractor.protocol(),
        "images": {
            "manifest": manifest.digest,
            "first": count,
            "image_size": settings.image_size,
            "fit": "none" if settings.image_size is None else _FIT,
        },
    }


def compute_reference(
    manifest: Manifest,
    extractor: FeatureExtractor,
    settings: ReferenceSettings,
    *,
    device: torch.device,
    advance: Callable[[int], None] = lambda _: None,
) -> ReferenceStatistics:
    """Compute the statistics of real images; every rank must call it.

    Micro-batches are cut before they are dealt out to ranks, as ``EvaluationPlan`` does, and sums
    are of whole numbers: the result is the same bits for any number of ranks, where the extractor
    gives the same bits for the same micro-batch.

    Args:
        manifest: The shards. A sample whose image or caption cannot be read is left out.
        extractor: Frozen network, on ``device``.
        settings: Which images.
        device: Where images go.
        advance: Told how many more samples are done, over all ranks.

    Returns:
        Statistics, the same on every rank. The protocol's ``images`` tells how many images count
        (``num_images``), how they are stored, and which samples are left out.

    Raises:
        ConfigError: If more samples are asked for than there are.
        DataError: If no image can be read, or a feature is not finite; on every rank alike.
    """
    key = reference_key(manifest, extractor, settings)
    seen = together(lambda: _look(manifest, extractor, settings, device, advance))
    statistics = _sum_over_ranks(seen.sums(extractor.num_features), device)
    parts = gather_objects((seen.sample_ids, seen.stored, seen.left_out))
    if not statistics.num_samples:
        sample = min(entry for _, _, left_out in parts for entry in left_out)
        raise DataError(
            f"expected images in `{manifest.folder}`; none of {key['images']['first']} can be "
            f"read, the first is {sample[1]}; run `main.py shards verify --decode` on the folder"
        )
    rows = None
    if settings.keep_rows:
        ids = [sample_id for sample_ids, _, _ in parts for sample_id in sample_ids]
        rows = _gather_rows(seen.rows(extractor.num_features))[torch.tensor(ids).argsort()]
    images = {
        **key["images"],
        "num_images": statistics.num_samples,
        "stored": dict(sorted(sum((stored for _, stored, _ in parts), Counter[str]()).items())),
        "left_out": _name_left_out([entry for _, _, left_out in parts for entry in left_out]),
    }
    computed = {
        "batch_size": settings.batch_size,
        "device": device.type,
        "torch": torch.__version__,
        "pillow": version("pillow"),
    }
    return ReferenceStatistics(statistics, rows, {**key, "images": images, "computed": computed})


@dataclass
class _Seen:
    """What one rank has seen of the images."""

    grid_bits: int
    sample_ids: list[int] = field(default_factory=list)
    stored: Counter[str] = field(default_factory=Counter)
    left_out: list[tuple[int, str, str]] = field(default_factory=list)
    _summed: FeatureStatistics | None = None
    _features: list[Tensor] = field(default_factory=list)
    _num_summed: int = 0

    def add(self, features: Tensor, *, keep_rows: bool) -> None:
        self._features.append(features.cpu())
        if sum(map(len, self._features[self._num_summed :])) >= _ROWS_AT_ONCE:
            self._sum_up()
            if not keep_rows:
                self._features, self._num_summed = [], 0

    def sums(self, num_features: int) -> FeatureStatistics:
        self._sum_up()
        return self._summed or FeatureStatistics.of(torch.zeros(0, num_features), self.grid_bits)

    def rows(self, num_features: int) -> Tensor:
        return torch.cat([torch.zeros(0, num_features), *self._features])

    def _sum_up(self) -> None:
        waiting = self._features[self._num_summed :]
        if waiting:
            part = FeatureStatistics.of(torch.cat(waiting), self.grid_bits)
            self._summed = part if self._summed is None else self._summed.merge(part)
            self._num_summed = len(self._features)


def _look(
    manifest: Manifest,
    extractor: FeatureExtractor,
    settings: ReferenceSettings,
    device: torch.device,
    advance: Callable[[int], None],
) -> _Seen:
    """Extract the features of this rank's micro-batches."""
    num_ranks = world_size()
    plan = BatchPlan(
        global_batch_size=settings.batch_size * num_ranks,
        world_size=num_ranks,
        global_rank=own_rank(),
    )
    batches = BatchSettings(content="image", image_size=settings.image_size)
    seen = _Seen(settings.grid_bits)
    for loaded in eval_loader(manifest, plan, batches, limit=settings.count):
        batch = cast("CaptionBatch", loaded)
        pixels = to_bytes(batch["images"]).to(device)
        features = extractor(pixels).features
        seen.add(features[batch["valid"].to(device)], keep_rows=settings.keep_rows)
        _note_samples(seen, batch, manifest)
        advance(int((batch["sample_ids"] >= 0).sum()) * num_ranks)
    seen.sums(extractor.num_features)
    return seen


def _note_samples(seen: _Seen, batch: CaptionBatch, manifest: Manifest) -> None:
    ids = batch["sample_ids"].tolist()
    counted = [one for one, valid in zip(ids, batch["valid"].tolist(), strict=True) if valid]
    seen.sample_ids += counted
    seen.stored.update(_suffix(manifest, sample_id) for sample_id in counted)
    for fault in batch["faults"]:
        name = f"{fault['shard']}, key {fault['key']}: {fault['reason']}"
        seen.left_out.append((ids[fault["row"]], name, fault["reason"]))


def _suffix(manifest: Manifest, sample_id: int) -> str:
    number, place = manifest.locate(sample_id)
    suffixes = {member.suffix for member in manifest.samples(number)[place].members}
    return plain_suffix(next(suffix for suffix in IMAGE_SUFFIXES if suffix in suffixes))


def _name_left_out(entries: list[tuple[int, str, str]]) -> dict[str, Any]:
    return {
        "count": len(entries),
        "reasons": dict(sorted(Counter(reason for _, _, reason in entries).items())),
        "samples": [name for _, name, _ in sorted(entries)[:_MAX_NAMED]],
    }


def _sum_over_ranks(own: FeatureStatistics, device: torch.device) -> FeatureStatistics:
    """Add up the sums of all ranks, which are whole numbers: in any order the same."""
    if world_size() == 1:
        return own
    count = own.feature_sum.new_tensor([own.num_samples])
    flat = torch.cat([count, own.feature_sum, own.product_sum.flatten()]).to(device)
    distributed.all_reduce(flat)
    width = own.num_features
    flat = flat.cpu()
    features, products = flat[1 : width + 1].clone(), flat[width + 1 :].clone()
    return FeatureStatistics(int(flat[0]), features, products.view(width, width), own.grid_bits)


def _gather_rows(own: Tensor) -> Tensor:
    return own if world_size() == 1 else torch.cat(gather_to_host(own))
