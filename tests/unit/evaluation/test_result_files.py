"""All files of a result, made from metrics of toy images."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from toy_alignment import alignment_setting, brightness, measure, toy_clip_reward, toy_pixels

from segalign.errors import StorageError
from segalign.evaluation import result_files
from segalign.evaluation.captions import captions_digest
from segalign.evaluation.image_metric import Findings
from segalign.evaluation.kept_images import KeptImages
from segalign.evaluation.result import EvaluationResult
from segalign.evaluation.result_files import image_lines, make_result, write_result
from segalign.evaluation.result_folder import image_files
from segalign.evaluation.result_plots import draw_lengths, draw_segments, to_png
from segalign.metrics.alignment import Alignment


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    setting = alignment_setting(7)
    kept = KeptImages(2)
    findings = {
        "alignment": measure(
            Alignment({"dense": toy_clip_reward(), "bright": brightness}), setting, lost={3}
        ),
        "kept_images": measure(kept, setting, lost={3}),
        "broken": Findings({"broken": math.nan}, {}, {"broken": [math.nan] * 14}),
    }
    result = make_result(setting, findings, {"name": "toy"}, num_counted=13, seconds=2.0)
    folder = tmp_path_factory.mktemp("result") / "new"
    paths = write_result(folder, result, setting.rows, findings, kept.images)
    return setting, findings, result, folder, paths


def test_the_result_says_what_was_evaluated(written):
    setting, findings, result, folder, _ = written
    found = EvaluationResult.load(folder / "result.json")
    assert found.to_json() == result.to_json()
    assert found.prompts == captions_digest(setting.rows)
    assert (found.num_captions, found.images_per_caption, found.batch_size) == (7, 2, 4)
    assert (found.eval_seed, found.weights, found.num_counted) == (3, "raw", 13)
    assert {*found.metrics} == {"alignment", "broken"}
    assert found.metrics["alignment"].values == findings["alignment"].values
    assert {"python", "torch", "diffusers"} <= {*found.versions}
    assert found.created.endswith("+00:00")


def test_every_image_has_a_line(written):
    setting, findings, _, folder, _ = written
    lines = (folder / "images.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]
    assert [(one["place"], one["sample_id"], one["image"]) for one in records] == [
        (place, 100 + place // 2, place % 2) for place in range(14)
    ]
    assert records[4]["caption"] == setting.rows[2]["caption"]
    per_image = findings["alignment"].per_image
    assert [one["reward/dense"] for one in records] == list(per_image["reward/dense"])
    assert records[3]["segment_scores/dense"] is None
    assert records[0]["broken"] is None


def test_row_plots_and_page_are_there(written):
    _, findings, _, folder, paths = written
    assert [path.name for path in paths] == [
        "result.md", "images.jsonl", "result.html", "by_length.png", "by_segment.png",
        "images", "result.json",
    ]  # fmt: skip
    assert sorted(folder.iterdir()) == sorted(paths)
    assert "| toy | 13 |" in (folder / "result.md").read_text()
    assert Image.open(folder / "by_length.png").size[0] > 500
    page = (folder / "result.html").read_text()
    assert page.count("data:image/png") == 2 + 3
    pieces = findings["alignment"].per_image["segment_spans/dense"]
    assert page.count('class="segment ') == sum(len(pieces[place]) for place in (0, 1, 2))


def test_nothing_but_numbers_needs_no_more(tmp_path):
    setting = alignment_setting(6)
    findings = {"bright": Findings({"bright": 1.0}, {})}
    result = make_result(setting, findings, {"name": "toy"}, num_counted=12)
    names = [path.name for path in write_result(tmp_path, result, setting.rows, findings)]
    assert names == ["result.md", "images.jsonl", "result.html", "result.json"]


def test_a_folder_that_cannot_be_written_is_told(tmp_path, written):
    setting, findings, result, *_ = written
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"^expected to be able to write"):
        write_result(tmp_path / "file", result, setting.rows, findings)


def test_images_of_the_page_are_files(tmp_path, written):
    setting, _, result, *_ = written
    images = {place: toy_pixels(place) for place in (1, 0, 3)}
    paths = write_result(tmp_path, result, setting.rows, {}, images)
    assert paths[-2:] == [tmp_path / "images", tmp_path / "result.json"]
    found = image_files(tmp_path)
    assert [(place, path.name) for place, path in found.items()] == [
        (0, "000000.png"), (1, "000001.png"), (3, "000003.png"),
    ]  # fmt: skip
    for place, path in found.items():
        assert torch.equal(_read(path), images[place])


def test_another_test_leaves_no_image_of_the_first(tmp_path, written):
    setting, _, result, *_ = written
    write_result(tmp_path, result, setting.rows, {}, {p: toy_pixels(p) for p in (0, 1, 2)})
    (tmp_path / ".images.tmp-0123456789ab").mkdir()
    write_result(tmp_path, result, setting.rows, {}, {2: toy_pixels(7)})
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["000002.png"]
    assert torch.equal(_read(tmp_path / "images" / "000002.png"), toy_pixels(7))
    write_result(tmp_path, result, setting.rows, {})
    assert image_files(tmp_path) == {}
    assert {path.name for path in tmp_path.iterdir()} == {
        "result.md", "images.jsonl", "result.html", "result.json",
    }  # fmt: skip


def test_where_a_result_is_its_images_are(tmp_path, written, monkeypatch):
    setting, _, result, *_ = written
    write_result(tmp_path, result, setting.rows, {}, {0: toy_pixels(0)})

    def stop(*_):
        raise KeyboardInterrupt

    # Stopped before the images are there, it leaves all of the first test; after, no result.
    with monkeypatch.context() as patched:
        patched.setattr(result_files, "to_lossless", stop)
        with pytest.raises(KeyboardInterrupt):
            write_result(tmp_path, result, setting.rows, {}, {0: toy_pixels(1)})
    assert (tmp_path / "result.json").is_file()
    assert torch.equal(_read(tmp_path / "images" / "000000.png"), toy_pixels(0))
    assert list(tmp_path.glob(".*")) == []
    with monkeypatch.context() as patched:
        patched.setattr(result_files, "image_lines", stop)
        with pytest.raises(KeyboardInterrupt):
            write_result(tmp_path, result, setting.rows, {}, {0: toy_pixels(1)})
    assert not (tmp_path / "result.json").exists()


def test_files_of_other_names_are_no_images(tmp_path):
    assert image_files(tmp_path / "none") == {}
    (tmp_path / "images").mkdir()
    names = ("000012.png", "1000000.png", "0000013.png", "14.png", "00001a.png", "000015.jpg",
             ".000016.png.tmp-0123456789ab")  # fmt: skip
    for name in names:
        (tmp_path / "images" / name).write_bytes(b"")
    found = {place: path.name for place, path in image_files(tmp_path).items()}
    assert found == {12: "000012.png", 1000000: "1000000.png"}


def test_plots_show_means_and_numbers(written):
    per_image = written[1]["alignment"].per_image
    lengths = draw_lengths(per_image)
    assert [axes.get_title() for axes in lengths.axes] == ["dense", "Denscore-O of dense", "bright"]
    values = written[1]["alignment"].values
    labels = [label.get_text() for label in lengths.axes[0].get_xticklabels()]
    drawn = lengths.axes[0].lines[0].get_ydata()
    assert labels == ["≤ 77\n(11)", "78-154\n(2)"]
    assert list(drawn) == [
        values["reward/dense/length/1-77"], values["reward/dense/length/78-154"],
    ]  # fmt: skip
    segments = draw_segments(per_image)
    assert len(segments.axes) == 2
    assert segments.axes[1].lines[0].get_ydata()[0] == values["segment_offset/dense/1"]
    assert to_png(lengths) == to_png(draw_lengths(per_image))
    assert draw_lengths({}) is None
    assert draw_segments({}) is None


def test_lines_are_strict_json():
    text = image_lines(
        [{"sample_id": 1, "caption": "\ud800é", "metadata": {}}], {"a": [math.inf]}, 1
    )
    assert json.loads(text)["a"] is None
    assert text.encode()


def _read(path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)
