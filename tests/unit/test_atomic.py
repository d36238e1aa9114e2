import errno
import os
import tempfile
from pathlib import Path

import pytest

from segalign.atomic import (
    make_directory,
    move_directory_into_place,
    recover_directory,
    remove_directory,
    temporary_sibling,
    write_text_atomic,
)
from segalign.errors import StorageError


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_text_is_written_and_replaced(tmp_path):
    target = tmp_path / "a.txt"
    write_text_atomic(target, "eins")
    write_text_atomic(target, "zwei ü")
    assert target.read_text(encoding="utf-8") == "zwei ü"
    assert names(tmp_path) == ["a.txt"]


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "a.txt"
    write_text_atomic(target, "old")

    def fail(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=r"a\.txt`; got: No space left on device"):
        write_text_atomic(target, "new")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_missing_parent_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="No such file"):
        write_text_atomic(tmp_path / "nowhere" / "a.txt", "text")


def test_directory_that_is_a_file_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="expected to be able to write"):
        make_directory(tmp_path / "file")


def test_made_directory_holds_no_probe_even_if_a_kill_falls_into_the_check(tmp_path, monkeypatch):
    seen = []
    open_file = tempfile.TemporaryFile

    def look(**options):
        file = open_file(**options)
        seen.append(names(tmp_path / "a"))
        return file

    monkeypatch.setattr(tempfile, "TemporaryFile", look)
    make_directory(tmp_path / "a")
    assert seen == [[]]
    assert names(tmp_path / "a") == []


def make_version(parent: Path, text: str) -> Path:
    temporary = temporary_sibling(parent / "target")
    temporary.mkdir()
    (temporary / "content").write_text(text)
    return temporary


def test_directory_replaces_an_older_one(tmp_path):
    move_directory_into_place(make_version(tmp_path, "old"), tmp_path / "target")
    move_directory_into_place(make_version(tmp_path, "new"), tmp_path / "target")
    assert (tmp_path / "target" / "content").read_text() == "new"
    assert names(tmp_path) == ["target"]


def test_old_directory_comes_back_after_a_kill_between_the_renames(tmp_path, monkeypatch):
    target = tmp_path / "target"
    move_directory_into_place(make_version(tmp_path, "old"), target)
    renames = []
    rename = Path.rename

    def die_at_the_second(self, other):
        renames.append(other)
        if len(renames) == 2:
            raise KeyboardInterrupt
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        move_directory_into_place(make_version(tmp_path, "new"), target)
    monkeypatch.undo()
    assert not target.exists()
    removed = recover_directory(tmp_path)
    assert (target / "content").read_text() == "old"
    assert len(removed) == 1
    assert names(tmp_path) == ["target"]


def test_recovery_removes_a_replaced_directory_whose_successor_arrived(tmp_path):
    move_directory_into_place(make_version(tmp_path, "new"), tmp_path / "target")
    stale = temporary_sibling(tmp_path / "target", ".replaced-")
    stale.mkdir()
    assert recover_directory(tmp_path) == [stale]
    assert names(tmp_path) == ["target"]


def test_removed_directory_is_gone(tmp_path):
    move_directory_into_place(make_version(tmp_path, "x"), tmp_path / "target")
    remove_directory(tmp_path / "target")
    assert names(tmp_path) == []
