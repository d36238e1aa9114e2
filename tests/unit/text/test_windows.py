# ruff: noqa: RUF001 - these tests are about such characters
import pickle
import random
from itertools import pairwise

import pytest

from segalign.errors import ConfigError
from segalign.text import windows
from segalign.text.tokenizer import word_token_ids
from segalign.text.windows import WindowSegmenter

WORDS = ["red", "extraordinary", "cat,", "3.5", "it's", "a", "(b)", "Elm."]


def texts(segments):
    return [segment.text for segment in segments]


def test_cuts_at_blanks(tokenizer):
    segmenter = WindowSegmenter(4, tokenizer)
    assert texts(segmenter.split("a red cat sits. on the  mat\nnow")) == [
        "a red cat ",
        "sits. on the  ",
        "mat\nnow",
    ]


def test_a_caption_that_fits_is_one_window(tokenizer):
    caption = "a cat. " * 25
    assert texts(WindowSegmenter(75, tokenizer).split(caption)) == [caption]
    assert len(WindowSegmenter(74, tokenizer).split(caption)) == 2


@pytest.mark.parametrize("num_tokens", [3, 8, 75])
def test_windows_are_as_long_as_fits(tokenizer, num_tokens):
    draw = random.Random(num_tokens)
    caption = " ".join(draw.choices(WORDS, k=300))
    found = WindowSegmenter(num_tokens, tokenizer).split(caption)
    for window, next_window in pairwise(found):
        next_word = next_window.text.split()[0]
        assert len(word_token_ids(window.text, tokenizer)) <= num_tokens
        assert len(word_token_ids(window.text + next_word, tokenizer)) > num_tokens
        assert window.text.endswith(" ")


@pytest.mark.parametrize("num_tokens", [1, 4, 75])
def test_windows_never_have_too_many_tokens(tokenizer, num_tokens):
    draw = random.Random(num_tokens)
    # Cleaning makes other characters of some of these, alone or together.
    parts = [*WORDS, " ", "\x85", "Ã", "\xa0", "©", "â€", "™", "&amp;", "&", "lt;", "<", "，", "é"]
    for _ in range(25):
        caption = "".join(draw.choices(parts, k=draw.choice((5, 30, 100))))
        found = WindowSegmenter(num_tokens, tokenizer).split(caption)
        assert "".join(texts(found)) == caption
        for text in texts(found):
            assert len(text) == 1 or len(word_token_ids(text, tokenizer)) <= num_tokens


def test_words_that_fit_no_window_are_cut(tokenizer):
    assert len(word_token_ids("猫", tokenizer)) == 3
    found = WindowSegmenter(20, tokenizer).split("A " + "猫" * 25)
    assert texts(found) == ["A " + "猫" * 6, *["猫" * 6] * 3, "猫"]
    found = WindowSegmenter(20, tokenizer).split("A cat on a " + "猫" * 25)
    assert texts(found) == ["A cat on a ", *["猫" * 6] * 4, "猫"]


def test_long_blanks_stay_with_a_word(tokenizer):
    caption = "\n" * 5_000 + "a cat" + " " * 5_000 + "a dog"
    found = WindowSegmenter(2, tokenizer).split(caption)
    assert [text.split() for text in texts(found)] == [["a", "cat"], ["a", "dog"]]


def test_the_tokenizer_is_built_when_needed(monkeypatch):
    built = []
    monkeypatch.setattr(windows, "clip_tokenizer", lambda: built.append(1) or pytest.fail("built"))
    WindowSegmenter()
    assert not built


def test_counts_with_a_given_tokenizer(tokenizer, monkeypatch):
    monkeypatch.setattr(windows, "clip_tokenizer", lambda: pytest.fail("built"))
    assert len(WindowSegmenter(2, tokenizer).split("a red cat")) == 2


def test_tokenizes_each_word_once(tokenizer, monkeypatch):
    tokenized = []
    monkeypatch.setattr(
        windows,
        "word_token_ids",
        lambda text, tokenizer: tokenized.append(text) or word_token_ids(text, tokenizer),
    )
    WindowSegmenter(10, tokenizer).split("a red cat, " * 200)
    assert sorted(text for text in tokenized if " " not in text) == ["a", "cat,", "red"]


def test_counts_with_the_clip_tokenizer(tokenizer):
    caption = " ".join(WORDS * 30)
    assert WindowSegmenter().split(caption) == WindowSegmenter(75, tokenizer).split(caption)


def test_can_be_sent_to_another_process(tokenizer):
    segmenter = WindowSegmenter(5)
    expected = segmenter.split("a red cat sits on the mat")
    assert pickle.loads(pickle.dumps(segmenter)).split("a red cat sits on the mat") == expected


def test_each_character_is_read_a_few_times(tokenizer, monkeypatch):
    num_read = 0

    def count_characters(text, tokenizer):
        nonlocal num_read
        num_read += len(text)
        return word_token_ids(text, tokenizer)

    monkeypatch.setattr(windows, "word_token_ids", count_characters)
    for unit in ("a red cat, ", "x", "猫", " "):
        for num_chars in (4_000, 16_000):
            num_read = 0
            caption = unit * (num_chars // len(unit))
            WindowSegmenter(75, tokenizer).split(caption)
            assert num_read < 16 * num_chars


@pytest.mark.parametrize("num_tokens", [0, -1, 7.5, "75", True, None])
def test_refuses_impossible_settings(num_tokens):
    with pytest.raises(ConfigError, match="`num_tokens` must be an integer of at least 1; got"):
        WindowSegmenter(num_tokens)
