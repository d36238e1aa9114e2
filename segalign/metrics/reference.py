"""Where statistics of real images are kept, so that they are computed once.

The name of a file carries the digest of what its statistics depend on, and a file is used only if
it says the same itself and holds what was written.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from segalign.atomic import make_directory
from segalign.data.loaders import open_shards
from segalign.data.manifest import Manifest
from segalign.errors import ConfigError, DataError, StorageError
from segalign.evaluation.image_metric import EvaluationSetting
from segalign.metrics.extractors.protocol import FeatureExtractor
from segalign.metrics.fixed_point import FEATURE_BITS
from segalign.metrics.metric_protocol import check_same_protocol, protocol_digest
from segalign.metrics.reference_computing import (
    ReferenceSettings,
    compute_reference,
    reference_key,
)
from segalign.metrics.reference_files import SUFFIX, is_file, load_reference, save_reference
from segalign.metrics.reference_statistics import ReferenceStatistics
from segalign.ranks import gather_objects, own_rank, together

FOLDER_NAME: Final = "statistics"
_DIGEST_LENGTH: Final = 16
_NAME_LENGTH: Final = 32


class ReferenceImages:
    """The real images that images made by a model are compared with.

    Args:
        path: Folder of shards, whose statistics are computed at first use and kept in its folder
            ``statistics/``; or a file of ``main.py stats``.
        image_size: Side of the square images, in pixels, as for training; null keeps their size.
        count: How many samples of the shards; null is all. A file must be of as many.
        batch_size: Images an extractor sees at a time.
        keep_rows: Keep the features themselves too, which kernel distances need.
        cache: Folder for the statistics where the one of the shards cannot be written.
        grid_bits: Sums are of features rounded to multiples of ``2**-grid_bits``. Lower it where
            features are too large to be summed exactly, which an error tells; a file has its own.
    """

    def __init__(
        self,
        path: str,
        image_size: int | None = None,
        count: int | None = None,
        batch_size: int = 32,
        keep_rows: bool = True,
        cache: str | None = None,
        grid_bits: int = FEATURE_BITS,
    ) -> None:
        numbers = {"batch_size": batch_size, "grid_bits": grid_bits}
        for name, value in {"image_size": image_size, "count": count, **numbers}.items():
            if value is not None and value < 1:
                raise ConfigError(
                    f"expected `{name}` of reference images to be at least 1; got {value}; raise it"
                )
        self.path = path
        self.image_size = image_size
        self.count = count
        self.batch_size = batch_size
        self.keep_rows = keep_rows
        self.cache = cache
        self.grid_bits = grid_bits

    def statistics(
        self, extractor: FeatureExtractor, setting: EvaluationSetting
    ) -> ReferenceStatistics:
        """Read the statistics, or compute and keep them; every rank must call it.

        They are read once a run, by equal settings and for equal extractors.

        Args:
            extractor: Frozen network, on the setting's device.
            setting: Of the evaluation.

        Raises:
            ConfigError: If there are not that many samples.
            DataError: If shards or a file are missing, damaged, or of another protocol.
            StorageError: If the statistics cannot be kept.
        """
        digest = protocol_digest({"settings": vars(self), "extractor": extractor.protocol()})
        asked = _Asked(digest, lambda: self._find(extractor, setting.device))
        found: ReferenceStatistics = setting.pool.load(_ReadOnce(asked))
        return found

    def _find(self, extractor: FeatureExtractor, device: torch.device) -> ReferenceStatistics:
        place = Path(self.path).expanduser()
        if is_file(self.path):
            return together(lambda: self._read(place, extractor))
        folders = [place / FOLDER_NAME]
        if self.cache is not None:
            folders.append(Path(self.cache).expanduser())
        found, _, _ = keep_reference(
            together(lambda: open_shards(place)),
            extractor,
            ReferenceSettings(
                image_size=self.image_size,
                count=self.count,
                batch_size=self.batch_size,
                keep_rows=self.keep_rows,
                grid_bits=self.grid_bits,
            ),
            device=device,
            folders=folders,
        )
        return found if self.keep_rows else found.without_rows()

    def _read(self, path: Path, extractor: FeatureExtractor) -> ReferenceStatistics:
        statistics = load_reference(path)
        statistics.check(extractor.protocol())
        images = statistics.protocol["images"]
        for name, wanted in (("image_size", self.image_size), ("first", self.count)):
            if wanted is not None and images.get(name) != wanted:
                raise DataError(
                    f"expected reference statistics with `{name}` {wanted}; `{path}` has "
                    f"{images.get(name)}; make them again with `main.py stats compute`"
                )
        return statistics if self.keep_rows else statistics.without_rows()


def keep_reference(
    manifest: Manifest,
    extractor: FeatureExtractor,
    settings: ReferenceSettings,
    *,
    device: torch.device,
    folders: Sequence[Path] = (),
    file: Path | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[ReferenceStatistics, Path, bool]:
    """Read statistics that are there, or compute and write them; every rank must call it.

    Rank 0 looks and writes, atomically: of several runs that compute the same, the last one's file
    stays, and it is like the others'.

    Args:
        manifest: The shards.
        extractor: Frozen network, on ``device``.
        settings: Which images.
        device: Where images go.
        folders: Where files are looked for, and written: in the first that can be.
        file: The file itself instead.
        advance: See ``compute_reference``.

    Returns:
        The statistics, their file, and whether it was there before.

    Raises:
        ConfigError: If there are not that many samples.
        DataError: If a file is damaged or of another protocol, or no image can be read.
        StorageError: If no folder can be written.
    """
    key = together(lambda: reference_key(manifest, extractor, settings))
    names = [file] if file is not None else _candidates(folders, key, settings.keep_rows)
    found = _from_first_rank(lambda: next((path for path in names if path.exists()), None))
    if found is not None:
        return together(lambda: _load_for(found, key, settings)), found, True
    place = _from_first_rank(lambda: _writable(names))
    assert place is not None
    statistics = compute_reference(manifest, extractor, settings, device=device, advance=advance)
    _from_first_rank(lambda: save_reference(statistics, place))
    return statistics, place, False


def _load_for(
    path: Path, key: Mapping[str, Any], settings: ReferenceSettings
) -> ReferenceStatistics:
    """Read a file, and see that it is what its name or the caller says."""
    key = {**key, "grid_bits": settings.grid_bits}
    found = load_reference(path)
    images = {name: found.protocol["images"].get(name) for name in key["images"]}
    known = {**found.protocol, "images": images, "grid_bits": found.statistics.grid_bits}
    try:
        check_same_protocol(
            key, {name: known.get(name) for name in key}, "the statistics asked for and the file"
        )
    except DataError as error:
        raise DataError(f"`{path}` holds other reference statistics: {error}") from error
    if settings.keep_rows and found.rows is None:
        raise DataError(
            f"expected reference statistics with features of each image; `{path}` has sums alone; "
            "delete it, or choose another file"
        )
    return found


def _candidates(folders: Sequence[Path], key: Mapping[str, Any], keep_rows: bool) -> list[Path]:
    """Name the files that hold what is wanted; the one to write comes first in each folder."""
    extractor = str(key["extractor"].get("name", "")).partition("(")[0].lower()
    words = re.sub(r"[^a-z0-9]+", "-", extractor)[:_NAME_LENGTH].strip("-")
    stem = f"{words}-{protocol_digest(key)[:_DIGEST_LENGTH]}"
    kinds = ("-rows",) if keep_rows else ("", "-rows")
    return [folder / f"{stem}{kind}{SUFFIX}" for folder in folders for kind in kinds]


def _writable(names: Sequence[Path]) -> Path:
    """Return the first file whose folder can be written; it is made if it is missing."""
    failure: StorageError | None = None
    for path in names:
        try:
            make_directory(path.parent)
        except StorageError as error:
            failure = failure or error
        else:
            return path
    raise StorageError(
        f"expected a folder that reference statistics can be kept in; got: {failure} Name one by "
        "`cache`, or make a file with `main.py stats compute --out`."
    ) from failure


def _from_first_rank(work: Callable[[], Path | None]) -> Path | None:
    """Let rank 0 alone do something; the others wait, and get what it returns."""
    own = together(lambda: work() if own_rank() == 0 else None)
    first: Path | None = gather_objects(own)[0]
    return first


@dataclass(frozen=True, eq=False)
class _Asked:
    """Which statistics are wanted; a pool tells sources apart by how their attributes are shown."""

    digest: str
    find: Callable[[], ReferenceStatistics] = field(repr=False)


class _ReadOnce:
    def __init__(self, asked: _Asked) -> None:
        self.asked = asked

    def load(self) -> ReferenceStatistics:
        return self.asked.find()
