import pytest

from segalign.errors import ConfigError, StorageError
from segalign.formats.folders import check_new, new_folder


def test_folder_appears_whole(tmp_path):
    with new_folder(tmp_path / "a" / "b") as unfinished:
        (unfinished / "deep").mkdir()
        (unfinished / "deep" / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "deep" / "file").read_text() == "x"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_failure_leaves_nothing(tmp_path):
    def fail(unfinished):
        (unfinished / "file").touch()
        raise RuntimeError

    with pytest.raises(RuntimeError), new_folder(tmp_path / "a") as unfinished:
        fail(unfinished)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="No space left"), new_folder(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_content_is_never_touched(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "file", tmp_path):
        with pytest.raises(ConfigError, match="has content"):
            check_new(path)
        with pytest.raises(ConfigError, match="has content"), new_folder(path):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]
    with new_folder(tmp_path / "empty") as unfinished:
        (unfinished / "file").touch()
    assert (tmp_path / "empty" / "file").exists()
