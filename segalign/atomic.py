"""Writing that a kill or a full disk cannot leave half done.

A new file or directory is written under a temporary name beside its target, forced to disk, and
only then renamed. Pure standard library.
"""

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from segalign.errors import StorageError

TEMPORARY_MARK = ".tmp-"
REPLACED_MARK = ".replaced-"


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` inside the block into a one-line ``StorageError`` that names the path."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"expected to be able to write `{path}`; got: {reason}. "
            "Free some space, fix its permissions, or choose another place."
        ) from error


def make_directory(path: Path) -> None:
    """Create a directory and its parents if they are missing, and check that it can be written.

    Raises:
        StorageError: If the directory cannot be created or written.
    """
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        # The file has no name where the system allows it, so that a kill here leaves nothing.
        with tempfile.TemporaryFile(dir=path):
            pass


def temporary_sibling(path: Path, mark: str = TEMPORARY_MARK) -> Path:
    """Name an unused hidden path in the same directory, from which ``path`` can be renamed into."""
    return path.with_name(f".{path.name}{mark}{uuid.uuid4().hex[:12]}")


def sync_file(path: Path) -> None:
    """Force a written file to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Force a directory's entries to disk, so that a rename in it survives a power cut."""
    sync_file(path)


def usual_mode(directory: Path) -> int:
    """Return the permissions that new files get in a directory, as the user's umask has them.

    Some writers make files that only their owner can read, whatever the umask.
    """
    probe = temporary_sibling(directory / "mode")
    try:
        with probe.open("xb") as file:
            return os.fstat(file.fileno()).st_mode & 0o777
    finally:
        probe.unlink(missing_ok=True)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write a whole file or leave the old one untouched.

    Raises:
        StorageError: If the file cannot be written; nothing temporary is left behind.
    """
    temporary = temporary_sibling(path)
    with storage_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_directory(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text_atomic(path: Path, text: str) -> None:
    """Write a whole UTF-8 text file or leave the old one untouched.

    Raises:
        StorageError: If the file cannot be written; nothing temporary is left behind.
    """
    write_bytes_atomic(path, text.encode())


def move_directory_into_place(temporary: Path, target: Path) -> None:
    """Rename a finished directory to its target; an existing target stays until then.

    Were the process killed between the two renames, ``recover_directory`` brings the old one back.
    """
    replaced = None
    if target.exists():
        replaced = temporary_sibling(target, REPLACED_MARK)
        target.rename(replaced)
    temporary.rename(target)
    sync_directory(target.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


def remove_directory(path: Path) -> None:
    """Delete a directory so that it is never seen half deleted under its own name."""
    with storage_errors(path):
        doomed = temporary_sibling(path)
        path.rename(doomed)
        shutil.rmtree(doomed)


def recover_directory(parent: Path) -> list[Path]:
    """Remove what killed writers left in a directory, bringing back a target that lost its name.

    Args:
        parent: The directory that holds the targets. No writer may be at work in it.

    Returns:
        The stale paths that were removed.
    """
    removed = []
    with storage_errors(parent):
        for stale in sorted(parent.glob(f".*{REPLACED_MARK}*")):
            target = stale.with_name(stale.name[1:].partition(REPLACED_MARK)[0])
            if not target.exists():
                stale.rename(target)
                continue
            removed.append(stale)
        removed += sorted(parent.glob(f".*{TEMPORARY_MARK}*"))
        for stale in removed:
            if stale.is_dir():
                shutil.rmtree(stale)
            else:
                stale.unlink()
    return removed
