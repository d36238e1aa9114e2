import json

import pytest

from segalign.data.faults import SampleFault
from segalign.data.jsonl_sources import JsonlSource, PreferenceSource
from segalign.data.scene_shards import PairSettings, SceneSource, ScenesShards
from segalign.data.sources import FolderSource
from segalign.errors import ConfigError, DataError


def outcome(source, index: int):
    try:
        return source.members(index)
    except SampleFault as fault:
        return fault.reason


def outcomes(source) -> dict:
    return {source.origin(index): outcome(source, index) for index in range(len(source))}


def write_lines(path, *lines) -> None:
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )


def test_folder_with_every_kind_of_sample(tmp_path, plain_image):
    png, jpeg = plain_image(), plain_image(kind="JPEG")
    files = {
        "a.png": png,
        "a.txt": b" a caption\n",
        "deep/er/b.jpeg": jpeg,
        "deep/er/b.json": b'{"caption": "b", "url": "u"}',
        "c.png": png,
        "d.txt": b"no image",
        "e.png": b"not an image",
        "e.txt": b"e",
        "f.png": png,
        "f.txt": b"\xff",
        "g.bmp": b"bitmap",
        "g.txt": b"g",
        "h.webp": png,
        "h.txt": b"from text",
        "h.json": b'{"caption": "other", "score": 1}',
        "readme.md": b"",
        ".hidden/i.png": png,
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert outcomes(FolderSource(tmp_path)) == {
        "a.png": [("png", png), ("txt", b"a caption")],
        "c.png": "caption_missing",
        "d.txt": "image_missing",
        "deep/er/b.jpeg": [("jpg", jpeg), ("json", b'{"caption":"b","url":"u"}')],
        "e.png": "image_unreadable",
        "f.png": "caption_not_utf8",
        "g.bmp": "image_format",
        "h.webp": [("webp", png), ("json", b'{"caption":"from text","score":1}')],
    }


@pytest.mark.parametrize(
    ("check", "is_packed"), [("none", True), ("header", True), ("full", False)]
)
def test_check_says_how_far_images_are_decoded(tmp_path, plain_image, check, is_packed):
    (tmp_path / "a.png").write_bytes(plain_image(size=(64, 64))[:-30])
    (tmp_path / "a.txt").write_text("a")
    source = FolderSource(tmp_path, check=check)
    assert (outcome(source, 0) != "image_unreadable") == is_packed


def test_folder_settings_change_with_content(tmp_path, image_folder):
    folder = image_folder(tmp_path / "images", 2)
    before = FolderSource(folder).settings()
    assert FolderSource(folder).settings() == before
    (folder / "00000.txt").write_text("another caption")
    assert FolderSource(folder).settings() != before


def test_folders_that_cannot_be_packed(tmp_path):
    with pytest.raises(DataError, match=r"a folder of images was expected; `.*` is none; check"):
        FolderSource(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"must hold images \(jpg, jpeg, png, webp\); it has none;"):
        FolderSource(tmp_path)


def test_jsonl_lines(tmp_path, plain_image):
    root = tmp_path / "root"
    root.mkdir()
    png = plain_image()
    (root / "a.png").write_bytes(png)
    (tmp_path / "secret.png").write_bytes(png)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    write_lines(
        tmp_path / "lines.jsonl",
        {"path": "a.png", "caption": "a", "score": 0.5},
        "",
        {"path": "../secret.png", "caption": "a"},
        {"path": str(tmp_path / "secret.png"), "caption": "a"},
        {"path": "link.png", "caption": "a"},
        {"path": "missing.png", "caption": "a"},
        {"path": "a.png"},
        {"caption": "a"},
        {"path": "a.png\0.png", "caption": "a"},
        {"path": "a.exe", "caption": "a"},
        "not json",
    )
    source = JsonlSource(tmp_path / "lines.jsonl", image_root=root)
    assert list(outcomes(source).values()) == [
        [("png", png), ("json", b'{"path":"a.png","caption":"a","score":0.5}')],
        "path_outside_root",
        "path_outside_root",
        "path_outside_root",
        "image_missing",
        "caption_missing",
        "image_missing",
        "path_outside_root",
        "image_format",
        "json_invalid",
    ]


def test_captions_alone(tmp_path):
    write_lines(tmp_path / "lines.jsonl", {"caption": " Ein Bär. "}, {"caption": ""})
    source = JsonlSource(tmp_path / "lines.jsonl")
    expected = [[("json", '{"caption":"Ein Bär."}'.encode())], "caption_empty"]
    assert list(outcomes(source).values()) == expected


def test_jsonl_files_that_cannot_be_packed(tmp_path):
    path = tmp_path / "lines.jsonl"
    with pytest.raises(DataError, match=r"a JSONL file was expected at `.*`; got: No such file"):
        JsonlSource(path)
    write_lines(path, "", " ")
    with pytest.raises(DataError, match=r"must hold one JSON object per line; it is empty"):
        JsonlSource(path)
    write_lines(path, {"path": "a.png", "caption": "a"})
    with pytest.raises(
        DataError, match=r"so an image root was expected; got none; give `--image-r"
    ):
        JsonlSource(path)
    with pytest.raises(DataError, match=r"the image root must be a folder; `.*` is none"):
        JsonlSource(path, image_root=tmp_path / "nowhere")


def test_preference_pairs(tmp_path, plain_image):
    png, jpeg = plain_image(), plain_image(kind="JPEG")
    (tmp_path / "a.png").write_bytes(png)
    (tmp_path / "b.jpg").write_bytes(jpeg)
    pair = {"path_0": "a.png", "path_1": "b.jpg", "caption": "a"}
    write_lines(
        tmp_path / "lines.jsonl",
        {**pair, "label": 1},
        {**pair, "preference_probs": [0.2, 0.8]},
        pair,
        {**pair, "path_1": "gone.jpg", "label": 0},
        {**pair, "path_1": None, "label": 0},
    )
    found = list(outcomes(PreferenceSource(tmp_path / "lines.jsonl", image_root=tmp_path)).values())
    assert found[2:] == ["preference_invalid", "image_missing", "image_missing"]
    for members, probs in zip(found[:2], ([0.0, 1.0], [0.2, 0.8]), strict=True):
        assert members[:2] == [("0.png", png), ("1.jpg", jpeg)]
        assert json.loads(members[2][1])["preference_probs"] == probs


def test_scenes_are_png_and_json():
    source = SceneSource("2x2", 3, seed=1, start=10)
    (png, image), (kind, raw) = source.members(2)
    assert (png, kind, image[:4]) == ("png", "json", b"\x89PNG")
    fields = json.loads(raw)
    assert fields["world"] == "2x2"
    assert len(fields["caption"]) > 50
    assert source.members(2) == SceneSource("2x2", 1, seed=1, start=12).members(0)


def test_scenes_of_training_and_validation_differ():
    shards = ScenesShards(world="2x2", num_train=2, num_val=2)
    train, val = shards.source("train"), shards.source("val")
    assert train.members(0) != val.members(0)
    assert shards.folder("train") != shards.folder("val")
    assert ScenesShards(world="2x2", num_train=3).folder("train") != shards.folder("train")


def test_pairs_of_scenes_are_two_png_and_json():
    source = SceneSource("2x2", 3, seed=1, start=10, pairs=PairSettings(edit_position="past_77"))
    members = source.members(2)
    assert [suffix for suffix, _ in members] == ["0.png", "1.png", "json"]
    fields = json.loads(members[2][1])
    assert sorted(fields["preference_probs"]) == [0.0, 1.0]
    stated = fields["caption"][fields["edited"]["start"] : fields["edited"]["end"]]
    assert fields["edited"]["value"] in stated
    assert source.settings()["pairs"] == {"edit_position": "past_77", "tie_share": 0.0}


def test_shards_of_other_pairs_are_other_folders():
    settings = [
        {},
        {"pairs": True},
        {"pairs": True, "edit_position": "past_77"},
        {"pairs": True, "tie_share": 0.5},
    ]
    shards = [ScenesShards(world="2x2", num_train=2, num_val=2, **each) for each in settings]
    assert len({each.folder("train") for each in shards}) == 4
    assert shards[1].folder("train").name.startswith("2x2-train-long-pairs-")
    # Validation has no ties.
    assert shards[1].folder("val") == shards[3].folder("val")


def test_folders_of_samples_keep_their_names():
    # Of shards that were packed before there were pairs.
    shards = ScenesShards()
    assert str(shards.folder("train")) == "data/scenes/3x3-train-long-73fcbb6512"
    assert str(shards.folder("val")) == "data/scenes/3x3-val-long-b1798109f3"


def test_settings_of_pairs_need_pairs():
    for settings in ({"tie_share": 0.1}, {"edit_position": "past_77"}):
        with pytest.raises(ConfigError, match=r"are for pairs of scenes; got .* without `pairs`;"):
            ScenesShards(**settings)


def test_a_lone_surrogate_in_any_field_is_a_fault(tmp_path):
    write_lines(tmp_path / "lines.jsonl", '{"caption": "a", "note": "\\ud800"}')
    assert list(outcomes(JsonlSource(tmp_path / "lines.jsonl")).values()) == ["json_invalid"]


def test_a_world_that_does_not_exist():
    with pytest.raises(ConfigError, match=r"^expected a world among .*; got `9x9`\. [^\n]*$"):
        SceneSource("9x9", 10)


def test_no_scenes():
    with pytest.raises(ConfigError, match=r"the number of scenes must be at least 1; got 0"):
        SceneSource("2x2", 0)
