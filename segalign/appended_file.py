"""A file that grows at its end, and is never left with half of what was appended.

Pure standard library.
"""

import os
from pathlib import Path

from segalign.atomic import storage_errors


class AppendedFile:
    """A file to append to; what finds no room waits in memory until there is some.

    Args:
        path: The file; its directory must exist once something is flushed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = bytearray()

    @property
    def num_waiting(self) -> int:
        """How many bytes are not in the file yet."""
        return len(self._waiting)

    def write(self, data: bytes) -> None:
        """Take bytes, which are in the file after the next ``flush``."""
        self._waiting += data

    def flush(self) -> None:
        """Append all that waits, or nothing.

        Raises:
            StorageError: If it cannot be written; it goes on waiting.
        """
        if not self._waiting:
            return
        with (
            storage_errors(self.path, len(self._waiting)),
            # Python's own buffer would try once more when it is closed, and leave half a record.
            self.path.open("ab", buffering=0) as file,
        ):
            size = file.seek(0, os.SEEK_END)
            left = memoryview(bytes(self._waiting))
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise
        self._waiting.clear()
