import errno
import io
import os
from pathlib import Path

import pytest

from segalign.appended_file import AppendedFile
from segalign.atomic import sync_directory
from segalign.errors import FullDiskError


class FullWhenClosed(io.FileIO):
    """A file of a network file system, which tells only at the end that it found no room."""

    def close(self):
        was_closed = self.closed
        super().close()
        if not was_closed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def file(tmp_path):
    file = AppendedFile(tmp_path / "rows.txt")
    file.write(b"row 1\n")
    file.flush(sync=True)
    file.write(b"row 2\n")
    return file


@pytest.mark.parametrize("may_truncate", [True, False])
def test_no_row_is_doubled_that_finds_no_room_at_the_end(file, monkeypatch, may_truncate):
    with monkeypatch.context() as full:
        full.setattr(Path, "open", lambda path, mode, buffering: FullWhenClosed(path, mode))
        if not may_truncate:
            full.setattr(os, "truncate", fail)
        with pytest.raises(FullDiskError, match=r"rows\.txt"):
            file.flush()
    if may_truncate:
        assert file.path.read_bytes() == b"row 1\n"
    file.flush()
    assert file.path.read_bytes() == b"row 1\nrow 2\n"


def test_a_row_that_cannot_be_forced_to_disk_waits(file, monkeypatch):
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fail)
        with pytest.raises(FullDiskError):
            file.flush(sync=True)
    assert file.path.read_bytes() == b"row 1\n"
    file.flush()
    assert file.path.read_bytes() == b"row 1\nrow 2\n"


@pytest.mark.parametrize("code", ["EINVAL", "EBADF", "ENOTSUP", "ENOSYS", "EIO"])
def test_a_directory_that_cannot_be_forced_to_disk_is_no_failure(tmp_path, monkeypatch, code):
    def refuse(_):
        raise OSError(getattr(errno, code), "refused")

    monkeypatch.setattr(os, "fsync", refuse)
    if code != "EIO":
        sync_directory(tmp_path)
        return
    with pytest.raises(OSError, match="refused"):
        sync_directory(tmp_path)
