"""A file that grows at its end, and is never left with half of what was appended.

Pure standard library.
"""

import contextlib
import os
from pathlib import Path

from segalign.atomic import storage_errors, sync_directory, sync_file


class AppendedFile:
    """A file to append to; what finds no room waits in memory until there is some.

    Args:
        path: The file; its directory must exist once something is flushed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = bytearray()
        self._size_to_restore: int | None = None
        self._is_named = False

    @property
    def num_waiting(self) -> int:
        """How many bytes are not in the file yet."""
        return len(self._waiting)

    def write(self, data: bytes) -> None:
        """Take bytes, which are in the file after the next ``flush``."""
        self._waiting += data

    def flush(self, *, sync: bool = False) -> None:
        """Append all that waits, or nothing.

        Args:
            sync: Force the file to disk too, so that it survives a power cut.

        Raises:
            StorageError: If it cannot be written; it goes on waiting.
        """
        with storage_errors(self.path, len(self._waiting)):
            self.restore()
            if self._waiting:
                self._append(bytes(self._waiting), sync)
                self._waiting.clear()
            elif sync and self.path.exists():
                sync_file(self.path)
            if sync and not self._is_named and self.path.exists():
                sync_directory(self.path.parent)
                self._is_named = True

    def restore(self) -> None:
        """Cut off what a failed ``flush`` may have left, if it could not do so itself.

        Raises:
            OSError: If that cannot be done now either.
        """
        if self._size_to_restore is not None:
            # It may have been replaced by a whole file since then, or never been made.
            if self.path.exists() and self.path.stat().st_size > self._size_to_restore:
                os.truncate(self.path, self._size_to_restore)
            self._size_to_restore = None

    def forget(self) -> None:
        """Drop what waits, which the caller keeps himself."""
        self._waiting.clear()

    def _append(self, data: bytes, sync: bool) -> None:
        left = memoryview(data)
        try:
            # Python's own buffer would try once more when it is closed, and leave half a record.
            with self.path.open("ab", buffering=0) as file:
                self._size_to_restore = file.seek(0, os.SEEK_END)
                while left:
                    left = left[file.write(left) :]
                if sync:
                    os.fsync(file.fileno())
            # Network file systems may tell only here, when the file is closed.
        except OSError:
            with contextlib.suppress(OSError):
                self.restore()
            raise
        self._size_to_restore = None
