"""Long captions of a captioner, joined to samples that have a short prompt."""

import hashlib
import json
from array import array
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from segalign.data.captions import check_caption, parse_json_object
from segalign.data.faults import SampleFault
from segalign.errors import ConfigError, DataError

MissingCaptions = Literal["set_aside", "keep_prompt"]
_HASH_BYTES: Final = 8
_SIDES: Final[tuple[Literal["left", "right"], ...]] = ("left", "right")


class LongCaptions:
    """Captions in a JSONL file, ``{"id": ..., "caption": ...}`` on each line, found by their id.

    Only hashes of the ids and places in the file are in memory: 16 bytes a line.

    Args:
        path: The JSONL file.
        key: Field of a sample whose value is the id; 7 and "7" are the same id.
        missing: What becomes of a sample without a line: it is set aside, or keeps its own prompt.

    Attributes:
        key: As above.

    Raises:
        DataError: If the file cannot be read, is empty, a line has no id, or two have the same.
    """

    def __init__(self, path: Path, *, key: str, missing: MissingCaptions = "set_aside") -> None:
        self.key = key
        self._path = path
        self._missing: MissingCaptions = missing
        self._hashes, self._offsets, self._digest = _index_ids(path)

    def check_key(self, known: Collection[str]) -> None:
        """Refuse a key that no sample has.

        Raises:
            ConfigError: If it is none of the known fields.
        """
        if self.key not in known:
            raise ConfigError(
                f"the caption key must be one of the fields {', '.join(sorted(known))}; "
                f"got `{self.key}`; choose one of them"
            )

    def settings(self) -> dict[str, Any]:
        """Return what a pack depends on; see ``Source``."""
        return {"captions": self._digest, "caption_key": self.key, "missing": self._missing}

    def join(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Put the long caption in the place of the own one, which becomes the field ``prompt``.

        Raises:
            SampleFault: If there is no usable long caption.
        """
        value = fields.get(self.key)
        found = None if value is None else self._find(str(value))
        if found is None and self._missing == "keep_prompt":
            return dict(fields)
        if found is None:
            detail = f"`{self._path.name}` has no caption of `{self.key}` {value!r:.60}"
            raise SampleFault("caption_missing", detail)
        return {
            **fields,
            "caption": check_caption(found.get("caption")),
            "prompt": fields["caption"],
        }

    def _find(self, value: str) -> dict[str, Any] | None:
        """Return the line of an id; ids of one hash are told apart by their text."""
        start, end = (
            int(np.searchsorted(self._hashes, np.uint64(_hash(value)), side=side))
            for side in _SIDES
        )
        for place in range(start, end):
            line = _read_line(self._path, int(self._offsets[place]))
            if str(line["id"]) == value:
                return line
        return None


def _index_ids(path: Path) -> tuple[NDArray[np.uint64], NDArray[np.int64], str]:
    """Return the sorted hashes of the ids, where their lines begin, and the file's digest."""
    digest, hashes, offsets, offset = hashlib.sha256(), array("Q"), array("q"), 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    hashes.append(_hash(_parse_id(path, number, line)))
                    offsets.append(offset)
                offset += len(line)
                digest.update(line)
    except OSError as err:
        raise DataError(
            f"a JSONL file of long captions was expected at `{path}`; got: {err.strerror}; "
            f"check the path"
        ) from err
    if not hashes:
        raise DataError(f'`{path}` must hold {{"id": ..., "caption": ...}} lines; it is empty')
    unsorted = np.frombuffer(hashes, dtype=np.uint64)
    order = np.argsort(unsorted, kind="stable")
    places = np.frombuffer(offsets, dtype=np.int64)[order]
    _refuse_twice(path, unsorted[order], places)
    return unsorted[order], places, digest.hexdigest()


def _refuse_twice(path: Path, hashes: NDArray[np.uint64], offsets: NDArray[np.int64]) -> None:
    for place in np.flatnonzero(hashes[1:] == hashes[:-1]):
        first, second = (_read_line(path, int(offsets[i]))["id"] for i in (place, place + 1))
        if str(first) == str(second):
            raise DataError(
                f"every id of `{path}` must have one caption; got two for {first!r:.60}; "
                f"remove one of the lines"
            )


def _parse_id(path: Path, number: int, line: bytes) -> str:
    try:
        fields = parse_json_object(line)
    except SampleFault as fault:
        raise _bad_line(path, number, fault.detail) from fault
    value = fields.get("id")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _bad_line(path, number, f"an id of {json.dumps(value):.60}")
    return str(value)


def _bad_line(path: Path, number: int, got: str) -> DataError:
    return DataError(
        f'every line of `{path}` must be {{"id": text or integer, "caption": text}}; '
        f"line {number} is not: {got}; mend or remove it"
    )


def _read_line(path: Path, offset: int) -> dict[str, Any]:
    with path.open("rb") as file:
        file.seek(offset)
        return parse_json_object(file.readline())


def _hash(value: str) -> int:
    packed = value.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(packed, digest_size=_HASH_BYTES).digest(), "little")
