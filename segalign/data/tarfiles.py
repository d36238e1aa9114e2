"""Write tar shards byte for byte reproducibly, and find the members of any plain tar shard."""

import hashlib
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from segalign.errors import DataError

_KEY_AND_SUFFIX = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META_MEMBER = re.compile(r"^__[^/]*__$")
_CHUNK = 1 << 20
_MAX_NAME = 1024
# What tarfile raises at a damaged tar is not only its own errors.
_DAMAGES = (
    ArithmeticError, EOFError, LookupError, MemoryError, OSError, RecursionError, ValueError,
    tarfile.TarError,
)  # fmt: skip
_logger = logging.getLogger(__name__)


class Member(NamedTuple):
    """One file of a sample inside a shard.

    Attributes:
        suffix: All of the name after its first dot, in lower case ("jpg", "0.jpg").
        offset: First byte of the content in the shard.
        size: Bytes of the content.
        crc32: CRC-32 of the content.
    """

    suffix: str
    offset: int
    size: int
    crc32: int


class Sample(NamedTuple):
    """One sample of a shard: its key and members, in the order of the tar."""

    key: str
    members: tuple[Member, ...]


@dataclass
class ShardIndex:
    """What one shard holds.

    Attributes:
        name: Plain file name.
        size: Bytes of the file.
        sha256: Hex digest of the file.
        samples: Samples in the order of the tar.
    """

    name: str
    size: int
    sha256: str
    samples: list[Sample] = field(default_factory=list)


class ShardWriter:
    """Write one tar shard whose bytes depend on nothing but the samples.

    Args:
        file: Opened for writing; stays open.
        name: File name that the index will carry.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._offset = 0
        self._name = name
        self._samples: list[Sample] = []

    def write(self, key: str, members: Iterable[tuple[str, bytes]]) -> None:
        """Append a sample: ``KEY.SUFFIX`` for each (suffix, content)."""
        written = []
        for suffix, content in members:
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size, info.mode = len(content), 0o644
            self._append(info.tobuf(tarfile.USTAR_FORMAT))
            written.append(Member(suffix, self._offset, len(content), zlib.crc32(content)))
            self._append(content + b"\0" * (-len(content) % tarfile.BLOCKSIZE))
        self._samples.append(Sample(key, tuple(written)))

    def finish(self) -> ShardIndex:
        """Write the end mark and return the index of what was written."""
        end = 2 * tarfile.BLOCKSIZE
        self._append(b"\0" * (end + -(self._offset + end) % tarfile.RECORDSIZE))
        return ShardIndex(self._name, self._offset, self._hash.hexdigest(), self._samples)

    def _append(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self._offset += len(content)


def index_shard(path: Path) -> ShardIndex:
    """Read a plain tar shard once and list its samples with offsets and checksums.

    Raises:
        DataError: If the file is no plain tar, is cut off or damaged, has the members of one
            sample apart from each other, or members without content of their own, such as links.
    """
    try:
        with path.open("rb") as file:
            left_out: list[str] = []
            samples = _read_samples(file, path, left_out)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size
    except DataError:
        raise
    except _DAMAGES as err:
        raise DataError(
            f"shard `{path}` must be a plain, uncompressed tar; got: {_one_line(err)}; "
            f"replace it or take it out of the folder"
        ) from err
    if left_out:
        _logger.warning(
            "`%s`: %d files belong to no sample, as their names have no suffix, `%s` first",
            path,
            len(left_out),
            _short(left_out[0]),
        )
    return ShardIndex(path.name, size, digest, samples)


def _read_samples(file: BinaryIO, path: Path, left_out: list[str]) -> list[Sample]:
    keys: list[str] = []
    members: list[list[Member]] = []
    seen: set[str] = set()
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for info in archive:
            match = _KEY_AND_SUFFIX.match(info.name)
            if info.isdir() or _META_MEMBER.match(info.name):
                continue
            _refuse_without_content(path, info)
            if match is None:
                left_out.append(info.name)
                continue
            key, suffix = match.group(1), match.group(2).lower()
            if not keys or keys[-1] != key:
                _refuse_second_run(path, key, seen)
                keys.append(key)
                members.append([])
            if any(member.suffix == suffix for member in members[-1]):
                raise _defect(path, f"two members `{_short(info.name)}`", "pack it again")
            checksum = _checksum(file, info.offset_data, info.size)
            members[-1].append(Member(suffix, info.offset_data, info.size, checksum))
        end = archive.offset
    _refuse_missing_end(file, path, end)
    return [Sample(key, tuple(found)) for key, found in zip(keys, members, strict=True)]


def _checksum(file: BinaryIO, offset: int, size: int) -> int:
    checksum, end = 0, offset + size
    while offset < end:
        chunk = os.pread(file.fileno(), min(_CHUNK, end - offset), offset)
        if not chunk:
            raise EOFError
        checksum = zlib.crc32(chunk, checksum)
        offset += len(chunk)
    return checksum


def _refuse_without_content(path: Path, info: tarfile.TarInfo) -> None:
    if not info.isreg() or info.issparse():
        raise _defect(
            path,
            f"`{_short(info.name)}`, which is a link, a device or sparse",
            "pack it again with plain files (`tar --dereference --hard-dereference`)",
        )
    if len(info.name) > _MAX_NAME:
        raise _defect(
            path,
            f"`{_short(info.name)}` with a name of {len(info.name)} characters",
            f"give it one of at most {_MAX_NAME}",
        )


def _short(name: str) -> str:
    return ascii(name)[1:-1][:100]


def _refuse_second_run(path: Path, key: str, seen: set[str]) -> None:
    if key in seen:
        raise _defect(
            path,
            f"the members of key `{_short(key)}` in two places",
            "pack it again with the members of one key side by side",
        )
    seen.add(key)


def _refuse_missing_end(file: BinaryIO, path: Path, end: int) -> None:
    """See that zeros and nothing else follow: tarfile stops silently at a damaged header."""
    file.seek(end)
    num_zeros = 0
    while chunk := file.read(_CHUNK):
        if any(chunk):
            num_zeros = 0
            break
        num_zeros += len(chunk)
    if num_zeros < tarfile.BLOCKSIZE:
        raise _defect(
            path,
            f"no end mark at byte {end}: it is cut off or damaged there",
            "copy or pack it again",
        )


def _defect(path: Path, found: str, cure: str) -> DataError:
    return DataError(f"shard `{path}` must be a sound WebDataset tar; got {found}; {cure}")


def _one_line(err: BaseException) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0]
