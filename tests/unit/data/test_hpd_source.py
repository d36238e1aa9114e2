"""JSON in the layout of HPDv2: pairs, rankings, damaged files, hostile paths."""

import json
import re
import tracemalloc

import pytest
import webdataset
from packed_source import faults, fields

import main
from segalign.data import json_items
from segalign.data.hpd_source import HpdSource, choose_pairs
from segalign.data.json_items import JsonItems
from segalign.data.long_captions import LongCaptions
from segalign.data.manifest import load_manifest
from segalign.data.packing import pack
from segalign.data.verify import verify_shards
from segalign.errors import ConfigError, DataError


@pytest.fixture
def images(tmp_path, plain_image):
    """Write the images 0.png to 3.png, whose red says their number."""
    root = tmp_path / "images"
    (root / "train").mkdir(parents=True)
    for number in range(4):
        (root / "train" / f"{number}.png").write_bytes(plain_image((number, 0, 0)))
    return root


def paths(*numbers) -> list[str]:
    return [f"train/{number}.png" for number in numbers]


def write(path, items):
    path.write_text(items if isinstance(items, str) else json.dumps(items), encoding="utf-8")
    return path


def test_two_images_are_one_pair(tmp_path, images, plain_image):
    item = {"prompt": "a", "file_path": paths(2, 3), "human_preference": [0, 1]}
    source = HpdSource(write(tmp_path / "x.json", [item]), image_root=images)
    members = source.members(0)
    assert members[0] == ("0.png", plain_image((2, 0, 0)))
    assert members[1] == ("1.png", plain_image((3, 0, 0)))
    assert fields(source, 0) == {
        "caption": "a", "item": 0, "num_pairs": 1, "path_0": "train/2.png", "path_1": "train/3.png",
        "preferred_path": "train/3.png", "preference_probs": [0.0, 1.0],
    }  # fmt: skip


RANKED = {"prompt": "a", "image_path": paths(0, 1, 2, 3), "rank": [3, 1, 2, 1]}


def judged(source) -> dict:
    """Return the preference of each pair of images by their numbers."""
    found = [fields(source, index) for index in range(len(source))]
    return {(int(f["path_0"][6]), int(f["path_1"][6])): tuple(f["preference_probs"]) for f in found}


def test_rankings_give_all_pairs_or_those_of_neighbours(tmp_path, images):
    file = write(tmp_path / "x.json", [RANKED, RANKED])
    source = HpdSource(file, image_root=images)
    assert len(source) == 12
    assert source.origin(7) == "item 1, pair 1"
    assert {fields(source, index)["num_pairs"] for index in range(12)} == {6}
    assert judged(source) == {
        (0, 1): (0, 1), (0, 2): (0, 1), (0, 3): (0, 1),
        (1, 2): (1, 0), (1, 3): (0.5, 0.5), (2, 3): (0, 1),
    }  # fmt: skip
    # In order of rank: 1, 3, 2, 0; the earlier image of the list comes first.
    source = HpdSource(file, image_root=images, pairs="adjacent")
    assert len(source) == 6
    assert judged(source) == {(1, 3): (0.5, 0.5), (2, 3): (0, 1), (0, 2): (0, 1)}


def test_ties_can_be_set_aside(tmp_path, images):
    file = write(tmp_path / "x.json", [RANKED])
    report = pack(HpdSource(file, image_root=images, ties="set_aside"), tmp_path / "out")
    assert (report.num_packed, report.set_aside) == (5, {"preference_tie": 1})


def test_long_captions_are_joined_by_the_preferred_image(tmp_path, images):
    file = write(tmp_path / "x.json", [RANKED])
    lines = [{"id": "train/1.png", "caption": "Long."}]
    write(tmp_path / "c.jsonl", "\n".join(map(json.dumps, lines)))
    captions = LongCaptions(tmp_path / "c.jsonl", key="preferred_path")
    report = pack(HpdSource(file, image_root=images, captions=captions), tmp_path / "out")
    assert report.set_aside == {"caption_missing": 4}
    assert fields(HpdSource(file, image_root=images, captions=captions), 0)["prompt"] == "a"
    captions = LongCaptions(tmp_path / "c.jsonl", key="x")
    with pytest.raises(ConfigError, match=r"caption, item, path_0, path_1, preferred_path; got `x"):
        HpdSource(file, image_root=images, captions=captions)


def test_items_that_cannot_be_used_are_one_fault_each(tmp_path, images):
    (tmp_path / "secret.png").write_bytes(b"")
    pair = {"prompt": "a", "file_path": paths(0, 1), "human_preference": [1, 0]}
    items = {
        "no images": ({"prompt": "a", "rank": [1, 2]}, "image_missing"),
        "one image": ({**pair, "file_path": paths(0)}, "image_missing"),
        "no judgement": ({"prompt": "a", "file_path": paths(0, 1)}, "preference_missing"),
        "too short": ({**pair, "human_preference": [1]}, "preference_invalid"),
        "no number": ({**pair, "human_preference": [1, None]}, "preference_invalid"),
        "sum of 2": ({**pair, "human_preference": [1, 1]}, "preference_invalid"),
        "infinite": ({**RANKED, "rank": [1, 2, 3, float("inf")]}, "preference_invalid"),
        "not a number": ({**RANKED, "rank": [1, 2, 3, float("nan")]}, "preference_invalid"),
        "three judged": ({**pair, "file_path": paths(0, 1, 2), "human_preference": [1, 0, 0]},
                         "preference_invalid"),
        "too many": ({"prompt": "a", "file_path": ["x"] * 2000, "rank": [1] * 2000},
                     "preference_invalid"),
        "gone": ({**pair, "file_path": ["train/0.png", "train/9.png"]}, "image_missing"),
        "no name": ({**pair, "file_path": ["train/0.png", 7]}, "image_missing"),
        "outside": ({**pair, "file_path": ["train/0.png", "../secret.png"]}, "path_outside_root"),
        "no prompt": ({**pair, "prompt": None}, "caption_missing"),
        "punctuation": ({**pair, "prompt": "?!"}, "caption_empty"),
    }  # fmt: skip
    file = write(tmp_path / "x.json", [item for item, _ in items.values()])
    found = faults(HpdSource(file, image_root=images))
    assert dict(zip(items, found, strict=True)) == {
        name: reason for name, (_, reason) in items.items()
    }


def test_pairs_of_an_unsound_item_are_none():
    assert choose_pairs({"file_path": ["a", "b"]}, "all") == []
    assert choose_pairs({"file_path": ["a", "b"], "rank": [1, 2]}, "adjacent") == [(0, 1)]


ITEMS = [{"a": "ein Bär"}, {}, {"b": [1, {"c": "]},{"}]}, {"d": "x" * 300}]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 13])
@pytest.mark.parametrize("layout", [{}, {"indent": 2}, {"ensure_ascii": False}])
def test_items_are_found_by_their_bytes(tmp_path, monkeypatch, chunk, layout):
    monkeypatch.setattr(json_items, "_CHUNK_BYTES", chunk)
    file = write(tmp_path / "x.json", " " + json.dumps(ITEMS, **layout) + "\n ")
    raw = file.read_bytes()
    found = list(JsonItems(file))
    assert [item for *_, item in found] == ITEMS
    assert [json.loads(raw[offset : offset + size]) for offset, size, _ in found] == ITEMS


def test_memory_does_not_grow_with_the_items(tmp_path):
    item = json.dumps({**RANKED, "prompt": "x" * 500})
    file = write(tmp_path / "x.json", "[" + ",\n".join([item] * 8000) + "]")
    assert file.stat().st_size > 4e6
    tracemalloc.start()
    count = sum(1 for _ in JsonItems(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 8000
    assert peak < 5e5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got another beginning than `[`; mend"),
        ('{"a": 1}', "got another beginning than `[`; mend"),
        ("[", "got object 1 is none or not closed; mend"),
        ('[{"a": 1}', "got no `,` after object 1; mend"),
        ('[{"a": 1} {"a": 1}]', "got no `,` after object 1; mend"),
        ('[{"a": 1},]', "got object 2 is none or not closed; mend"),
        ('[{"a": 1}, {"a":', "got object 2 is none or not closed; mend"),
        ("[1]", "got object 1 is int; mend"),
        ("[" * 100_000, "got object 1 is none or not closed; mend"),
        ('[{}] "more"', "got more after the closing `]`; mend"),
        ("[]", "must hold prompts with images; it is empty; check it"),
        (json.dumps([{"a": "x" * 3_000_000}]), "must hold a JSON array of objects of at most"),
    ],
)
def test_files_that_are_no_array_of_objects(tmp_path, images, text, message):
    with pytest.raises(DataError) as caught:
        HpdSource(write(tmp_path / "x.json", text), image_root=images)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path, images):
    with pytest.raises(DataError, match=r"a JSON file was expected at `.*`; got: No such file"):
        HpdSource(tmp_path / "no", image_root=images)
    (tmp_path / "x.json").write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(DataError, match=r"got bytes that are not UTF-8: invalid start byte; mend"):
        HpdSource(tmp_path / "x.json", image_root=images)


def test_the_command_packs_plain_shards(tmp_path, images, capsys):
    file = str(write(tmp_path / "x.json", [RANKED, {"prompt": "b"}]))
    out = tmp_path / "out"
    argv = ["shards", "pack", "hpd", file, str(out), "--image-root", str(images)]
    assert main.main([*argv, "--pairs", "adjacent", "--num-processes", "2"]) == 0
    shown = re.sub(" +", " ", capsys.readouterr().out)
    assert "set aside image_missing: 1\n" in shown
    assert "examples item 1, pair 0 | image_missing | the item has no `file_path`" in shown
    assert "preferences pairs: 3\n ties: 1\n" in shown
    assert verify_shards(out, decode=True).is_sound
    urls = [str(out / shard.name) for shard in load_manifest(out).shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["0.png"][0, 0, 0] for sample in samples] == [1, 2, 0]
    assert main.main([*argv, "--pairs", "all"]) == 65
    assert "changed: num_source, pairs; choose another folder" in capsys.readouterr().err
