"""Prompt sets in the layouts of DetailMaster and LPG-Bench, and any other JSON of prompts."""

import json
import re

import pytest
from packed_source import faults, fields

import main
from segalign.data.loaders import open_shards
from segalign.data.prompt_sources import PromptSource
from segalign.errors import DataError
from segalign.evaluation.captions import read_caption_rows

DETAIL = {
    "image_id": "000000238708.jpg",
    "ori_prompt": "A bowl.",
    "polished_prompt": " A bowl of broccoli stands on a table. ",
    "character_attributes": [
        {"main_character": "bowl", "characteristics_list": ["colour:green"], "cls": "object"}
    ],
    "character_locations": [{"main_character": "bowl", "bbox": [2, 0, 3, 1], "position": "left"}],
    "scene_attributes": [{"scene_attribute": "style", "content": "A photo."}],
    "dataset_target": "ln_coco",
}


def write(path, entries):
    if path.suffix == ".jsonl":
        text = "\n\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries) + "\n\n"
    else:
        text = entries if isinstance(entries, str) else json.dumps(entries)
    path.write_text(text, encoding="utf-8")
    return path


def test_detailmaster_is_packed_with_its_attributes(tmp_path, capsys):
    file = write(tmp_path / "DetailMaster_Dataset.json", [DETAIL, {**DETAIL, "image_id": 7}])
    assert main.main(["shards", "pack", "detailmaster", str(file), str(tmp_path / "out")]) == 0
    assert "num packed  2" in capsys.readouterr().out
    first, second = read_caption_rows(tmp_path / "out", None)
    assert first["caption"] == "A bowl of broccoli stands on a table."
    kept = {name: value for name, value in DETAIL.items() if name != "polished_prompt"}
    made = {"id": "ln_coco_000000238708.jpg", "prompt_set": "detailmaster"}
    assert first["metadata"] == {**kept, **made}
    assert second["metadata"]["id"] == "ln_coco_7"
    sample = next(iter(open_shards(tmp_path / "out")))[1]
    assert [member.suffix for member in sample.members] == ["json"]


@pytest.mark.parametrize("name", ["prompts.json", "prompts.jsonl"])
def test_lpg_is_read_from_an_array_and_from_lines(tmp_path, name):
    entries = [
        {"id": 3, "prompt": "A castle.", "theme": "fantasy"},
        {"prompt": "A tree.", "caption": "A short one."},
    ]
    source = PromptSource(write(tmp_path / name, entries), prompt_set="lpg", prompt_key="prompt")
    assert [fields(source, index) for index in range(len(source))] == [
        {"caption": "A castle.", "id": "3", "theme": "fantasy", "prompt_set": "lpg"},
        {"caption": "A tree.", "id": "1", "other_caption": "A short one.", "prompt_set": "lpg"},
    ]
    assert source.origin(0).startswith("entry 0 at byte ")


def test_the_fields_of_prompt_and_id_can_be_named(tmp_path, capsys):
    entries = [{"long": {"en": 1}}, {"long": "A tree.", "theme": "x", "no": 5}]
    file = write(tmp_path / "x.json", entries)
    keys = ["--prompt-key", "long", "--id-key", "theme", "no"]
    assert main.main(["shards", "pack", "lpg", str(file), str(tmp_path / "out"), *keys]) == 0
    assert "json_invalid: 1" in capsys.readouterr().out
    (row,) = read_caption_rows(tmp_path / "out", None)
    assert (row["caption"], row["metadata"]["id"]) == ("A tree.", "x_5")


def test_bad_entries_are_set_aside_by_reason(tmp_path):
    entries = [
        {"prompt": "A tree."},
        {"text": "A tree."},
        {"prompt": 7},
        {"prompt": " . "},
        {"prompt": "A tree.", "id": None},
        {"prompt": "A tree.", "id": [1]},
        "{broken",
        "[1]",
    ]
    source = PromptSource(
        write(tmp_path / "x.jsonl", entries), prompt_set="lpg", prompt_key="prompt"
    )
    assert fields(source, 0)["id"] == "0"
    source._places = source._places[1:]
    assert faults(source) == [
        "caption_missing",
        "json_invalid",
        "caption_empty",
        *4 * ["json_invalid"],
    ]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"text": "A tree.", "no": 1}], "field `prompt`; its first entries have `no`, `text`; na"),
        ([], "must hold prompts; it is empty"),
        ('{"a": "A tree."}', "must hold a JSON array of objects"),
        ('["A tree."]', "must hold a JSON array of objects of at most"),
        ('[{"prompt": "A tree."}', "must hold a JSON array of objects"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path, entries, message):
    file = write(tmp_path / "x.json", entries)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        PromptSource(file, prompt_set="lpg", prompt_key="prompt")
    assert "\n" not in str(caught.value)


def test_other_keys_are_other_shards(tmp_path):
    file = write(tmp_path / "x.json", [{"prompt": "A tree.", "long": "A tall tree."}])
    settings = [
        PromptSource(file, prompt_set=name, prompt_key=key).settings()
        for name, key in [("lpg", "prompt"), ("lpg", "long"), ("prompts", "prompt")]
    ]
    assert len({json.dumps(one) for one in settings}) == 3
