import json
import shutil
import subprocess
import sys

import pytest
import torch
import webdataset
from PIL import Image
from safetensors.torch import load_file

import main
from segalign.data.manifest import index_shards
from segalign.rewards.common_direction import CorpusDirection

COUNT = 520


def run(argv):
    return main.main(["direction", *map(str, argv)])


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Scenes, of which one has no caption and one a broken image."""
    from segalign.data.scene_shards import SceneSource

    folder = tmp_path_factory.mktemp("scenes")
    source = SceneSource("3x3", COUNT, length="short")
    with webdataset.ShardWriter(str(folder / "x-%d.tar"), verbose=0) as writer:
        for number in range(COUNT):
            sample = {suffix: bytes(content) for suffix, content in source.members(number)}
            if number == 1:
                sample["json"] = json.dumps({"caption": " "}).encode()
            if number == 2:
                sample["png"] = b"nonsense"
            writer.write({"__key__": f"{number:04d}", **sample})
    index_shards(folder)
    return folder


@pytest.fixture(scope="module")
def bare_shards(tmp_path_factory):
    """Captions alone, and few."""
    folder = tmp_path_factory.mktemp("bare")
    with webdataset.ShardWriter(str(folder / "x-%d.tar"), verbose=0) as writer:
        for number in range(3):
            writer.write({"__key__": f"{number}", "txt": f"A cat, number {number}."})
    index_shards(folder)
    return folder


@pytest.fixture(scope="module")
def direction(shards, tmp_path_factory):
    path = tmp_path_factory.mktemp("direction") / "new" / "v.safetensors"
    assert run(["estimate", shards, "--scorer", "scenes", "--out", path, "--text", "whole"]) == 0
    return path


def test_a_direction_is_estimated_and_said(shards, tmp_path, capsys):
    path = tmp_path / "v.safetensors"
    assert run(["estimate", shards, "--scorer", "scenes", "--out", path, "--limit", 515]) == 0
    shown = capsys.readouterr()
    assert 'text          segments {"name": "sentence"}\n' in shown.out
    assert "captions      514 (" in shown.out
    assert "set aside     caption_empty: 1\n" in shown.out
    assert "estimating: 515 of 515" in shown.err
    saved = CorpusDirection.load(path)
    assert saved.provenance.model == "scenes"
    assert saved.direction.shape == (128,)
    norm = shown.out.split("|mean|")[1].split()[0]
    assert f"common share  mean {norm}, std 0." in shown.out


def test_a_report_is_written(shards, direction, tmp_path, capsys):
    out = tmp_path / "new" / "report"
    arguments = ["--direction", direction, "--out", out, "--num-pairs", 40, "--num-shown", 8]
    out.mkdir(parents=True)
    (out / "report.md").write_text("an older one")
    assert run(["report", shards, "--scorer", "scenes", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "set aside     caption_empty: 1, image_unreadable: 1\n" in shown
    assert "| 38 x 38 " in shown
    assert {path.name for path in out.iterdir()} == {"report.md", "shares.csv", "direction.png"}
    assert "| text-relevant part " in (out / "report.md").read_text()
    assert len((out / "shares.csv").read_text().splitlines()) == 39
    with Image.open(out / "direction.png") as picture:
        assert picture.width > 800


def test_an_image_is_read_as_it_is(shards, direction):
    """The pairs of scenes score alike, decoded from shards or drawn anew."""
    from segalign.data.loaders import open_shards
    from segalign.rewards.direction_report import read_pairs
    from segalign.rewards.segment_scorer import SegmentScorer
    from segalign.scenes.samples import make_sample
    from segalign.scenes.scorers import ScenesScorer

    scorer = SegmentScorer(ScenesScorer().load())
    pairs = read_pairs(open_shards(shards), scorer, num_pairs=5, batch_size=2)
    assert pairs.sample_ids == [0, 3, 4]
    samples = [make_sample("3x3", 0, number, length="short") for number in pairs.sample_ids]
    images = torch.stack([torch.from_numpy(sample.image).movedim(-1, 0) for sample in samples])
    with torch.no_grad():
        drawn = scorer.image_features(images.float() / 255)
        text = scorer.text_features([sample.caption for sample in samples])
    torch.testing.assert_close(pairs.image.float(), drawn)
    torch.testing.assert_close(pairs.text.float(), text)


def copy_with(direction, path, **changes):
    facts = {**vars(CorpusDirection.load(direction).provenance), **changes}
    tensor = facts.pop("tensor", CorpusDirection.load(direction).direction)
    CorpusDirection(tensor, CorpusDirection.load(direction).provenance.__class__(**facts)).save(
        path
    )


@pytest.fixture
def workplace(shards, bare_shards, direction, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, folder in (("SHARDS", shards), ("BARE", bare_shards)):
        (tmp_path / name).symlink_to(folder)
    shutil.copy(direction, tmp_path / "V")
    copy_with(direction, tmp_path / "OTHER", model_digest="0" * 32)
    copy_with(direction, tmp_path / "FOREIGN", text="by hand")
    copy_with(direction, tmp_path / "NARROW", tensor=torch.eye(7)[0])
    (tmp_path / "NONSENSE").write_text("nonsense")
    (tmp_path / "EMPTY").mkdir()
    return tmp_path


ESTIMATE = ["--scorer", "scenes", "--out", "NEW"]
REPORT = ["--scorer", "scenes", "--out", "REPORT", "--num-pairs", "4", "--direction"]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ([], 78, "expected a sub-command of `main.py direction`, one of estimate, report"),
        (["nonsense"], 78, "argument estimate | report: invalid choice"),
        (["estimate", "SHARDS"], 78, "the following arguments are required: "),
        (["estimate", "NOWHERE", *ESTIMATE], 65, "a folder of shards was expected;"),
        (["estimate", "EMPTY", *ESTIMATE], 65, "`EMPTY` must hold `manifest.jsonl`;"),
        (["estimate", "BARE", *ESTIMATE], 65, "expected at least 512 captions for a common"),
        (["estimate", "SHARDS", *ESTIMATE, "--limit", "511"], 65, "expected at least 512"),
        (["estimate", "SHARDS", *ESTIMATE, "--limit", "0"], 78, "`limit`: Not of type PositiveInt"),
        (["estimate", "SHARDS", *ESTIMATE, "--device", "x"], 78, "expected a device of this"),
        (["estimate", "SHARDS", *ESTIMATE[:-1], "V"], 78, "expected a new file at `--out`; `V`"),
        (["estimate", "SHARDS", *ESTIMATE[:-1], "V/x"], 75, "expected to be able to write"),
        (["estimate", "SHARDS", "--scorer", "./no", "--out", "N"], 78, "expected the scorer at"),
        (["estimate", "SHARDS", "--scorer", "EMPTY", "--out", "N"], 65, "expected a whole CLIP"),
        (
            ["estimate", "SHARDS", *ESTIMATE, "--text", "whole", "--segmenter", "clause"],
            78,
            "expected no `--segmenter` with `--text whole`",
        ),
        (["report", "SHARDS", *REPORT, "NOWHERE"], 78, "expected a common direction at `NOWHERE`"),
        (["report", "SHARDS", *REPORT, "NONSENSE"], 65, "expected a common direction in `NONSENSE"),
        (["report", "SHARDS", *REPORT, "OTHER"], 65, "expected a common direction of this model's"),
        (["report", "SHARDS", *REPORT, "FOREIGN"], 65, "expected a common direction of whole"),
        (["report", "SHARDS", *REPORT, "NARROW"], 65, "expected a common direction of width 128"),
        (["report", "SHARDS", *REPORT, "V", "--num-shown", "1"], 78, "expected at least 2 pairs"),
        (["report", "BARE", *REPORT, "V"], 65, "expected at least 2 samples with a caption and"),
    ],
)
@pytest.mark.usefixtures("workplace")
def test_errors_are_one_line_with_a_code(capsys, argv, code, message):
    assert run(argv) == code
    *progress, error = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {message}")
    assert all(line.startswith("scoring: ") for line in progress)


def test_weights_that_are_not_finite_are_one_line(shards, tmp_path, monkeypatch, capsys):
    from segalign.scenes import scorers

    load_scorer = scorers.load_scorer

    def broken(world, source):
        model = load_scorer(world, source)
        torch.nn.init.constant_(model.text_projection.weight, torch.nan)
        return model

    monkeypatch.setattr(scorers, "load_scorer", broken)
    path = tmp_path / "v.safetensors"
    assert run(["estimate", shards, "--scorer", "scenes", "--out", path]) == 65
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "error: expected finite text features of the scorer; got NaN for sample"
    )
    assert not path.exists()


def test_a_saved_direction_is_one_unit_vector(direction):
    (tensor,) = load_file(direction).values()
    assert tensor.norm().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("argv", [["--help"], ["estimate", "--help"], ["report", "--help"]])
def test_help_imports_neither_torch_nor_lightning(repository, argv):
    code = (
        "import sys\nfrom segalign.commands.direction import run\n"
        f"try: run({argv})\nexcept SystemExit: pass\n"
        "assert not {'torch', 'lightning', 'numpy', 'PIL', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True, capture_output=True)
