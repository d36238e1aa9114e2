"""Rows of Parquet files as one sequence, streamed: only one batch of them is in memory."""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from segalign.data.faults import SampleFault
from segalign.errors import DataError

_BUFFER_BYTES: Final = 1 << 20
_SCALAR_KINDS: Final = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
)


class ParquetRows:
    """The required columns and all columns of scalars, row by row.

    Args:
        path: A Parquet file, a folder of them at any depth, or a glob pattern.
        required: Columns that every file must have; they are read whatever their type.
        rows_per_batch: Rows that are in memory at a time, >= 1.

    Attributes:
        files: The files, in name order.
        columns: Names of the columns that are read from the first file.

    Raises:
        DataError: If there is no such file, one is no Parquet file or lacks a column, or there
            are no rows.
    """

    def __init__(self, path: str, *, required: Sequence[str], rows_per_batch: int) -> None:
        self.files = _find_files(path)
        self._required = list(required)
        self._rows_per_batch = rows_per_batch
        groups: list[tuple[int, int]] = []
        sizes: list[int] = []
        for number, file in enumerate(self.files):
            counts = _count_rows(file, self._required)
            groups += [(number, group) for group in range(len(counts))]
            sizes += counts
        self._groups = groups
        self._ends = list(accumulate(sizes))
        if not len(self):
            raise DataError(f"`{path}` must hold rows with captions; it has none; check the path")
        self.columns = _kept_columns(_read_schema(self.files[0]), self._required)
        self._rows: _GroupRows | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def origin(self, index: int) -> str:
        """Name a row for a report."""
        group = bisect_right(self._ends, index)
        file = self._groups[group][0]
        while group and self._groups[group - 1][0] == file:
            group -= 1
        return f"row {index - self._start(group)} of `{self.files[file].name}`"

    def read(self, index: int) -> dict[str, pa.Scalar]:
        """Return a row's values by column; in ascending order nothing is read twice.

        Raises:
            DataError: If the file is damaged.
        """
        group = bisect_right(self._ends, index)
        place = index - self._start(group)
        rows = self._rows
        if rows is None or rows.group != group or rows.next_row > place:
            file, number = self._groups[group]
            rows = self._rows = _GroupRows(
                self.files[file],
                number,
                group=group,
                required=self._required,
                rows_per_batch=self._rows_per_batch,
            )
        return rows.read(place)

    def _start(self, group: int) -> int:
        return self._ends[group - 1] if group else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}


def digest_contents(files: Sequence[Path]) -> str:
    """Return the SHA-256 of the contents in order, wherever the files lie."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def digest_stamps(files: Sequence[Path]) -> str:
    """Return the SHA-256 of names, sizes and times of change: for files too large to be read."""
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def to_python(name: str, scalar: pa.Scalar) -> Any:
    """Convert a value; numbers that JSON cannot hold become null.

    Raises:
        SampleFault: If it is text and not UTF-8.
    """
    try:
        value = scalar.as_py()
    except UnicodeDecodeError as err:
        detail = f"`{name:.40}`: byte {err.start} is not UTF-8"
        raise SampleFault("caption_not_utf8", detail) from err
    if pa.types.is_floating(scalar.type) and value is not None:
        return float(value) if math.isfinite(value) else None
    return value


class _GroupRows:
    """The rows of one row group, in order.

    Args:
        path: The file.
        number: Which of its row groups.
        group: The source's own number of the row group.
        required: Columns that are read whatever their type.
        rows_per_batch: Rows that are in memory at a time.

    Attributes:
        group: As above.
        next_row: The first row that can still be read.
    """

    def __init__(
        self,
        path: Path,
        number: int,
        *,
        group: int,
        required: Sequence[str],
        rows_per_batch: int,
    ) -> None:
        self.group = group
        self.next_row = 0
        self._path = path
        self._batches = self._read_batches(number, required, rows_per_batch)
        self._batch: pa.RecordBatch | None = None
        self._start = 0

    def read(self, row: int) -> dict[str, pa.Scalar]:
        """Return one row's values by column; batches before it are gone.

        Raises:
            DataError: If the file is damaged.
        """
        while self._batch is None or row >= self._start + self._batch.num_rows:
            if self._batch is not None:
                self._start += self._batch.num_rows
            self._batch = next(self._batches)
        self.next_row = self._start
        names = self._batch.schema.names
        columns = zip(names, self._batch.columns, strict=True)
        return {name: column[row - self._start] for name, column in columns}

    def _read_batches(
        self, number: int, required: Sequence[str], rows_per_batch: int
    ) -> Iterator[pa.RecordBatch]:
        try:
            # Without these settings a whole row group's compressed bytes are read at once.
            reading = {"buffer_size": _BUFFER_BYTES, "pre_buffer": False}
            with pq.ParquetFile(self._path, **reading) as file:
                yield from file.iter_batches(
                    rows_per_batch,
                    row_groups=[number],
                    columns=_kept_columns(file.schema_arrow, required),
                    use_threads=False,
                )
        except (pa.ArrowException, OSError) as err:
            raise _unreadable(self._path, err) from err
        raise _unreadable(self._path, f"row group {number} has fewer rows than it says")


def _find_files(path: str) -> list[Path]:
    """Expand a file, a folder or a pattern, in name order."""
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        found = [file for file in place.rglob("*.parquet") if file.is_file()]
    else:
        anchor = Path(place.anchor)
        pattern = str(place.relative_to(anchor)) if place.is_absolute() else str(place)
        found = [file for file in anchor.glob(pattern) if file.is_file()]
    if not found:
        raise DataError(
            f"a Parquet file, a folder of them or a pattern was expected; `{path}` has none; "
            f"check the path"
        )
    return sorted(found)


def _read_schema(file: Path) -> pa.Schema:
    with pq.ParquetFile(file) as opened:
        return opened.schema_arrow


def _count_rows(file: Path, required: Sequence[str]) -> list[int]:
    """Count the rows of each row group of a file that has the required columns."""
    try:
        with pq.ParquetFile(file) as opened:
            names = set(opened.schema_arrow.names)
            metadata = opened.metadata
            counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    except (pa.ArrowException, OSError) as err:
        raise _unreadable(file, err) from err
    missing = [name for name in required if name not in names]
    if missing:
        raise DataError(
            f"`{file}` must have the columns {', '.join(required)}; it has "
            f"{', '.join(sorted(names)[:10])}; choose other files or rename the columns"
        )
    return counts


def _kept_columns(schema: pa.Schema, required: Sequence[str]) -> list[str]:
    """Name the columns that are read: the required ones, and all scalars."""
    return [field.name for field in schema if field.name in required or _holds_scalars(field.type)]


def _holds_scalars(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(is_kind(kind) for is_kind in _SCALAR_KINDS)


def _unreadable(file: Path, reason: object) -> DataError:
    text = " ".join(str(reason).split())[:200]
    return DataError(f"a sound Parquet file was expected at `{file}`; got: {text}; fetch it again")
