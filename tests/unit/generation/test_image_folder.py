"""Folders of generated images: names, metadata, going on, refusing to mix."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from segalign.errors import ConfigError, StorageError
from segalign.generation.contact_sheet import render_sheet
from segalign.generation.image_folder import ImageFolder, ImageJob, ImageSettings
from segalign.generation.own_files import SHEET_FILE, clear_images, lock_folder
from segalign.generation.prompts import Prompt

SETTINGS = ImageSettings(
    checkpoint="abc", weights="raw", sampler="ddim", steps=4, guidance=2.5, dtype="float32"
)
IMAGE = torch.linspace(0, 1, 3 * 4 * 5).view(3, 4, 5)


def job(sample_id=12, seed=0, text="A fox."):
    return ImageJob(Prompt(sample_id, text), seed)


def test_an_image_says_how_it_was_made(tmp_path):
    folder = ImageFolder(tmp_path / "out", SETTINGS)
    folder.write(job(text="Ein F\u00fcchslein \U0001f98a"), IMAGE)
    with Image.open(tmp_path / "out" / "00000012-s0.png") as image:
        assert image.size == (5, 4)
        texts = dict(image.text)
    assert len(texts.pop("fingerprint")) == 64
    assert texts == {
        "prompt": "Ein F\u00fcchslein \U0001f98a", "sample_id": "12", "seed": "0",
        "checkpoint": "abc", "weights": "raw", "sampler": "ddim", "steps": "4",
        "guidance": "2.5", "dtype": "float32",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["../../x", "a\0b", "\ud800", "x" * 10_000_000, ""])
def test_names_and_metadata_bear_any_prompt(tmp_path, text):
    folder = ImageFolder(tmp_path, SETTINGS)
    folder.write(job(text=text), IMAGE)
    folder.write_records([job(text=text)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000012-s0.png", "images.jsonl"]
    again = ImageFolder(tmp_path, SETTINGS)
    assert again.missing([job(text=text)]) == []
    assert json.loads((tmp_path / "images.jsonl").read_text())["prompt"] == text


def test_finished_images_are_kept_and_others_missing(tmp_path):
    folder = ImageFolder(tmp_path, SETTINGS)
    folder.write(job(seed=0), IMAGE)
    folder.write(job(seed=1), IMAGE)
    half = tmp_path / "00000012-s1.png"
    half.write_bytes(half.read_bytes()[:-20])  # damaged by somebody else
    left = (".00000012-s2.png.tmp-0123456789ab", ".index.html.tmp-0123456789ab",
            ".images.jsonl.tmp-0123456789ab")  # fmt: skip
    mine = (".notes.tmp-0123456789ab", ".00000012-s2.png.tmp-0123", ".x.replaced-0123456789ab")
    for name in (*left, *mine):
        (tmp_path / name).write_bytes(b"left by a killed command, or the user's")
    folder = ImageFolder(tmp_path, SETTINGS)
    assert [each.seed for each in folder.missing([job(seed=s) for s in range(3)])] == [1, 2]
    assert {path.name for path in tmp_path.glob(".*")} == set(mine)


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint": "x"},
        {"weights": "ema"},
        {"sampler": "unipc"},
        {"steps": 5},
        {"guidance": 1.0},
        {"dtype": "bfloat16"},
    ],
)
def test_other_settings_are_refused(tmp_path, change):
    ImageFolder(tmp_path, SETTINGS).write(job(), IMAGE)
    [(key, value)] = change.items()
    before = getattr(SETTINGS, key)
    with pytest.raises(ConfigError, match=rf"made with {key} {before}, not {value}\. Choose"):
        ImageFolder(tmp_path, dataclasses.replace(SETTINGS, **change))


def test_another_prompt_under_the_same_name_is_refused(tmp_path):
    ImageFolder(tmp_path, SETTINGS).write(job(), IMAGE)
    with pytest.raises(ConfigError, match=r"`00000012-s0\.png` shows another prompt, not 'A dog"):
        ImageFolder(tmp_path, SETTINGS).missing([job(text="A dog.")])


def test_records_keep_those_of_earlier_commands(tmp_path):
    first = ImageFolder(tmp_path, SETTINGS)
    first.write(job(7), IMAGE)
    first.write_records([job(7), job(8)])
    with (tmp_path / "images.jsonl").open("a") as file:
        file.write('damaged\n{"file": "../x.png", "sample_id": 1, "seed": 1, "prompt": ""}\n')
    second = ImageFolder(tmp_path, SETTINGS)
    second.write(job(3, 2), IMAGE)
    second.write(job(3, 1), IMAGE)
    records = second.write_records([job(3, 2), job(3, 1)])
    assert [(r["sample_id"], r["seed"]) for r in records] == [(3, 1), (3, 2), (7, 0)]
    lines = (tmp_path / "images.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records
    assert records[0]["guidance"] == 2.5


FOREIGN = {
    "index.html": b"<!doctype html><title>My page</title>",
    "images.jsonl": b'{"file": "cat.png", "prompt": "A cat."}\n',
    "00000012-s0.png": b"",  # an image of another program: see below
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_other_origin_are_refused_and_kept(tmp_path, name):
    ImageFolder(tmp_path, SETTINGS).write(job(3), IMAGE)
    (tmp_path / name).write_bytes(FOREIGN[name])
    if name.endswith(".png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for use in (clear_images, lambda path: ImageFolder(path, SETTINGS)):
        with pytest.raises(ConfigError, match=rf"{name}` to be missing or made by .* Move it"):
            use(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_is_worked_in_by_one_command(tmp_path):
    with lock_folder(tmp_path / "out"):
        with (
            pytest.raises(StorageError, match=r"another `main\.py generate` is at work in it"),
            lock_folder(tmp_path / "out"),
        ):
            pass
        with lock_folder(tmp_path / "other"):
            pass
    with lock_folder(tmp_path / "out"):
        pass


def test_clearing_leaves_foreign_files_alone(tmp_path):
    folder = ImageFolder(tmp_path, SETTINGS)
    folder.write(job(), IMAGE)
    folder.write_records([job()])
    (tmp_path / SHEET_FILE).write_text(render_sheet([], {}, "a page of ours"))
    (tmp_path / "mine.png").write_bytes(b"mine")
    clear_images(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]
    clear_images(tmp_path / "none")
