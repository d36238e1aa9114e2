"""The manifest beside the shards: what every shard holds, and where.

``manifest.jsonl`` starts with a header line (shards with size, digest, number of samples and the
place of their own line); then follows one line per shard with keys and members. Only the header is
read at start-up; a shard's line is parsed when its first sample is read.
"""

import hashlib
import json
import re
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from segalign.atomic import write_bytes_atomic
from segalign.data.tarfiles import Member, Sample, ShardIndex, index_shard
from segalign.errors import DataError

MANIFEST_NAME: Final = "manifest.jsonl"
_FORMAT: Final = "segalign-shards"
_VERSION: Final = 1
_DAMAGES: Final = (
    ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError
)  # fmt: skip
_PLAIN_NAME: Final = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.+=,@-]*\.tar$")


@dataclass(frozen=True)
class ShardEntry:
    """What the header says about one shard.

    Attributes:
        name: Plain file name in the manifest's folder.
        size: Bytes of the shard.
        sha256: Hex digest of the shard.
        num_samples: Samples in it.
        line_offset: Where its line starts, in bytes after the header line.
        line_size: Bytes of its line.
        line_crc32: CRC-32 of its line.
    """

    name: str
    size: int
    sha256: str
    num_samples: int
    line_offset: int
    line_size: int
    line_crc32: int


class Manifest:
    """A folder of shards and what they hold.

    Args:
        folder: Where the shards and ``manifest.jsonl`` lie.
        shards: Entries in manifest order.
        body_offset: Bytes of the header line.

    Attributes:
        num_cached_shards: Shards whose parsed lines are kept in memory.
    """

    num_cached_shards = 16

    def __init__(self, folder: Path, shards: Sequence[ShardEntry], body_offset: int) -> None:
        self.folder = folder
        self.shards = tuple(shards)
        self._body_offset = body_offset
        self._ends = list(accumulate(shard.num_samples for shard in shards))
        self._lines: OrderedDict[int, list[Sample]] = OrderedDict()

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return self._ends[-1] if self._ends else 0

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard, in manifest order."""
        return [shard.num_samples for shard in self.shards]

    @property
    def digest(self) -> str:
        """Hex id of the content: names and digests of all shards, in order."""
        return _digest(self.shards)

    def locate(self, sample_id: int) -> tuple[int, int]:
        """Return (shard number, place in the shard) of a sample id in [0, num_samples)."""
        low, high = 0, len(self._ends) - 1
        while low < high:
            middle = (low + high) // 2
            if self._ends[middle] <= sample_id:
                low = middle + 1
            else:
                high = middle
        return low, sample_id - (self._ends[low] - self.shards[low].num_samples)

    def samples(self, shard_number: int) -> list[Sample]:
        """Return the samples of one shard.

        Raises:
            DataError: If the manifest's line of the shard is damaged.
        """
        if shard_number not in self._lines:
            self._lines[shard_number] = self._read_line(self.shards[shard_number])
            if len(self._lines) > self.num_cached_shards:
                self._lines.popitem(last=False)
        self._lines.move_to_end(shard_number)
        return self._lines[shard_number]

    def __iter__(self) -> Iterator[tuple[ShardEntry, Sample]]:
        for number, shard in enumerate(self.shards):
            for sample in self.samples(number):
                yield shard, sample

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lines": OrderedDict()}

    def check_files(self) -> None:
        """See that every shard is there and has its size.

        Raises:
            DataError: At the first shard that is missing or has another size.
        """
        for shard in self.shards:
            path = self.folder / shard.name
            try:
                size = path.stat().st_size
            except OSError as err:
                raise DataError(
                    f"shard `{path}` must be there, the manifest lists it; got: "
                    f"{err.strerror}; bring it back or run `shards index --force {self.folder}`"
                ) from err
            if size != shard.size:
                raise DataError(
                    f"shard `{path}` must have {shard.size} bytes by the manifest; got {size}; "
                    f"copy it again or run `shards index --force {self.folder}`"
                )

    def _read_line(self, shard: ShardEntry) -> list[Sample]:
        path = self.folder / MANIFEST_NAME
        try:
            with path.open("rb") as file:
                file.seek(self._body_offset + shard.line_offset)
                line = file.read(shard.line_size)
            if zlib.crc32(line) != shard.line_crc32:
                raise ValueError(f"the line of `{shard.name}` does not match its checksum")
            samples = parse_index(line)
            if len(samples) != shard.num_samples:
                raise ValueError(f"`{shard.name}` has {len(samples)} samples, not as its header")
        except _DAMAGES as err:
            raise _unreadable(self.folder, str(err)) from err
        return samples


def load_manifest(folder: Path) -> Manifest:
    """Read the header of a folder's manifest.

    Raises:
        DataError: If there is no folder, no manifest, or the manifest cannot be trusted.
    """
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise DataError(
            f"a folder of shards was expected; `{folder}` is none; check the path or make it "
            f"with `shards pack`"
        )
    if not path.is_file():
        raise DataError(
            f"`{folder}` must hold `{MANIFEST_NAME}`; it has none; "
            f"run `python main.py shards index {folder}`"
        )
    try:
        with path.open("rb") as file:
            header_line = file.readline()
        header = json.loads(header_line)
        if header["format"] != _FORMAT or header["version"] != _VERSION:
            raise ValueError(f"format {header['format']!r} version {header['version']!r}")
        shards = [ShardEntry(**entry) for entry in header["shards"]]
        _check_entries(shards, header["digest"])
    except _DAMAGES as err:
        raise _unreadable(folder, str(err)) from err
    return Manifest(folder, shards, len(header_line))


def write_manifest(folder: Path, indices: Iterable[ShardIndex]) -> Manifest:
    """Write the manifest of a folder, atomically, and return it.

    Raises:
        StorageError: If the folder cannot be written.
    """
    shards, lines, offset = [], [], 0
    for index in indices:
        line = format_index(index)
        entry = (index.name, index.size, index.sha256, len(index.samples))
        shards.append(ShardEntry(*entry, offset, len(line), zlib.crc32(line)))
        lines.append(line)
        offset += len(line)
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "num_samples": sum(shard.num_samples for shard in shards),
        "digest": _digest(shards),
        "shards": [asdict(shard) for shard in shards],
    }
    header_line = json.dumps(header, separators=(",", ":")).encode() + b"\n"
    write_bytes_atomic(folder / MANIFEST_NAME, header_line + b"".join(lines))
    return Manifest(folder, shards, len(header_line))


def index_shards(folder: Path, *, num_threads: int = 2) -> Manifest:
    """Index every ``*.tar`` of a folder, in name order, and write the manifest.

    Raises:
        DataError: If there is no shard, or one is not a sound WebDataset tar.
        StorageError: If the manifest cannot be written.
    """
    paths = sorted(folder.glob("[!.]*.tar"))
    if not paths:
        raise DataError(
            f"`{folder}` must hold `*.tar` shards; it has none; check the path or make them "
            f"with `shards pack`"
        )
    for path in paths:
        if not _PLAIN_NAME.match(path.name):
            raise DataError(
                f"a shard's name must consist of letters, digits and `_.+=,@-`; got "
                f"`{path.name}`; rename it"
            )
    with ThreadPoolExecutor(num_threads) as pool:
        return write_manifest(folder, list(pool.map(index_shard, paths)))


def format_index(index: ShardIndex) -> bytes:
    """Write one shard's line: its keys, and its members by number of suffix."""
    suffixes = sorted({member.suffix for sample in index.samples for member in sample.members})
    number = {suffix: place for place, suffix in enumerate(suffixes)}
    fields = {
        "name": index.name,
        "suffixes": suffixes,
        "keys": [sample.key for sample in index.samples],
        "members": [
            [value for member in sample.members for value in (number[member.suffix], *member[1:])]
            for sample in index.samples
        ],
    }
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def parse_index(line: bytes) -> list[Sample]:
    """Read the samples from one shard's line."""
    fields = json.loads(line)
    suffixes = [str(suffix) for suffix in fields["suffixes"]]
    samples = []
    for key, flat in zip(fields["keys"], fields["members"], strict=True):
        if not isinstance(key, str) or not all(map(_is_count, flat)):
            raise ValueError("keys must be strings, and places and sizes whole numbers")
        columns = [iter(flat)] * 4
        members = tuple(
            Member(suffixes[number], offset, size, crc32)
            for number, offset, size, crc32 in zip(*columns, strict=True)
        )
        samples.append(Sample(key, members))
    return samples


def _check_entries(shards: Sequence[ShardEntry], digest: str) -> None:
    for shard in shards:
        if not _PLAIN_NAME.match(str(shard.name)):
            raise ValueError(f"`{shard.name!s:.100}` is no plain file name of a shard")
        numbers = (shard.size, shard.num_samples, shard.line_offset, shard.line_size)
        if not all(map(_is_count, numbers)) or shard.num_samples > shard.line_size:
            raise ValueError(f"the numbers of `{shard.name}` cannot be")
    if len({shard.name for shard in shards}) < len(shards):
        raise ValueError("a shard is listed twice")
    if digest != _digest(shards):
        raise ValueError("the digest does not match the shards that are listed")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _digest(shards: Iterable[ShardEntry]) -> str:
    parts = (f"{shard.name}\n{shard.sha256}\n{shard.num_samples}\n" for shard in shards)
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _unreadable(folder: Path, found: str) -> DataError:
    return DataError(
        f"`{folder / MANIFEST_NAME}` must be a sound manifest; got: {found}; "
        f"run `python main.py shards index --force {folder}`"
    )
