"""A source in the layout of the LongAlign data set: Parquet with captions and paths of images.

Rows are streamed: of millions of them only one batch is in memory.
"""

import hashlib
import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from segalign.data.captions import MAX_JSON_BYTES, check_caption
from segalign.data.faults import SampleFault
from segalign.data.jsonl_sources import existing_root, image_below
from segalign.data.sources import ImageCheck, Members, to_json
from segalign.errors import DataError

_ROWS_PER_BATCH: Final = 512
_BUFFER_BYTES: Final = 1 << 20
_PARAGRAPH_BREAK: Final = re.compile(r"\n\s*\n\s*")
_SCALAR_KINDS: Final = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
)


class ParquetSource:
    """Rows with the columns ``caption`` and ``path``; other columns of scalars are metadata.

    Args:
        path: A Parquet file, a folder of them at any depth, or a glob pattern.
        image_root: Folder that every ``path`` is relative to and must stay in; None packs
            captions alone.
        check: How far each image is decoded before it is packed.

    Raises:
        DataError: If there is no such file, one is no Parquet file or lacks a column, or there
            are no rows.
    """

    def __init__(
        self, path: str, *, image_root: Path | None = None, check: ImageCheck = "header"
    ) -> None:
        self._root = None if image_root is None else existing_root(image_root)
        self._check = check
        self._files = _find_files(path)
        self._required = ["caption"] if self._root is None else ["caption", "path"]
        groups: list[tuple[int, int]] = []
        sizes: list[int] = []
        for number, file in enumerate(self._files):
            counts = _count_rows(file, self._required)
            groups += [(number, group) for group in range(len(counts))]
            sizes += counts
        self._groups = groups
        self._ends = list(accumulate(sizes))
        if not len(self):
            raise DataError(f"`{path}` must hold rows with captions; it has none; check the path")
        self._content = _digest(self._files)
        self._rows: _GroupRows | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def settings(self) -> dict[str, Any]:
        """See ``Source``."""
        return {
            "kind": "longalign",
            "check": self._check,
            "images": self._root is not None,
            "content": self._content,
        }

    def origin(self, index: int) -> str:
        """See ``Source``."""
        group = bisect_right(self._ends, index)
        file = self._groups[group][0]
        while group and self._groups[group - 1][0] == file:
            group -= 1
        return f"row {index - self._start(group)} of `{self._files[file].name}`"

    def members(self, index: int) -> Members:
        """See ``Source``; rows in ascending order are read without going back."""
        fields = {name: _to_python(name, value) for name, value in self._row(index).items()}
        fields["caption"] = clean_caption(check_caption(fields["caption"]))
        images = []
        if self._root is not None:
            images = [image_below(self._root, fields["path"], self._check)]
        described = to_json(fields)
        if len(described) > MAX_JSON_BYTES:
            raise SampleFault("json_invalid", f"{len(described)} bytes, at most {MAX_JSON_BYTES}")
        return [*images, ("json", described)]

    def _row(self, index: int) -> dict[str, pa.Scalar]:
        group = bisect_right(self._ends, index)
        place = index - self._start(group)
        rows = self._rows
        if rows is None or rows.group != group or rows.next_row > place:
            file, number = self._groups[group]
            rows = self._rows = _GroupRows(
                self._files[file], number, group=group, required=self._required
            )
        return rows.read(place)

    def _start(self, group: int) -> int:
        return self._ends[group - 1] if group else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}


class _GroupRows:
    """The rows of one row group, in order.

    Args:
        path: The file.
        number: Which of its row groups.
        group: The source's own number of the row group.
        required: Columns that are read whatever their type.

    Attributes:
        group: As above.
        next_row: The first row that can still be read.
    """

    def __init__(self, path: Path, number: int, *, group: int, required: Sequence[str]) -> None:
        self.group = group
        self.next_row = 0
        self._path = path
        self._batches = self._read_batches(number, required)
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

    def _read_batches(self, number: int, required: Sequence[str]) -> Iterator[pa.RecordBatch]:
        try:
            # Without these settings a whole row group's compressed bytes are read at once.
            reading = {"buffer_size": _BUFFER_BYTES, "pre_buffer": False}
            with pq.ParquetFile(self._path, **reading) as file:
                yield from file.iter_batches(
                    _ROWS_PER_BATCH,
                    row_groups=[number],
                    columns=_kept_columns(file.schema_arrow, required),
                    use_threads=False,
                )
        except (pa.ArrowException, OSError) as err:
            raise _unreadable(self._path, err) from err
        raise _unreadable(self._path, f"row group {number} has fewer rows than it says")


def clean_caption(caption: str) -> str:
    """Turn paragraph breaks into one blank.

    The official code deletes them in training captions and so glues the words around them together.
    """
    return " ".join(part.rstrip() for part in _PARAGRAPH_BREAK.split(caption))


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


def _to_python(name: str, scalar: pa.Scalar) -> Any:
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


def _digest(files: Sequence[Path]) -> str:
    """Return the SHA-256 of the contents in order, wherever the files lie."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _unreadable(file: Path, reason: object) -> DataError:
    text = " ".join(str(reason).split())[:200]
    return DataError(f"a sound Parquet file was expected at `{file}`; got: {text}; fetch it again")
