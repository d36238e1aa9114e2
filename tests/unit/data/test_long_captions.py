"""Long captions by id: found, missing, doubled, damaged."""

import json
import pickle

import pytest

from segalign.data import long_captions
from segalign.data.faults import SampleFault
from segalign.data.long_captions import LongCaptions
from segalign.errors import ConfigError, DataError


def write(path, *lines):
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def numbered(path, count=5):
    return write(path, *({"id": i, "caption": f"long {i}", "model": "m"} for i in range(count)))


def test_the_long_caption_takes_the_place_of_the_prompt(tmp_path):
    captions = LongCaptions(numbered(tmp_path / "c.jsonl"), key="ranking_id")
    fields = {"ranking_id": 3, "caption": "short", "score": 1}
    expected = {"ranking_id": 3, "caption": "long 3", "score": 1, "prompt": "short"}
    assert captions.join(fields) == expected
    assert fields["caption"] == "short"
    assert captions.join({**fields, "ranking_id": "3"})["caption"] == "long 3"


def test_ids_may_be_any_text(tmp_path):
    path = write(
        tmp_path / "c.jsonl", {"id": "ein Bär", "caption": "lang"}, "", {"id": "", "caption": "x"}
    )
    captions = LongCaptions(path, key="caption")
    assert captions.join({"caption": "ein Bär"}) == {"caption": "lang", "prompt": "ein Bär"}
    assert captions.join({"caption": ""})["caption"] == "x"


def test_missing_captions_are_set_aside_or_keep_their_prompt(tmp_path):
    path = numbered(tmp_path / "c.jsonl")
    for value in (99, None):
        fields = {"uid": value, "caption": "short"}
        with pytest.raises(
            SampleFault, match=r"caption_missing: `c.jsonl` has no caption of `uid`"
        ):
            LongCaptions(path, key="uid").join(fields)
        assert LongCaptions(path, key="uid", missing="keep_prompt").join(fields) == fields


def test_a_caption_that_cannot_be_used_is_a_fault_of_its_sample(tmp_path):
    path = write(
        tmp_path / "c.jsonl", {"id": 1, "caption": " "}, {"id": 2}, {"id": 3, "caption": "a"}
    )
    captions = LongCaptions(path, key="id", missing="keep_prompt")
    reasons = []
    for value in (1, 2):
        with pytest.raises(SampleFault) as caught:
            captions.join({"id": value, "caption": "short"})
        reasons.append(caught.value.reason)
    assert reasons == ["caption_empty", "caption_missing"]


def test_ids_of_one_hash_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(long_captions, "_hash", lambda value: len(value))
    captions = LongCaptions(numbered(tmp_path / "c.jsonl", 12), key="id")
    for value in range(12):
        assert captions.join({"id": value, "caption": "s"})["caption"] == f"long {value}"
    with pytest.raises(SampleFault):
        captions.join({"id": "x", "caption": "s"})


def test_settings_change_with_the_file_and_the_choices(tmp_path):
    path = numbered(tmp_path / "c.jsonl")
    before = LongCaptions(path, key="a").settings()
    assert LongCaptions(path, key="a").settings() == before
    assert LongCaptions(path, key="b").settings() != before
    assert LongCaptions(path, key="a", missing="keep_prompt").settings() != before
    numbered(path, 6)
    assert LongCaptions(path, key="a").settings() != before


def test_captions_can_go_to_another_process(tmp_path):
    captions = pickle.loads(pickle.dumps(LongCaptions(numbered(tmp_path / "c.jsonl"), key="id")))
    assert captions.join({"id": 1, "caption": "s"})["caption"] == "long 1"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"must hold {\"id\": ..., \"caption\": ...} lines; it is empty"),
        (["nonsense"], r"line 1 is not: not JSON: .*; mend or remove it"),
        ([{"id": 1}, "", {"caption": "a"}], r"line 3 is not: an id of null; mend or remove it"),
        ([{"id": True, "caption": "a"}], r"line 1 is not: an id of true"),
        ([{"id": [1], "caption": "a"}], r"line 1 is not: an id of \[1\]"),
        ([{"id": 1}, {"id": 2}, {"id": "1"}], r"must have one caption; got two for '?1'?; remove"),
    ],
)
def test_files_that_cannot_be_joined(tmp_path, lines, message):
    with pytest.raises(DataError, match=message) as caught:
        LongCaptions(write(tmp_path / "c.jsonl", *lines), key="id")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"long captions was expected at `.*`; got: No such file"):
        LongCaptions(tmp_path / "no", key="id")


def test_a_key_that_no_sample_has(tmp_path):
    captions = LongCaptions(numbered(tmp_path / "c.jsonl"), key="typo")
    with pytest.raises(ConfigError, match=r"one of the fields a, b; got `typo`; choose one"):
        captions.check_key({"b", "a"})
