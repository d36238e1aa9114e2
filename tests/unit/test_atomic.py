import errno
import os
import re
import tempfile
from pathlib import Path

import pytest

from segalign import atomic
from segalign.atomic import (
    bring_back,
    make_directory,
    move_directory_into_place,
    recover_directory,
    remove_directory,
    remove_temporaries,
    storage_errors,
    temporary_sibling,
    write_text_atomic,
)
from segalign.errors import FullDiskError, StorageError


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


def test_the_names_of_new_directories_are_forced_to_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(atomic, "sync_directory", synced.append)
    make_directory(tmp_path / "a" / "b")
    assert synced == [tmp_path / "a", tmp_path]
    make_directory(tmp_path / "a" / "b")
    assert len(synced) == 2


def test_a_full_disk_is_told_with_bytes(tmp_path):
    with (
        pytest.raises(FullDiskError) as caught,
        storage_errors(tmp_path / "new" / "file", 1234567),
    ):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    said = r"/new/file`; got: Disk quota exceeded \(1,234,567 bytes are needed, [\d,]+ bytes are "
    assert re.search(said + r"free there\)\. Free some space", str(caught.value))
    with (
        pytest.raises(StorageError, match=r"got: Permission denied\. Free") as refused,
        storage_errors(tmp_path, 1),
    ):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    assert not isinstance(refused.value, FullDiskError)


def test_a_reader_may_bring_the_old_one_back_while_it_is_replaced(tmp_path, monkeypatch):
    target = tmp_path / "target"
    move_directory_into_place(make_version(tmp_path, "old"), target)
    rename = Path.rename
    seen = []

    def rename_and_read(self, other):
        if ".replaced-" not in self.name and other == target and not seen:
            seen.append(target.exists())
            bring_back(tmp_path)
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", rename_and_read)
    move_directory_into_place(make_version(tmp_path, "new"), target)
    assert seen == [False]
    assert (target / "content").read_text() == "new"
    assert names(tmp_path) == ["target"]


def test_a_failed_replacement_is_undone(tmp_path, monkeypatch):
    target = tmp_path / "target"
    move_directory_into_place(make_version(tmp_path, "old"), target)
    temporary = make_version(tmp_path, "new")

    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(atomic, "sync_directory", fail)
    with pytest.raises(OSError, match="Input/output"):
        move_directory_into_place(temporary, target)
    assert (target / "content").read_text() == "old"
    assert names(tmp_path) == [temporary.name, "target"]


def test_what_cannot_be_brought_back_is_not_removed(tmp_path, monkeypatch):
    stale = temporary_sibling(tmp_path / "target", ".replaced-")
    stale.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", lambda self, other: (self / "none").stat())
        assert recover_directory(tmp_path) == []
    assert names(tmp_path) == [stale.name]
    assert recover_directory(tmp_path) == []
    assert names(tmp_path) == ["target"]


def test_only_the_leftovers_of_one_file_are_removed(tmp_path):
    for name in (".a.txt.tmp-1", ".a.txt.tmp-2", ".b.txt.tmp-1", "a.txt"):
        (tmp_path / name).write_text("")
    remove_temporaries(tmp_path / "a.txt")
    assert names(tmp_path) == [".b.txt.tmp-1", "a.txt"]
