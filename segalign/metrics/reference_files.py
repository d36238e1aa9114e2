"""Files of statistics of real images: their names, and a digest that tells damage."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from segalign.errors import ConfigError, DataError
from segalign.metrics.reference_statistics import ReferenceStatistics

SUFFIX: Final = ".safetensors"
_CONTENT: Final = "content"


def is_file(path: str) -> bool:
    """Tell a file of statistics, also one that is missing, from a folder of shards."""
    place = Path(path).expanduser()
    return place.is_file() or place.suffix == SUFFIX


def check_file_name(path: Path) -> Path:
    """Return the name of a file to write, which configs know by its ending.

    Raises:
        ConfigError: If it has another one.
    """
    if path.suffix != SUFFIX:
        raise ConfigError(f"expected a file name that ends in `{SUFFIX}`; got `{path}`; change it")
    return path


def save_reference(statistics: ReferenceStatistics, path: Path) -> None:
    """Write a file with a digest of its content.

    Raises:
        StorageError: If it cannot be written.
    """
    protocol = {**statistics.protocol, _CONTENT: _content_digest(statistics)}
    ReferenceStatistics(statistics.statistics, statistics.rows, protocol).save(path)


def load_reference(path: Path) -> ReferenceStatistics:
    """Read a file of ``save_reference``.

    Raises:
        DataError: If there is none, or it is damaged or another kind of file.
    """
    found = ReferenceStatistics.load(path)
    if found.protocol.pop(_CONTENT, None) != _content_digest(found):
        raise DataError(
            f"expected reference statistics in `{path}`; its content is not what was written, so "
            "it is damaged; delete it and run `main.py stats compute` again"
        )
    if not isinstance(found.protocol.get("images"), Mapping):
        raise DataError(
            f"expected reference statistics in `{path}` to say which images they are of; they do "
            "not; delete it and run `main.py stats compute` again"
        )
    return found


def _content_digest(statistics: ReferenceStatistics) -> str:
    digest = hashlib.sha256()
    tensors = statistics.statistics.tensors()
    if statistics.rows is not None:
        tensors["rows"] = statistics.rows.cpu().contiguous()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}\0".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
