# ruff: noqa: RUF001 - these tests are about such characters
import random

import pytest

from segalign.text.long_segments import cut_segment
from segalign.text.segmenter import OfficialSegmenter, Segment
from segalign.text.tokenizer import word_token_ids


def words(text):
    return len(text.split())


def texts(pieces):
    return [piece.text for piece in pieces]


def test_a_segment_that_fits_comes_back_alone():
    segment = Segment("one two three", 5, 18)
    assert cut_segment(segment, 3, words) == [segment]


def test_prefers_clause_punctuation_in_the_second_half():
    pieces = cut_segment(Segment("a b, c d e f g, h i j", 0, 21), 8, words)
    assert texts(pieces) == ["a b, c d e f g, ", "h i j"]


def test_ignores_clause_punctuation_near_the_start():
    pieces = cut_segment(Segment("a, b c d e f g h i j", 0, 20), 8, words)
    assert texts(pieces)[0] == "a, b c d e f g h "


def test_cuts_at_a_blank_where_there_is_no_clause():
    assert texts(cut_segment(Segment("aa bb cc dd ee", 0, 14), 2, words)) == [
        "aa bb ",
        "cc dd ",
        "ee",
    ]


def test_cuts_anywhere_where_there_is_no_blank():
    assert texts(cut_segment(Segment("abcdefg", 0, 7), 3, len)) == ["abc", "def", "g"]


@pytest.mark.parametrize("max_word_tokens", range(1, 9))
def test_pieces_are_as_long_as_fits(max_word_tokens):
    lengths = [
        len(piece.text) for piece in cut_segment(Segment("x" * 41, 0, 41), max_word_tokens, len)
    ]
    assert set(lengths[:-1]) == {max_word_tokens}
    assert 1 <= lengths[-1] <= max_word_tokens


def test_passes_over_a_boundary_at_which_the_piece_would_not_fit():
    def count(text):
        return len(text) + (5 if text.endswith(" ") else 0)

    pieces = cut_segment(Segment("abc defghijk", 0, 12), 6, count)
    assert texts(pieces) == ["abc de", "fghijk"]


def test_cuts_before_a_decimal_comma_only_if_it_must():
    assert texts(cut_segment(Segment("size 1,5 metres", 0, 15), 10, len))[0] == "size 1,5 "


def test_a_single_unfitting_character_ends_the_cutting():
    assert texts(cut_segment(Segment("abc", 0, 3), 0, len)) == ["a", "b", "c"]


@pytest.mark.parametrize("seed", range(8))
def test_pieces_fit_and_lose_nothing(tokenizer, seed):
    def count(text):
        return len(word_token_ids(text, tokenizer))

    draw = random.Random(seed)
    alphabet = [
        "red ",
        "extraordinary",
        ", ",
        "“",
        "…",
        "&amp; ",
        "，",
        "猫",
        "🐈",
        " ",
        "(a) ",
        "\x00",
    ]
    text = "".join(draw.choices(alphabet, k=600))
    pieces = cut_segment(Segment(text, 100, 100 + len(text)), 75, count)
    assert len(pieces) > 3
    assert "".join(texts(pieces)) == text
    assert all(count(piece.text) <= 75 for piece in pieces)
    bounds = [piece.start for piece in pieces] + [100 + len(text)]
    assert bounds[0] == 100
    assert [piece.end for piece in pieces] == bounds[1:]
    assert all(len(piece.text) == piece.end - piece.start for piece in pieces)


def test_spans_stay_inside_a_rewritten_segment():
    caption = "red apples, " * 60
    (segment,) = OfficialSegmenter().split(caption)
    pieces = cut_segment(segment, 75, words)
    assert "".join(texts(pieces)) == segment.text == caption + "."
    assert pieces[-1].end == len(caption)
    assert [piece.end for piece in pieces[:-1]] == [piece.start for piece in pieces[1:]]


def test_cost_grows_linearly():
    def cost(length):
        seen = 0

        def count(text):
            nonlocal seen
            seen += len(text)
            return len(text)

        cut_segment(Segment("x" * length, 0, length), 75, count)
        return seen

    assert cost(40_000) < 5 * cost(10_000)


def test_a_word_that_never_fits_fills_the_piece(tokenizer):
    def count(text):
        return len(word_token_ids(text, tokenizer))

    pieces = texts(cut_segment(Segment("A " + "猫" * 60, 0, 62), 75, count))
    assert pieces == ["A ", "猫" * 25, "猫" * 25, "猫" * 10]
    pieces = texts(cut_segment(Segment("A " + "猫" * 20 + "，" + "猫" * 60, 0, 83), 75, count))
    assert pieces == ["A " + "猫" * 20 + "，", "猫" * 25, "猫" * 25, "猫" * 10]


def test_blanks_longer_than_what_is_looked_at_stay_together():
    text = " " * 3_000 + "a b" + "\n" * 3_000 + "c"
    pieces = texts(cut_segment(Segment(text, 0, len(text)), 2, words))
    assert pieces == [" " * 3_000 + "a b" + "\n" * 3_000, "c"]


def test_counts_words_not_prefixes():
    num_calls = 0

    def count(text):
        nonlocal num_calls
        num_calls += 1
        return words(text)

    text = "red cat " * 500
    pieces = cut_segment(Segment(text, 0, len(text)), 75, count)
    assert len(pieces) == 14
    assert num_calls < 1.2 * (1_000 + 14)


@pytest.mark.parametrize(
    "count",
    [
        lambda text: 3 * len(text),
        lambda text: 3 * len(text) if len(text) < 25 else 75 + (len(text) > 900),
        lambda text: 0 if len(text) < 900 else 76,
        lambda text: len(text) ** 2,
        lambda text: len(text).bit_length() * 10,
    ],
)
def test_looks_for_the_cut_in_few_steps(count):
    num_calls = 0

    def counted(text):
        nonlocal num_calls
        num_calls += 1
        return count(text)

    length = len(cut_segment(Segment("x" * 1_000, 0, 1_000), 75, counted)[0].text)
    assert count("x" * length) <= 75 < count("x" * (length + 1))
    # Less than 40 for the first piece; the others only add theirs.
    assert num_calls < 40 * -(-1_000 // length)
