# ruff: noqa: RUF001 - these tests are about such characters
import random
import time

import pytest

from segalign.errors import ConfigError
from segalign.text.clauses import ClauseSegmenter
from segalign.text.segmenter import SentenceSegmenter

# The clauses of each caption, separated by "|"; blanks stay with the clause before them.
CASES = [
    "A woman in a red dress, |smiling at the camera, |holds a balloon.",
    "A dog sleeps here; |two cats play; |it rains outside.",
    "The sign has text: |no entry at night.",
    "The cat is grey — |it sleeps all day — |on the sofa there.",
    "The cat is grey—|it sleeps all day.",
    "The cat is grey - |it sleeps all day – |on the sofa -- |near the door.",
    "the cat is grey--|it sleeps all day",
    # not inside numbers
    "At 3:45 they count 1,000 balloons.",
    "A box of 10 - 20 cats or 30—40 dogs.",
    "There were 2,000 cats, |1,000 dogs and 5 birds.",
    "在这里有10，000个球，|还有一只猫。",
    # not inside words and URLs
    "A well-known black-and-white cat, |which is very old.",
    "A page from 1990–2020 lies here.",
    "See it at https://a.b/c,d;e:f--g?x=1,2, |then stop reading it.",
    "Now see www.a.b/c—|then stop reading.",
    # quotes and brackets after the separator
    'A sign reads "no entry," |and it is red.',
    "One old cat (tabby, |grey, fat, old), |two young dogs.",
    "他说了“你好，”|然后走了。",
    # lists and short clauses
    "A box of red, |green and blue balls.",
    "red, green and blue",
    "Red, green, blue, |yellow, and white flags.",
    "A box with a, |b, c, d, |e, f, g.",
    "However, the cat sleeps.",
    "The cat sleeps here, too.",
    "A cat, too. |A dog, too.",
    # other scripts
    "一只红色的猫，|在沙发上睡觉；|旁边有一只狗：|它很大。",
    "红色、绿色、|蓝色的球",
    "『もうやめて、』|と彼女は言った、|それから去った。",
    "القط نائم هنا، |والكلب يجري هناك.",
    # sentences first
    "A cat sleeps. |A dog runs in the park, |a bird sings.",
    # nothing to cut
    "",
    "  ",
    ", , ,",
    "No separator at all here",
]


@pytest.mark.parametrize("case", CASES)
def test_cases(case):
    parts = case.split("|")
    segments = ClauseSegmenter().split("".join(parts))
    assert [segment.text for segment in segments] == parts


def test_min_words_is_a_setting():
    def clauses(min_words):
        return [s.text for s in ClauseSegmenter(min_words).split("red, green and blue, or grey")]

    assert clauses(1) == ["red, ", "green and blue, ", "or grey"]
    assert clauses(2) == ["red, green and blue, ", "or grey"]
    assert clauses(4) == ["red, green and blue, or grey"]


@pytest.mark.parametrize("min_words", range(1, 6))
def test_clauses_have_enough_words_unless_the_sentence_has_not(min_words):
    draw = random.Random(min_words)
    for _ in range(200):
        words = draw.choices(["cat,", "dog", "red;", "—", "3.5", "it's", "runs.", "Then"], k=25)
        caption = " ".join(words)
        clauses = ClauseSegmenter(min_words).split(caption)
        for sentence in SentenceSegmenter().split(caption):
            inside = [c for c in clauses if sentence.start <= c.start and c.end <= sentence.end]
            assert "".join(clause.text for clause in inside) == sentence.text
            counts = [sum(word != "—" for word in clause.text.split()) for clause in inside]
            assert len(counts) == 1 or min(counts) >= min_words


@pytest.mark.parametrize("min_words", [0, -1, 2.5, "3", True, None])
def test_refuses_impossible_settings(min_words):
    with pytest.raises(ConfigError, match="`min_words` must be an integer of at least 1; got"):
        ClauseSegmenter(min_words)


@pytest.mark.parametrize("unit", [" ", "a, ", "— ", "， ", "https://a.b/c, "])
def test_time_grows_linearly(unit):
    def seconds(num_chars):
        caption = unit * (num_chars // len(unit))
        start = time.process_time()
        ClauseSegmenter().split(caption)
        return time.process_time() - start

    short, long = (min(seconds(n) for _ in range(3)) for n in (4_000, 32_000))
    assert long < 30 * short  # 8 if linear, 64 if quadratic
