"""``main.py generate``: images, going on, bad lines; the same from a run and from its export."""

import json
import os
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from tiny_run import model_settings, write_run

from lightning_modules.run_loading import load_module
from segalign.commands import export, generate
from segalign.errors import ConfigError, DataError

LONG = "A red fox sits on a tall wall. " * 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run, and its exported folder."""
    place = tmp_path_factory.mktemp("place")
    write_run(place / "run", model_settings(lora={"rank": 2}))
    out = str(place / "folder")
    options = ["--checkpoint", str(place / "run"), "--format", "diffusers", "--out", out]
    assert export.run(options, load_once) == 0
    return place


_LOADED = {}


def load_once(path, **options):
    """Load a run once for all tests; commands change nothing of a module but its sampler."""
    if path not in _LOADED:
        module = load_module(path, **options)
        _LOADED[path] = module, getattr(module, "sampler", None)
    module, module.sampler = _LOADED[path]
    return module


def make(place, out, *options, source="run"):
    arguments = ["--checkpoint", str(place / source), "--out", str(out), "--device", "cpu"]
    return generate.run([*arguments, *options], load_once)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def images(out):
    return sorted(path.name for path in out.glob("*.png"))


def test_images_records_and_page(place, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    records = [{"prompt": "A fox."}, {"caption": LONG, "id": "wall"}, {"prompt": "B.", "seed": 9}]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    out = tmp_path / "out"
    assert make(place, out, "--prompt-file", str(prompts), "--seeds", "0", "3") == 0
    assert images(out) == [
        "00000000-s0.png", "00000000-s3.png", "00000001-s0.png", "00000001-s3.png",
        "00000002-s9.png",
    ]  # fmt: skip
    lines = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == images(out)
    assert (lines[2]["id"], lines[2]["prompt"], lines[2]["weights"]) == ("wall", LONG, "ema")
    assert (lines[0]["sampler"], lines[0]["steps"], lines[0]["guidance"]) == ("ddim", 2, 2.0)
    html = (out / "index.html").read_text()
    HTMLParser().feed(html)
    assert html.count("<img") == 5
    assert "dropped</span>" in html
    assert "made 5 images, kept 0" in capsys.readouterr().out


def test_an_image_does_not_depend_on_its_batch(place, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A fox.\n" + LONG + "\nB.\n")
    for size in ("1", "3"):
        make(place, tmp_path / size, "--prompt-file", str(prompts), "--batch-size", size)
    for name in images(tmp_path / "1"):
        difference = pixels(tmp_path / "1" / name) - pixels(tmp_path / "3" / name)
        assert abs(difference).max() <= 1
    assert abs(pixels(tmp_path / "1" / images(tmp_path / "1")[0])).max() > 0


def test_a_run_and_its_export_make_the_same(place, tmp_path):
    options = ("--prompt", "A fox.", "--prompt", LONG, "--sampler", "unipc", "--steps", "3")
    make(place, tmp_path / "run", *options)
    make(place, tmp_path / "folder", *options, source="folder")
    for name in images(tmp_path / "run"):
        assert abs(pixels(tmp_path / "run" / name) - pixels(tmp_path / "folder" / name)).max() <= 1
    raw = tmp_path / "raw"
    make(place, raw, *options, "--weights", "raw")
    assert abs(pixels(raw / images(raw)[1]) - pixels(tmp_path / "run" / images(raw)[1])).max() > 1
    with pytest.raises(ConfigError, match="no `--weights` for the exported folder"):
        make(place, tmp_path / "folder", *options, "--weights", "ema", source="folder")


def test_a_half_done_folder_goes_on_and_others_are_refused(place, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--prompt", "A fox.", "--prompt", "B.", "--num-images", "2")
    make(place, out, *options)
    before = {name: (out / name).read_bytes() for name in images(out)}
    (out / "00000001-s1.png").unlink()
    os.utime(out / "00000000-s0.png", (1, 1))
    assert make(place, out, *options) == 0
    assert "made 1 images, kept 3" in capsys.readouterr().out
    assert {name: (out / name).read_bytes() for name in images(out)} == before
    assert (out / "00000000-s0.png").stat().st_mtime == 1  # not written again
    with pytest.raises(ConfigError, match="made with steps 2, not 3"):
        make(place, out, *options, "--steps", "3")
    with pytest.raises(ConfigError, match=r"made with guidance 2\.0, not 1\.0"):
        make(place, out, *options, "--guidance", "1")
    with pytest.raises(ConfigError, match="shows another prompt"):
        make(place, out, "--prompt", "C.")
    with pytest.raises(ConfigError, match="made with checkpoint"):
        make(place, out, *options, source="folder")
    assert {name: (out / name).read_bytes() for name in images(out)} == before
    assert make(place, out, "--prompt", "C.", "--overwrite") == 0
    assert images(out) == ["00000000-s0.png"]


def test_an_interrupted_command_leaves_whole_images_and_their_records(place, tmp_path, monkeypatch):
    from segalign.generation.image_folder import ImageFolder

    out, write, written = tmp_path / "out", ImageFolder.write, []

    def write_twice(self, job, image):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(job)
        write(self, job, image)

    monkeypatch.setattr(ImageFolder, "write", write_twice)
    options = ("--prompt", "A.", "--num-images", "3", "--batch-size", "1")
    with pytest.raises(KeyboardInterrupt):
        make(place, out, *options)
    assert images(out) == ["00000000-s0.png", "00000000-s1.png"]
    assert len((out / "images.jsonl").read_text().splitlines()) == 2
    assert (out / "index.html").read_text().count("<img") == 2


def test_bad_lines_are_named_and_the_rest_done(place, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(b'{"prompt": "A."}\nnonsense\n{"prompt": "\xff"}\n{"prompt": "D."}\n')
    out = tmp_path / "out"
    with pytest.raises(DataError, match="2 of 4 lines hold none, the first being line 2") as error:
        make(place, out, "--prompt-file", str(prompts))
    assert error.value.exit_code == 65
    assert images(out) == ["00000000-s0.png", "00000003-s0.png"]
    printed = capsys.readouterr().err
    assert f"skipping {prompts}:2: expected JSON" in printed
    assert f"skipping {prompts}:3: expected UTF-8; got byte 0xff" in printed


@pytest.mark.parametrize("prompt", ["", "\0 \ud800", "null", "...", "{a: 1}"])
def test_any_prompt_makes_an_image(place, tmp_path, prompt):
    assert make(place, tmp_path, f"--prompt={prompt}") == 0
    assert images(tmp_path) == ["00000000-s0.png"]
    line = (tmp_path / "images.jsonl").read_text()
    assert json.loads(line)["prompt"] == prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "either by `--prompt` or by `--prompt-file`; got none"),
        (["--prompt", "A.", "--prompt-file", "x"], "got both"),
        (["--prompt-file", "nowhere.txt"], r"prompts file at `nowhere\.txt`; got: No such file"),
        (["--prompt", "A.", "--seeds", "1", "--num-images", "2"], "`--seeds` or `--num-images`"),
        (["--prompt", "A.", "--steps", "0"], "steps"),
        (["--prompt", "A.", "--steps", "2000"], "2000"),
        (["--prompt", "A.", "--device", "abacus"], "got `abacus`. Choose another `--device`"),
        (["--prompt", "A.", "--sampler", "euler"], "euler"),
        (["--prompt", "A.", "--colour", "red"], "colour"),
    ],
)
def test_settings_that_cannot_work(place, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        make(place, tmp_path / "out", *options)


def test_sources_that_cannot_be_used(place, tmp_path):
    with pytest.raises(ConfigError, match="found nothing"):
        make(place, tmp_path / "out", "--prompt", "A.", source="nowhere")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(DataError, match=r"a whole folder that `main\.py export` has written"):
        make(tmp_path, tmp_path / "out", "--prompt", "A.", source=".")
    scorer = {"class_path": "toy_house.ToyModule", "init_args": {}}
    write_run(place / "toy", scorer, ema=False, allow_import=["toy_house"])
    with pytest.raises(ConfigError, match=r"a model that makes images in .*; got `ToyModule`"):
        make(place, tmp_path / "o", "--prompt=A.", "--allow_import=toy_house", source="toy")
    assert not (tmp_path / "out").exists()
