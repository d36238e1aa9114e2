"""Whether shards hold a preference at all."""

import json

import pytest

from segalign.data.preferences import add_counts, count_preference, require_preference
from segalign.errors import DataError


def members(plain_image, probs):
    raw = json.dumps({"caption": "a", "preference_probs": probs}).encode()
    return [("0.png", plain_image()), ("1.png", plain_image()), ("json", raw)]


def test_pairs_and_ties_are_counted(plain_image):
    assert count_preference(members(plain_image, [1, 0])) == {"pairs": 1, "ties": 0}
    assert count_preference(members(plain_image, [0.5, 0.5])) == {"pairs": 1, "ties": 1}
    assert count_preference([("png", b""), ("json", b"{}")]) == {}
    assert add_counts([{"pairs": 1, "ties": 0}, {}, {"pairs": 1, "ties": 0}]) == {
        "pairs": 2,
        "ties": 0,
    }


def test_one_preference_is_enough(tmp_path, plain_image, write_shards):
    probs = [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.4, 0.6]]
    manifest = write_shards(tmp_path, [2, 2], lambda i: members(plain_image, probs[i]))
    require_preference(manifest)


def test_ties_alone_are_refused(tmp_path, plain_image, write_shards):
    probs = [[0.5, 0.5], "damaged", [0.5, 0.5]]
    manifest = write_shards(tmp_path, [2, 1], lambda i: members(plain_image, probs[i]))
    with pytest.raises(
        DataError, match=r"^preference pairs must say .*; all 2 of `.*` are ties, f"
    ):
        require_preference(manifest)


def test_what_cannot_be_read_is_left_to_the_run(tmp_path, plain_image, write_shards):
    require_preference(write_shards(tmp_path, [2], lambda i: members(plain_image, "damaged")))
