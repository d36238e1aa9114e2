"""Parquet in the layout of Pick-a-Pic: labels, images, long captions, memory."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from packed_source import faults, fields

import main
from datamodules.long_caption import LongCaptionDataModule
from segalign.data.faults import SampleFault
from segalign.data.long_captions import LongCaptions
from segalign.data.manifest import load_manifest
from segalign.data.packing import pack
from segalign.data.pickapic_source import PickapicSource
from segalign.data.verify import verify_shards
from segalign.errors import ConfigError, DataError


@pytest.fixture
def rows(tmp_path, plain_image):
    """Write rows in the data set's own columns; what is not given is sound."""

    def write(count=1, name="x.parquet", **columns):
        red, blue = plain_image((255, 0, 0)), plain_image((0, 0, 255), kind="JPEG")
        table = {
            "are_different": [True] * count,
            "best_image_uid": [f"u{i}" for i in range(count)],
            "caption": [f"a prompt {i}" for i in range(count)],
            "created_at": pa.array([0] * count, pa.timestamp("ns")),
            "has_label": [True] * count,
            "image_0_uid": [f"u{i}" for i in range(count)],
            "image_1_uid": [f"v{i}" for i in range(count)],
            "jpg_0": pa.array([red] * count, pa.binary()),
            "jpg_1": pa.array([blue] * count, pa.binary()),
            "label_0": [1.0] * count,
            "label_1": [0.0] * count,
            "model_0": ["m"] * count,
            "ranking_id": list(range(count)),
            "num_example_per_prompt": [2] * count,
            **columns,
        }
        table = {key: value for key, value in table.items() if value is not None}
        pq.write_table(pa.table(table), tmp_path / name, row_group_size=3)
        return str(tmp_path / name)

    return write


def test_a_row_is_two_images_a_caption_and_a_preference(rows, plain_image):
    source = PickapicSource(rows(label_0=[0.0], label_1=[1.0]))
    members = source.members(0)
    assert members[0] == ("0.png", plain_image((255, 0, 0)))
    assert members[1] == ("1.jpg", plain_image((0, 0, 255), kind="JPEG"))
    assert fields(source, 0) == {
        "are_different": True, "best_image_uid": "u0", "caption": "a prompt 0", "has_label": True,
        "image_0_uid": "u0", "image_1_uid": "v0", "label_0": 0.0, "label_1": 1.0, "model_0": "m",
        "ranking_id": 0, "num_example_per_prompt": 2, "preference_probs": [0.0, 1.0],
    }  # fmt: skip


def test_images_of_the_image_feature_are_read_too(rows, plain_image):
    column = pa.array([{"bytes": plain_image(), "path": None}])
    assert PickapicSource(rows(jpg_0=column)).members(0)[0] == ("0.png", plain_image())


def test_ties_are_kept_or_set_aside(rows):
    file = rows(2, label_0=[0.5, 1.0], label_1=[0.5, 0.0], has_label=[False, True])
    assert fields(PickapicSource(file), 0)["preference_probs"] == [0.5, 0.5]
    source = PickapicSource(file, ties="set_aside")
    with pytest.raises(SampleFault, match="preference_tie: neither image is preferred"):
        source.members(0)
    assert fields(source, 1)["preference_probs"] == [1.0, 0.0]


def test_labels_that_cannot_be_used_are_faults(rows):
    nan = float("nan")
    first = pa.array([None, nan, 1.0, 1.0, -1.0, 0.4])
    second = pa.array([1.0, 0.0, None, 1.0, 2.0, 0.4])
    assert faults(PickapicSource(rows(6, label_0=first, label_1=second))) == [
        *["preference_missing"] * 3,
        *["preference_invalid"] * 3,
    ]
    assert faults(PickapicSource(rows(label_0=["yes"]))) == ["preference_invalid"]


def test_images_that_cannot_be_used_are_faults(rows, plain_image):
    column = pa.array([None, b"", b"no image", plain_image(size=(64, 64))[:-30]])
    source = PickapicSource(rows(4, jpg_1=column), check="full")
    assert faults(source) == ["image_missing"] * 2 + ["image_unreadable"] * 2
    assert faults(PickapicSource(rows(jpg_1=["text"]))) == ["image_unreadable"]


def test_captions_that_cannot_be_used_are_faults(rows):
    captions = [None, " ", "...", "a\0b"]
    expected = ["caption_missing", "caption_empty", "caption_empty", "caption_nul"]
    assert faults(PickapicSource(rows(4, caption=captions))) == expected


def test_long_captions_are_joined_by_any_column(rows, tmp_path):
    file = rows(3, caption=["a", None, "c"])
    lines = [{"id": "u1", "caption": "Long one."}, {"id": "u2", "caption": "Long two."}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    captions = LongCaptions(tmp_path / "c.jsonl", key="best_image_uid")
    source = PickapicSource(file, captions=captions)
    with pytest.raises(SampleFault, match=r"no caption of `best_image_uid` 'u0'"):
        source.members(0)
    assert [fields(source, index)["caption"] for index in (1, 2)] == ["Long one.", "Long two."]
    assert [fields(source, index)["prompt"] for index in (1, 2)] == [None, "c"]
    with pytest.raises(ConfigError, match=r"the caption key must be one of the fields .*; got `jp"):
        PickapicSource(file, captions=LongCaptions(tmp_path / "c.jsonl", key="jpg_0"))


def test_settings_change_with_the_files_and_the_choices(rows, tmp_path):
    file = rows()
    before = PickapicSource(file).settings()
    assert PickapicSource(file).settings() == before
    assert PickapicSource(file, ties="set_aside").settings() != before
    os.utime(file, ns=(1, 1))
    assert PickapicSource(file).settings() != before


@pytest.mark.parametrize("column", ["jpg_0", "label_1", "caption"])
def test_a_column_that_is_missing(rows, column):
    with pytest.raises(DataError, match=rf"must have the columns .*{column}.*; it has "):
        PickapicSource(rows(**{column: None}))


def test_the_command_packs_what_training_reads(rows, tmp_path, capsys):
    labels = pa.array([1.0, 0.5, 0.0, None, 1.0])
    others = pa.array([0.0, 0.5, 1.0, None, 0.0])
    file = rows(5, label_0=labels, label_1=others, caption=["a", "b", "c", "d", ""])
    out = tmp_path / "out"
    assert main.main(["shards", "pack", "pickapic", file, str(out), "--check", "full"]) == 0
    shown = re.sub(" +", " ", capsys.readouterr().out)
    assert "num packed 3\n" in shown
    assert "set aside caption_empty: 1\n preference_missing: 1\n" in shown
    assert "preferences pairs: 3\n ties: 1\n" in shown
    assert "warning" not in shown
    assert verify_shards(out, decode=True).is_sound

    urls = [str(out / shard.name) for shard in load_manifest(out).shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["json"]["preference_probs"] for sample in samples] == [
        [1, 0],
        [0.5, 0.5],
        [0, 1],
    ]
    assert (samples[0]["0.png"] == [255, 0, 0]).all()
    assert samples[0]["1.jpg"].shape == (8, 8, 3)

    data = LongCaptionDataModule(
        train_shards=str(out), val_shards=str(out), content="preference", global_batch_size=3
    )
    data.setup("fit")
    (batch,) = list(data.val_dataloader())
    assert batch["captions"] == ["a", "b", "c"]
    assert batch["preference_probs"].tolist() == [[1, 0], [0.5, 0.5], [0, 1]]
    assert batch["image_pairs"].shape == (3, 2, 3, 8, 8)
    assert batch["image_pairs"][:, 0, 0].min() == 1
    assert batch["metadata"][2]["num_example_per_prompt"] == 2


def test_a_pack_of_ties_alone_is_warned_of_and_not_trained_on(rows, tmp_path, capsys):
    file = rows(2, label_0=[0.5, 0.5], label_1=[0.5, 0.5])
    out = str(tmp_path / "out")
    for _ in range(2):  # Packed, then found packed.
        assert main.main(["shards", "pack", "pickapic", file, out]) == 0
        shown = capsys.readouterr().out.splitlines()
        assert re.sub(" +", " ", shown[-1]) == (
            "warning all pairs are ties, from which pairwise losses learn nothing"
        )
    data = LongCaptionDataModule(train_shards=out, val_shards=out, content="preference")
    with pytest.raises(DataError, match=r"^preference pairs must .*; all 2 of `.*` are ties, from"):
        data.setup("fit")
    data.setup("validate")


def test_packs_are_equal_for_any_number_of_processes(rows, tmp_path):
    source = PickapicSource(rows(20))
    for number in (1, 2):
        out = tmp_path / str(number)
        report = pack(source, out, samples_per_shard=6, num_processes=number)
        assert (report.num_packed, report.preferences) == (20, {"pairs": 20, "ties": 0})
    assert load_manifest(tmp_path / "1").digest == load_manifest(tmp_path / "2").digest


# Arrow's own account; the process's peak would include that of its parent.
PEAK = """
import pyarrow, sys
from segalign.data.pickapic_source import PickapicSource
source = PickapicSource(sys.argv[1], check="none")
total = sum(len(raw) for i in range(len(source)) for _, raw in source.members(i))
print(total, pyarrow.default_memory_pool().max_memory())
"""


def test_memory_does_not_grow_with_the_rows(rows, tmp_path):
    # 60 MB of images in one row group that does not compress.
    rng = np.random.default_rng(0)
    images = [rng.bytes(100_000) for _ in range(300)]
    file = rows(300, jpg_0=images, jpg_1=images)
    table = pq.read_table(file)
    pq.write_table(table, file, row_group_size=300)
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, file], capture_output=True, text=True, check=True
    )
    total, peak = map(int, ran.stdout.split())
    assert total > 60e6
    assert peak < 20e6
