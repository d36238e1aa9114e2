import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import webdataset

from segalign.data.faults import SampleFault
from segalign.data.jsonl_sources import JsonlSource
from segalign.data.manifest import load_manifest
from segalign.data.packing import PLAN_NAME, pack
from segalign.data.sources import FolderSource
from segalign.data.verify import verify_shards
from segalign.errors import DataError, StorageError


@dataclass(frozen=True)
class FakeSource:
    """Captions; every third sample is faulty if it is asked to."""

    count: int
    faulty: tuple[int, ...] = ()
    name: str = "fake"

    def __len__(self) -> int:
        return self.count

    def settings(self):
        return {"kind": self.name}

    def origin(self, index: int) -> str:
        return f"sample {index}"

    def members(self, index: int):
        if index in self.faulty:
            raise SampleFault("caption_empty", "the caption is empty")
        return [("txt", f"caption {index}".encode())]


def contents(folder: Path) -> dict[str, str]:
    """Digests of shards and manifest."""
    names = [*folder.glob("*.tar"), folder / "manifest.jsonl"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def captions(folder: Path) -> list[str]:
    urls = [str(folder / entry.name) for entry in load_manifest(folder).shards]
    return [sample["txt"].decode() for sample in webdataset.WebDataset(urls, shardshuffle=False)]


def test_packed_shards_are_plain_webdataset(tmp_path):
    report = pack(FakeSource(10), tmp_path, samples_per_shard=4)
    assert (report.num_packed, report.num_shards, report.set_aside) == (10, 3, {})
    assert captions(tmp_path) == [f"caption {number}" for number in range(10)]
    assert verify_shards(tmp_path, decode=True).is_sound
    assert not list(tmp_path.glob(".shard*"))


def test_faulty_samples_are_set_aside_and_counted(tmp_path):
    report = pack(FakeSource(10, faulty=(0, 4, 5, 6, 7)), tmp_path, samples_per_shard=4)
    assert report.num_packed == 5
    assert report.set_aside == {"caption_empty": 5}
    assert report.examples[0] == ["sample 0", "caption_empty", "the caption is empty"]
    assert load_manifest(tmp_path).shard_sizes == [3, 2]
    assert captions(tmp_path) == [f"caption {number}" for number in (1, 2, 3, 8, 9)]
    assert json.loads((tmp_path / "pack_report.json").read_text())["num_source"] == 10


def test_bytes_do_not_depend_on_processes(tmp_path, image_folder):
    source = FolderSource(image_folder(tmp_path / "images", 30))
    reports = [
        pack(source, tmp_path / str(number), samples_per_shard=7, num_processes=number)
        for number in (1, 2)
    ]
    assert reports[0] == reports[1]
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_packing_again_changes_nothing(tmp_path):
    first = pack(FakeSource(10), tmp_path, samples_per_shard=4)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    assert pack(FakeSource(10), tmp_path, samples_per_shard=4) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")} == stamps


def test_changed_settings_are_refused(tmp_path):
    pack(FakeSource(10), tmp_path, samples_per_shard=4)
    message = (
        r"^`.*` holds shards packed with other settings; changed: num_source, samples_per_shard; "
        r"choose another folder or delete it$"
    )
    with pytest.raises(DataError, match=message):
        pack(FakeSource(11), tmp_path, samples_per_shard=5)


def test_foreign_shards_are_not_mixed_in(tmp_path):
    (tmp_path / "foreign.tar").touch()
    with pytest.raises(
        DataError, match=r"a folder without shards was expected; `.*` holds others;"
    ):
        pack(FakeSource(1), tmp_path)


def test_nothing_usable(tmp_path):
    message = r"all 2 were set aside, the first \(sample 0\) as caption_empty: the caption is empty"
    with pytest.raises(DataError, match=message):
        pack(FakeSource(2, faulty=(0, 1)), tmp_path)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    message = r"^expected to be able to write `.*`; got: Not a directory\. [^\n]*$"
    with pytest.raises(StorageError, match=message):
        pack(FakeSource(2), tmp_path / "file" / "out")


def test_a_source_that_vanishes_is_named(tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"caption": "a"}\n' * 3)
    source = JsonlSource(lines)
    lines.unlink()
    with pytest.raises(DataError) as caught:
        pack(source, tmp_path / "shards")
    assert str(caught.value) == (
        f"the source must stay readable while it is packed; `{lines}`, line at byte 0: "
        "No such file or directory; restore it and start again"
    )


def test_an_error_in_a_process_reaches_the_caller(tmp_path, image_folder):
    source = FolderSource(image_folder(tmp_path / "images", 4))
    pack(source, tmp_path / "good", samples_per_shard=2)
    out = tmp_path / "out"
    (out / "shard-000001.tar").mkdir(parents=True)
    (out / PLAN_NAME).write_bytes((tmp_path / "good" / PLAN_NAME).read_bytes())
    with pytest.raises(StorageError, match=r"shard-000001.tar`; got: Is a directory"):
        pack(source, out, samples_per_shard=2, num_processes=2)


def test_shards_whose_size_has_changed_are_made_again(tmp_path):
    pack(FakeSource(9), tmp_path / "whole", samples_per_shard=3)
    source = InterruptedSource(9, stop_at=7)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "cut", samples_per_shard=3)
    assert not (tmp_path / "cut" / "manifest.jsonl").exists()
    (tmp_path / "cut" / "shard-000000.tar").write_bytes(b"cut")
    pack(FakeSource(9), tmp_path / "cut", samples_per_shard=3)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@dataclass(frozen=True)
class InterruptedSource(FakeSource):
    stop_at: int = 0

    def members(self, index: int):
        if index == self.stop_at:
            raise KeyboardInterrupt
        return super().members(index)


def test_two_packs_into_one_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("segalign.data.packing.LOCK_SECONDS", 0)
    source = NestedSource(2, folder=str(tmp_path))
    message = "must be packed by one process at a time; another is at work on it; wait for it"
    with pytest.raises(DataError, match=message):
        pack(source, tmp_path)


@dataclass(frozen=True)
class NestedSource(FakeSource):
    """Packs into the same folder while it is being packed."""

    folder: str = ""

    def members(self, index: int):
        pack(FakeSource(2), Path(self.folder))
        return super().members(index)
