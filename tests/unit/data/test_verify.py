import json

import pytest

from segalign.data.verify import verify_shards
from segalign.errors import DataError


def test_sound_shards(tmp_path, write_shards):
    write_shards(tmp_path, [3, 2])
    report = verify_shards(tmp_path, decode=True)
    assert report.is_sound
    assert (report.num_shards, report.num_samples, report.num_decoded) == (2, 5, 5)


def test_a_flipped_byte_is_found(tmp_path, write_shards):
    manifest = write_shards(tmp_path, [3])
    path = tmp_path / "shard-000000.tar"
    raw = bytearray(path.read_bytes())
    raw[manifest.samples(0)[1].members[0].offset + 20] ^= 1
    path.write_bytes(raw)
    assert verify_shards(tmp_path).shard_defects == [
        "`shard-000000.tar` has another digest than the manifest says",
        "`shard-000000.tar` holds 3 samples; the manifest's 3 are not all there as listed",
    ]


def test_missing_cut_and_unlisted_shards_are_found(tmp_path, write_shards):
    write_shards(tmp_path, [1, 1])
    (tmp_path / "extra.tar").touch()
    (tmp_path / "shard-000000.tar").unlink()
    path = tmp_path / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:700])
    unlisted, missing, cut = verify_shards(tmp_path).shard_defects
    assert unlisted == "`extra.tar` is not in the manifest"
    assert missing == "`shard-000000.tar` is missing"
    assert "must be a" in cut


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("txt", b"\xff")], "caption_not_utf8"),
        ([("png", b"")], "caption_missing"),
        ([("png", b"broken"), ("txt", b"a")], "image_unreadable"),
        ([("0.png", None), ("json", b'{"caption": "a", "label": 0}')], "image_missing"),
        (
            [("0.png", None), ("0.webp", None), ("json", b'{"caption": "a", "label": 0}')],
            "image_missing",
        ),
        ([("0.png", None), ("1.png", None), ("json", b'{"caption": "a"}')], "preference_invalid"),
    ],
)
def test_decoding_finds_faulty_samples(tmp_path, write_shards, plain_image, members, reason):
    members = [(suffix, plain_image() if raw is None else raw) for suffix, raw in members]
    write_shards(tmp_path, [2], lambda number: members)
    assert verify_shards(tmp_path).is_sound
    report = verify_shards(tmp_path, decode=True)
    assert report.sample_defects == {reason: 2}
    assert report.examples[0][:3] == ["shard-000000.tar", "000000", reason]


def test_sound_preference_pairs(tmp_path, write_shards, plain_image):
    fields = json.dumps({"caption": "a", "preference_probs": [1, 0]}).encode()
    pair = [("0.png", plain_image()), ("1.jpg", plain_image(kind="JPEG")), ("json", fields)]
    write_shards(tmp_path, [1], lambda number: pair)
    assert verify_shards(tmp_path, decode=True).is_sound


def test_no_manifest(tmp_path):
    with pytest.raises(DataError, match=r"must hold `manifest.jsonl`; it has none"):
        verify_shards(tmp_path)
