# ruff: noqa: RUF001 - these tests are about such characters
import sys
from typing import get_args

import numpy as np
import pytest

from segalign.errors import DataError
from segalign.text import tokenizer as module
from segalign.text.tokenizer import (
    TextCleaning,
    char_token_positions,
    clean_text,
    clip_tokenizer,
    word_token_ids,
)


def test_knows_the_published_ids(tokenizer):
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(tokenizer) == 49408
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 49407


def test_another_pad_token():
    assert clip_tokenizer(pad_token="!").pad_token_id == 0


def test_equals_the_original_tokenizer_on_odd_text(tokenizer):
    import open_clip

    original = open_clip.SimpleTokenizer()
    texts = ["“Curly” it’s", "naïve café…", "FULL ＷＩＤＴＨ", "3.5mm @ f/1.8 🐈", "don't we'll"]
    for text in texts:
        assert list(word_token_ids(text, tokenizer)) == original.encode(text)


ODD_TEXTS = [
    "“Curly” it’s ‘so’",
    "naïve café… e\u0301",
    "FULL ＷＩＤＴＨ １２",
    "3.5mm @ f/1.8 🐈",
    "don't we'll",
    "a &amp; b",
    "1 < 2 &amp; 3",
    "1 < 2 &amp;quot; 3",
    "&amp;lt;b&amp;gt; twice",
    "<b>bold</b> &quot;x&quot; &#39;y&#39;",
    "ΟΔΟΣ Σ ἈΣ.",
    "İstanbul ẞ ǅ",
    "tab\tnew\nline\r\x0b\x0c\x85end",
    " \u3000wide\u2003blank ",
    "\x1fa\x00b\x7f",
    "ﬁne ﬀ",
    "日本語のテキスト。",
    "Ã©tÃ© mojibake",
    "§±²½",
    "a\u200bb\ufeffc",
    "",
]


def test_cleaning_of_open_clip_is_its_tokenizers(tokenizer):
    import open_clip

    original = open_clip.SimpleTokenizer()
    for text in ODD_TEXTS:
        assert list(word_token_ids(text, tokenizer, "open_clip")) == original.encode(text), text


def test_no_cleaning_is_that_of_transformers(tokenizer):
    for text in ODD_TEXTS:
        theirs = tokenizer(text, add_special_tokens=False).input_ids
        assert list(word_token_ids(text, tokenizer, "none")) == theirs, text


def test_the_cleanings_differ(tokenizer):
    def differ(text):
        return len({word_token_ids(text, tokenizer, kind) for kind in get_args(TextCleaning)})

    assert differ("a plain caption") == 1
    assert differ("a “quote”") == 2
    assert differ("“1” < 2 &amp; 3") == 3


def test_every_cleaning_makes_text_that_can_be_encoded(tokenizer):
    for kind in get_args(TextCleaning):
        assert word_token_ids("a\ud800b", tokenizer, kind)
        assert clean_text("a\ud800b", kind) == "a\ufffdb"


def test_says_when_the_vocabulary_is_missing(monkeypatch):
    monkeypatch.setattr(module, "_VOCAB_FILE", "nowhere.gz")
    with pytest.raises(DataError, match="reinstall `open_clip_torch`"):
        clip_tokenizer()


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("plain, <b> text: 100%", "plain, <b> text: 100%"),
        ("“quoted” it’s", '"quoted" it\'s'),
        ("a &amp; b", "a & b"),
        ("ＦＵＬＬ", "FULL"),
        ("a\ud800b", "a\ufffdb"),
        ("a\x00b", "ab"),
    ],
)
def test_cleaning(text, clean):
    assert clean_text(text) == clean


def test_the_fast_path_of_cleaning_changes_nothing():
    import ftfy

    printable = "".join(map(chr, [9, 10, *range(32, 127)])).replace("&", "")
    assert clean_text(printable) == ftfy.fix_text(printable)


@pytest.mark.parametrize("text", ["a <|endoftext|> b", "<|startoftext|>"])
def test_names_of_special_tokens_are_words(tokenizer, text):
    assert not {49406, 49407} & set(word_token_ids(text, tokenizer))


def test_word_ids_ignore_settings_of_earlier_calls(tokenizer):
    tokenizer(["a cat"], truncation=True, max_length=3, padding="max_length")
    assert len(word_token_ids("one two three four five", tokenizer)) == 5


def test_char_positions_of_words_blanks_and_rare_words(tokenizer):
    caption = " A cat  sat."
    # a=1 cat=2 sat=3 .=4; a blank counts with the token after it
    assert char_token_positions(caption, tokenizer).tolist() == [1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4]


def test_char_positions_agree_with_the_token_ids(tokenizer):
    caption = "An extraordinarily red-and-blue zwieback, 3.5 cm wide; it's café 🐈 time. " * 4
    positions = char_token_positions(caption, tokenizer)
    ids = word_token_ids(caption, tokenizer)
    assert positions.max() == len(ids)
    assert (np.diff(positions) >= 0).all()
    for match in ("zwieback", "wide", "time"):
        start = caption.rindex(match)
        stop = positions[start : start + len(match)].max()
        prefix = caption[: start + len(match)]
        assert word_token_ids(prefix, tokenizer) == ids[:stop]


def test_a_character_of_several_tokens_has_the_last_position(tokenizer):
    num_tokens = len(word_token_ids("𓀀", tokenizer))
    assert num_tokens > 1
    assert char_token_positions("𓀀", tokenizer).tolist() == [num_tokens]


@pytest.mark.parametrize(("caption", "expected"), [("", []), ("  ", [0, 0]), ("a ", [1, 1])])
def test_char_positions_without_words(tokenizer, caption, expected):
    assert char_token_positions(caption, tokenizer).tolist() == expected


def test_char_positions_refuse_text_that_cleaning_changes(tokenizer):
    with pytest.raises(DataError, match="character 3 of"):
        char_token_positions("it ’s", tokenizer)


def test_does_not_import_open_clip(monkeypatch):
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    clip_tokenizer()
    assert "open_clip" not in sys.modules
