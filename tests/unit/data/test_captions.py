import json

import pytest

from segalign.data.captions import (
    MAX_CAPTION_BYTES,
    parse_caption_text,
    parse_preference,
    read_caption,
)
from segalign.data.faults import SampleFault


def reason_of(function, *arguments) -> str:
    with pytest.raises(SampleFault) as caught:
        function(*arguments)
    return caught.value.reason


def test_text_is_stripped_and_its_byte_order_mark_dropped():
    assert parse_caption_text("\ufeff  Ein Bär.\n".encode()) == "Ein Bär."


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"caf\xe9", "caption_not_utf8"),
        (b" \n", "caption_empty"),
        (b"... -- ?!", "caption_empty"),
        ("\u200b\u3002".encode(), "caption_empty"),
        (b"a\0b", "caption_nul"),
        (b"x" * (MAX_CAPTION_BYTES + 1), "caption_too_long"),
        (b"x" * 10_000_000, "caption_too_long"),
    ],
)
def test_text_that_cannot_be_used(raw, reason):
    assert reason_of(parse_caption_text, raw) == reason


@pytest.mark.parametrize("caption", ["7", "ß", "犬", "🎉", "5 %", "$", "...and"])
def test_a_word_or_a_sign_is_enough(caption):
    assert parse_caption_text(caption.encode()) == caption


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{", "json_invalid"),
        (b"[1]", "json_invalid"),
        (b"[" * 100_000, "json_invalid"),
        (b'{"caption": 3}', "json_invalid"),
        (b'{"other": "x"}', "caption_missing"),
        (b'{"caption": ""}', "caption_empty"),
        (b'{"caption": "\\ud800"}', "caption_not_utf8"),
        (b'{"caption": "\xff"}', "caption_not_utf8"),
    ],
)
def test_json_that_cannot_be_used(raw, reason):
    assert reason_of(read_caption, {"json": raw}) == reason


def test_caption_missing_altogether():
    assert reason_of(read_caption, {"jpg": b""}) == "caption_missing"


def test_other_fields_are_metadata():
    raw = json.dumps({"caption": "a", "world": "3x3", "facts": [1]}).encode()
    assert read_caption({"json": raw}) == ("a", {"world": "3x3", "facts": [1]})


def test_text_member_goes_before_the_field():
    members = {"txt": b"right", "json": b'{"caption": "wrong", "url": "u"}'}
    assert read_caption(members) == ("right", {"url": "u"})


@pytest.mark.parametrize(
    ("fields", "probs"),
    [
        ({"preference_probs": [0.25, 0.75]}, (0.25, 0.75)),
        ({"label": 0}, (1.0, 0.0)),
        ({"label": 1}, (0.0, 1.0)),
        ({"label": 0.5}, (0.5, 0.5)),
    ],
)
def test_preferences(fields, probs):
    assert parse_preference(fields) == probs


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"label": 2},
        {"label": True},
        {"preference_probs": [1]},
        {"preference_probs": [0.9, 0.9]},
        {"preference_probs": [-1, 2]},
        {"preference_probs": [float("nan"), 1.0]},
        {"preference_probs": [float("inf"), float("-inf")]},
        {"preference_probs": [10**400, 1]},
        {"preference_probs": [0.3, 0.6]},
        {"preference_probs": [True, False]},
        {"preference_probs": "01"},
    ],
)
def test_preferences_that_make_no_sense(fields):
    assert reason_of(parse_preference, fields) == "preference_invalid"
