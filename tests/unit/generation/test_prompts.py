"""Prompts files: what counts as a prompt, and how bad lines are named."""

import json

import pytest

from segalign.errors import ConfigError
from segalign.generation.prompts import BadLine, Prompt, number_texts, read_prompts


def test_texts_are_numbered():
    assert number_texts(["a", "a"]) == [Prompt(0, "a"), Prompt(1, "a")]


def test_a_text_file_has_a_prompt_on_each_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b'\xef\xbb\xbfA fox.\r\n{"prompt": 1}\n\xe2\x80\xa8 A "wall"\x0b.')
    prompts, bad = read_prompts(path)
    assert prompts == [
        Prompt(0, "A fox."),
        Prompt(1, '{"prompt": 1}'),
        Prompt(2, '\u2028 A "wall"\x0b.'),
    ]
    assert bad == []


def test_every_bad_line_is_named_and_the_rest_kept(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        b'{"prompt": "one"}',
        b"not JSON",
        b"[1]",
        b'{"text": "two"}',
        b'{"prompt": 7}',
        b'{"prompt": null, "caption": "three"}',
        b"",
        b'{"prompt": "  "}',
        b'{"prompt": "\xff"}',
        b'{"caption": "ten", "id": "fox/../x", "seed": 5}',
        b'{"prompt": "eleven", "id": 40}',
        b'{"prompt": "twelve", "id": 40}',
        b'{"prompt": "thirteen", "seed": "x"}',
        b'{"prompt": "fourteen", "id": -1}',
        b'{"prompt": "fifteen", "seed": true}',
        b"[" * 100_000,
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    prompts, bad = read_prompts(path)
    assert prompts == [
        Prompt(0, "one"),
        Prompt(9, "ten", "fox/../x", 5),
        Prompt(40, "eleven"),
    ]
    assert [line.number for line in bad] == [2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16]
    reasons = {line.number: line.reason for line in bad}
    assert reasons[2].startswith("expected JSON; got: ")
    assert reasons[3] == "expected an object with `prompt`; got a list"
    assert reasons[4] == "expected `prompt` or `caption`; got neither"
    assert reasons[5] == "expected `prompt` to be a string; got a number"
    assert reasons[6] == "expected `prompt` to be a string; got null"
    assert reasons[7] == "expected a prompt; got an empty line"
    assert reasons[8] == "expected text in `prompt`; got none"
    assert reasons[9] == "expected UTF-8; got byte 0xff"
    assert reasons[12] == "expected an id of its own; got 40 again"
    assert reasons[13] == "expected `seed` to be an integer in [0, 2^63); got 'x'"
    assert reasons[14] == "expected `id` in [0, 2^63); got -1"
    assert "got True" in reasons[15]


def test_an_empty_line_of_text_is_bad_and_an_empty_file_is_not(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n \nthree\n")
    prompts, bad = read_prompts(path)
    assert [prompt.sample_id for prompt in prompts] == [0, 2]
    assert bad == [BadLine(2, "expected a prompt; got an empty line")]
    path.write_text("")
    assert read_prompts(path) == ([], [])


def test_hostile_text_passes_through(tmp_path):
    path = tmp_path / "prompts.jsonl"
    texts = ["\0\0 a", "\ud800 alone", "x " * 500_000]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    prompts, bad = read_prompts(path)
    assert [prompt.text for prompt in prompts] == texts
    assert bad == []


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"prompts file at .*none.txt`; got: No such file"):
        read_prompts(tmp_path / "none.txt")
