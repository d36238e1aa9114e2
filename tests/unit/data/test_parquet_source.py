"""Parquet in the layout of the LongAlign data set: whole, faulty, hostile, large, cut off."""

import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import main
from segalign.data import parquet_source
from segalign.data.faults import SampleFault
from segalign.data.manifest import load_manifest
from segalign.data.packing import pack
from segalign.data.parquet_source import ParquetSource, clean_caption
from segalign.data.verify import verify_shards
from segalign.errors import DataError


def write(file, /, rows_per_group=3, **columns):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file, row_group_size=rows_per_group)
    return str(file)


def fields(source, index):
    """Return the JSON member of one sample."""
    return json.loads(dict(source.members(index))["json"])


def fault(source, index) -> str:
    with pytest.raises(SampleFault) as caught:
        source.members(index)
    return caught.value.reason


def numbered(path, count, start=0, **options):
    captions = [f"caption {number}" for number in range(start, start + count)]
    return write(path, caption=captions, path=[f"{c}.png" for c in captions], **options)


def test_rows_of_many_files_and_groups_come_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_source, "_ROWS_PER_BATCH", 2)
    numbered(tmp_path / "b.parquet", 4, start=10, rows_per_group=5)
    numbered(tmp_path / "a.parquet", 10, rows_per_group=3)
    source = ParquetSource(str(tmp_path))
    assert len(source) == 14
    expected = [f"caption {number}" for number in range(14)]
    assert [fields(source, index)["caption"] for index in range(14)] == expected
    # In any order too, if more slowly.
    assert [fields(source, index)["caption"] for index in reversed(range(14))] == expected[::-1]
    assert source.origin(9) == "row 9 of `a.parquet`"
    assert source.origin(12) == "row 2 of `b.parquet`"


def test_a_file_a_folder_and_a_pattern_hold_the_same(tmp_path):
    file = numbered(tmp_path / "deep" / "a.parquet", 2)
    sources = [file, str(tmp_path), str(tmp_path / "*" / "a*")]
    digests = {ParquetSource(source).settings()["content"] for source in sources}
    assert len(digests) == 1
    numbered(tmp_path / "deep" / "b.parquet", 2, start=1)
    assert ParquetSource(str(tmp_path)).settings()["content"] not in digests


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("One.\n\nTwo.", "One. Two."),
        ("One.\r\n \r\n\n  Two.", "One. Two."),
        ("One.\nTwo.", "One.\nTwo."),
        ("\n\nOne.  Two. \n", "One.  Two."),
    ],
)
def test_paragraph_breaks_become_one_blank(tmp_path, caption, expected):
    source = ParquetSource(write(tmp_path / "x.parquet", caption=[caption]))
    assert fields(source, 0)["caption"] == expected


def test_cleaning_is_linear_in_the_caption():
    # A pattern that goes back would need minutes.
    assert clean_caption(" " * 60_000 + "\n" * 60_000 + "x") == " x"
    assert len(clean_caption((" " * 500 + "\n") * 100)) == 1


def test_scalars_are_metadata_and_the_rest_is_left_out(tmp_path):
    file = write(
        tmp_path / "x.parquet",
        caption=pa.array(["a"]).dictionary_encode(),
        path=["p.png"],
        source=pa.array(["sam"]).dictionary_encode(),
        size=pa.array([7], pa.int64()),
        good=[True],
        score=[float("nan")],
        half=pa.array([0.5], pa.float16()),
        unknown=pa.array([None], pa.string()),
        box=[[1, 2]],
        raw=[b"\xff"],
        place=[{"x": 1}],
    )
    assert fields(ParquetSource(file), 0) == {
        "caption": "a", "path": "p.png", "source": "sam", "size": 7, "good": True,
        "score": None, "half": 0.5, "unknown": None,
    }  # fmt: skip


def invalid_utf8(*values: bytes) -> pa.Array:
    return pa.array(values, pa.binary()).view(pa.string())


def test_captions_that_cannot_be_used_are_faults(tmp_path):
    captions = [None, "  ", "a\0b", "x" * 70_000, "good"]
    source = ParquetSource(write(tmp_path / "x.parquet", caption=captions))
    expected = ["caption_missing", "caption_empty", "caption_nul", "caption_too_long"]
    assert [fault(source, index) for index in range(4)] == expected
    assert fields(source, 4)["caption"] == "good"


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (pa.array([7]), "json_invalid"),
        (pa.array([b"bytes"]), "json_invalid"),
        (pa.array([["a", "list"]]), "json_invalid"),
        (invalid_utf8(b"\xff\xfe"), "caption_not_utf8"),
    ],
)
def test_captions_that_are_no_text_are_faults(tmp_path, column, reason):
    assert fault(ParquetSource(write(tmp_path / "x.parquet", caption=column)), 0) == reason


def test_metadata_that_a_shard_cannot_hold_is_a_fault(tmp_path):
    source = ParquetSource(write(tmp_path / "x.parquet", caption=["a"], more=["x" * 2**21]))
    assert fault(source, 0) == "json_invalid"


def test_images_must_lie_below_the_root(tmp_path, plain_image):
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.png").write_bytes(plain_image())
    (tmp_path / "secret.png").write_bytes(plain_image())
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "bad.png").write_bytes(b"no image")
    paths = ["a.png", "../secret.png", str(tmp_path / "secret.png"), "link.png", None, "", "b.png"]
    paths += ["bad.png", "a.tiff"]
    file = write(tmp_path / "x.parquet", caption=["a"] * len(paths), path=paths)
    source = ParquetSource(file, image_root=root)
    members = dict(source.members(0))
    assert members["png"] == plain_image()
    assert json.loads(members["json"]) == {"caption": "a", "path": "a.png"}
    assert [fault(source, index) for index in range(1, len(paths))] == [
        "path_outside_root", "path_outside_root", "path_outside_root", "image_missing",
        "image_missing", "image_missing", "image_unreadable", "image_format",
    ]  # fmt: skip


def test_packs_are_equal_for_any_number_of_processes(tmp_path):
    numbered(tmp_path / "in" / "a.parquet", 25, rows_per_group=7)
    source = ParquetSource(str(tmp_path / "in"))
    for number in (1, 2):
        out = tmp_path / str(number)
        report = pack(source, out, samples_per_shard=4, num_processes=number)
        assert (report.num_packed, report.num_shards) == (25, 7)
        assert verify_shards(out, decode=True).is_sound
    assert load_manifest(tmp_path / "1").digest == load_manifest(tmp_path / "2").digest


def test_a_source_in_use_can_go_to_another_process(tmp_path):
    source = ParquetSource(numbered(tmp_path / "a.parquet", 4))
    source.members(2)
    assert pickle.loads(pickle.dumps(source)).members(3) == source.members(3)


def test_the_command_packs_resumes_and_reports(tmp_path, capsys):
    file = write(tmp_path / "x.parquet", caption=["One.\n\nTwo.", None, "Three."], path=["a"] * 3)
    out = tmp_path / "out"
    argv = ["shards", "pack", "longalign", file, str(out), "--samples-per-shard", "2"]
    assert main.main(argv) == 0
    shown = capsys.readouterr().out
    assert "num packed  2" in shown
    assert "set aside   caption_missing: 1" in shown
    assert "examples    row 1 of `x.parquet` | caption_missing | there is no `caption`" in shown
    assert main.main(argv) == 0
    write(tmp_path / "x.parquet", caption=["Other."] * 3)
    assert main.main(argv) == 65
    assert "holds shards packed with other settings; changed: content;" in capsys.readouterr().err


def cut(path):
    raw = path.read_bytes()
    middle = len(raw) // 3
    path.write_bytes(raw[:middle] + b"\xff" * 64 + raw[middle + 64 :])


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            lambda place: None,
            "a Parquet file, a folder of them or a pattern was expected; `IN` has",
        ),
        (lambda place: place.mkdir(), "a Parquet file, a folder of them or a pattern was expect"),
        (lambda place: place.write_bytes(b"x" * 99), "a sound Parquet file was expected at `IN`;"),
        (lambda place: write(place, text=["a"]), "`IN` must have the columns caption; it has text"),
        (lambda place: write(place, caption=pa.array([], pa.string())), "`IN` must hold rows with"),
        (lambda place: (numbered(place, 999), cut(place)), "a sound Parquet file was expected at "),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, prepare, message):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path / "IN")
    assert main.main(["shards", "pack", "longalign", "IN", "OUT"]) == 65
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.sub(r"\S+/IN", "IN", error).startswith(f"error: {message}")


def test_an_image_root_needs_the_column_of_paths(tmp_path):
    file = write(tmp_path / "x.parquet", caption=["a"])
    with pytest.raises(DataError, match=r"must have the columns caption, path; it has caption"):
        ParquetSource(file, image_root=tmp_path)
    with pytest.raises(DataError, match=r"the image root must be a folder; `.*no` is none"):
        ParquetSource(file, image_root=tmp_path / "no")


# Arrow's own account; the process's peak would include that of its parent.
PEAK = """
import pyarrow, sys
from segalign.data.parquet_source import ParquetSource
source = ParquetSource(sys.argv[1])
total = sum(len(source.members(i)[0][1]) for i in range(len(source)))
print(total, pyarrow.default_memory_pool().max_memory())
"""


def test_memory_does_not_grow_with_the_rows(tmp_path):
    # 48 MB of captions in one row group that does not compress.
    rng = np.random.default_rng(0)
    captions = [rng.bytes(3000).hex() for _ in range(8000)]
    file = write(tmp_path / "x.parquet", rows_per_group=8000, caption=captions)
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, file], capture_output=True, text=True, check=True
    )
    total, peak = map(int, ran.stdout.split())
    assert total > 48e6
    assert peak < 30e6
