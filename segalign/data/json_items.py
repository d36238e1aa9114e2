"""The objects of a large JSON array by their places: only one of them is in memory."""

import codecs
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from segalign.data.captions import MAX_JSON_BYTES
from segalign.errors import DataError

_CHUNK_BYTES: Final = 1 << 13
_SPACE: Final = " \t\r\n"


class JsonItems:
    """Read ``[{...}, {...}, ...]`` object by object.

    Iterating yields (byte offset, bytes, object) of each, and fills ``digest`` at the end.

    Args:
        path: The file.

    Attributes:
        digest: SHA-256 of the file; empty before the end.

    Raises:
        DataError: While iterating, if the file cannot be read or is no array of objects, or one
            of them is larger than ``MAX_JSON_BYTES``.
    """

    def __init__(self, path: Path) -> None:
        self.digest = ""
        self._path = path

    def __iter__(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        try:
            with self._path.open("rb") as file:
                yield from self._read(_Text(file))
        except OSError as err:
            raise DataError(
                f"a JSON file was expected at `{self._path}`; got: {err.strerror}; check the path"
            ) from err
        except UnicodeDecodeError as err:
            raise self._no_array(f"bytes that are not UTF-8: {err.reason}") from err

    def _read(self, text: "_Text") -> Iterator[tuple[int, int, dict[str, Any]]]:
        if text.next_character() != "[":
            raise self._no_array("another beginning than `[`")
        text.drop(1)
        count = 0
        while (character := text.next_character()) != "]":
            if count:
                if character != ",":
                    raise self._no_array(f"no `,` after object {count}")
                text.drop(1)
                text.next_character()
            item, length = self._parse(text, count)
            offset = text.offset
            yield offset, text.drop(length), item
            count += 1
        text.drop(1)
        if text.next_character():
            raise self._no_array("more after the closing `]`")
        self.digest = text.digest.hexdigest()

    def _parse(self, text: "_Text", count: int) -> tuple[dict[str, Any], int]:
        """Decode the object at the beginning of the text; more is read until it is whole."""
        decoder = json.JSONDecoder()
        while True:
            try:
                item, length = decoder.raw_decode(text.buffer)
            except (ValueError, RecursionError) as err:
                is_over = len(text.buffer) > MAX_JSON_BYTES or not text.read_more()
                if is_over:
                    raise self._no_array(f"object {count + 1} is none or not closed") from err
                continue
            if not isinstance(item, dict):
                raise self._no_array(f"object {count + 1} is {type(item).__name__}")
            return item, length

    def _no_array(self, got: str) -> DataError:
        return DataError(
            f"`{self._path}` must hold a JSON array of objects of at most {MAX_JSON_BYTES} bytes; "
            f"got {got}; mend the file or fetch it again"
        )


class _Text:
    """A window on a UTF-8 file: text that was read and not yet dropped.

    Attributes:
        buffer: The text.
        offset: Byte in the file at which it begins.
        digest: Of all that was read.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.buffer = ""
        self.offset = 0
        self.digest = hashlib.sha256()
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def read_more(self) -> bool:
        """Read on; False at the end of the file."""
        chunk = self._file.read(max(_CHUNK_BYTES, len(self.buffer)))
        self.digest.update(chunk)
        self.buffer += self._decoder.decode(chunk, final=not chunk)
        return bool(chunk)

    def drop(self, length: int) -> int:
        """Drop characters from the beginning and return how many bytes they were."""
        num_bytes = len(self.buffer[:length].encode())
        self.offset += num_bytes
        self.buffer = self.buffer[length:]
        return num_bytes

    def next_character(self) -> str:
        """Drop white space and return what follows; "" at the end of the file."""
        while True:
            self.drop(len(self.buffer) - len(self.buffer.lstrip(_SPACE)))
            if self.buffer or not self.read_more():
                return self.buffer[:1]
