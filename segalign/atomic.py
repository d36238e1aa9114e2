"""Writing that a kill or a full disk cannot leave half done.

A new file or directory is written under a temporary name beside its target, forced to disk, and
only then renamed. Pure standard library.
"""

import contextlib
import errno
import glob
import os
import resource
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from segalign.errors import FullDiskError, StorageError

TEMPORARY_MARK = ".tmp-"
REPLACED_MARK = ".replaced-"
# Errors for want of room: on the disk, of the user's share of it, under a limit of file sizes.
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_SYNC = frozenset({errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS})
_MAX_TRIES = 5


@contextlib.contextmanager
def storage_errors(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Turn an ``OSError`` inside the block into a one-line ``StorageError`` that names the path.

    Args:
        path: What is written.
        num_bytes: How large it is, if that is known; a line about a full disk says so.

    Raises:
        FullDiskError: If there is no room for it.
        StorageError: If it cannot be written for another reason.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        is_full = error.errno in _NO_ROOM
        kind = FullDiskError if is_full else StorageError
        room = _describe_room(path, num_bytes, error.errno) if is_full else ""
        raise kind(
            f"expected to be able to write `{path}`; got: {reason}{room}. "
            "Free some space, fix its permissions, or choose another place."
        ) from error


def _describe_room(path: Path, num_bytes: int | None, code: int | None) -> str:
    """Say how many bytes are wanted and how many there are, as far as both are known."""
    known = [] if num_bytes is None else [f"{num_bytes:,} bytes are needed"]
    with contextlib.suppress(OSError, StopIteration):
        place = next(parent for parent in path.absolute().parents if parent.is_dir())
        known.append(f"{shutil.disk_usage(place).free:,} bytes are free there")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if code == errno.EFBIG and limit != resource.RLIM_INFINITY:
        known.append(f"a file may have at most {limit:,} bytes")
    return f" ({', '.join(known)})" if known else ""


def make_directory(path: Path, num_bytes: int | None = None) -> None:
    """Create a directory and its parents if they are missing, and check that it can be written.

    Args:
        path: The directory.
        num_bytes: How much is to be written into it, if that is known, for the error's line.

    Raises:
        StorageError: If the directory cannot be created or written.
    """
    with storage_errors(path, num_bytes):
        new = [each for each in (path, *path.parents) if not each.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for each in new:
            # What lies in a directory is lost in a power cut if its own name is not on disk.
            with contextlib.suppress(PermissionError):
                sync_directory(each.parent)
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
    """Force a directory's entries to disk, so that a rename in it survives a power cut.

    Some network file systems cannot do that to a directory, which is no failure of the writing.
    """
    try:
        sync_file(path)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


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
    with storage_errors(path, len(data)):
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


def remove_temporaries(path: Path) -> None:
    """Remove what killed writers of this one file have left beside it; none may be at work."""
    with storage_errors(path):
        for stale in path.parent.glob(f".{glob.escape(path.name)}{TEMPORARY_MARK}*"):
            stale.unlink()


def move_directory_into_place(temporary: Path, target: Path) -> None:
    """Rename a finished directory to its target; an existing target stays until then.

    Were the process killed between the two renames that replace a target, ``bring_back`` gives the
    old one its name again, which a reader may do at any time.

    Raises:
        OSError: If that cannot be done; both are then where they were.
    """
    replaced = _take_place(temporary, target)
    try:
        sync_directory(target.parent)
    except OSError:
        with contextlib.suppress(OSError):
            target.rename(temporary)
            if replaced is not None:
                replaced.rename(target)
        raise
    if replaced is not None:
        # Under a name that is never brought back, because it is soon half deleted.
        doomed = temporary_sibling(target)
        with contextlib.suppress(OSError):
            replaced.rename(doomed)
        for left in (doomed, replaced):
            shutil.rmtree(left, ignore_errors=True)


def _take_place(temporary: Path, target: Path) -> Path | None:
    """Rename a directory to its target; return where an earlier one is now, if there was one."""
    for is_last in [False] * (_MAX_TRIES - 1) + [True]:
        replaced = temporary_sibling(target, REPLACED_MARK) if target.exists() else None
        try:
            if replaced is not None:
                target.rename(replaced)
            temporary.rename(target)
        except OSError as error:
            if replaced is not None:
                with contextlib.suppress(OSError):
                    replaced.rename(target)
            # Between the two renames, a reader may have brought the old one back.
            is_taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
            if is_last or not is_taken:
                raise
        else:
            return replaced
    raise AssertionError("the last try either returns or raises")


def remove_directory(path: Path) -> None:
    """Delete a directory so that it is never seen half deleted under its own name.

    What cannot be deleted, such as a file that another machine holds open, stays under a temporary
    name, which ``recover_directory`` clears away.

    Raises:
        StorageError: If it cannot even be renamed.
    """
    with storage_errors(path):
        doomed = temporary_sibling(path)
        path.rename(doomed)
        sync_directory(path.parent)
        shutil.rmtree(doomed, ignore_errors=True)


def bring_back(parent: Path) -> None:
    """Give targets their names back whose replacement was cut off between its two renames.

    It may be called by who only reads, while a writer is at work or without the permission to
    rename. Of several, the one that was written last returns.
    """
    with contextlib.suppress(OSError):
        aside = [(path.stat().st_mtime_ns, path) for path in parent.glob(f".*{REPLACED_MARK}*")]
        for _, stale in sorted(aside, reverse=True):
            if not _replaced_target(stale).exists():
                stale.rename(_replaced_target(stale))


def _replaced_target(stale: Path) -> Path:
    return stale.with_name(stale.name[1:].partition(REPLACED_MARK)[0])


def recover_directory(parent: Path) -> list[Path]:
    """Remove what killed writers left in a directory, bringing back a target that lost its name.

    Args:
        parent: The directory that holds the targets. No writer may be at work in it.

    Returns:
        The stale paths that were removed.
    """
    with storage_errors(parent):
        bring_back(parent)
        replaced = sorted(parent.glob(f".*{REPLACED_MARK}*"))
        removed = [stale for stale in replaced if _replaced_target(stale).exists()]
        removed += sorted(set(parent.glob(f".*{TEMPORARY_MARK}*")) - set(replaced))
        for stale in removed:
            if stale.is_dir():
                # Another machine may still hold a file of it open; it harms nobody.
                shutil.rmtree(stale, ignore_errors=True)
            else:
                stale.unlink()
    return removed
