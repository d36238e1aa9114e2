# ruff: noqa: RUF001 - these tests are about such characters
import random
import time

import pytest

from segalign.text.clauses import ClauseSegmenter
from segalign.text.segmenter import OfficialSegmenter, SentenceSegmenter
from segalign.text.windows import WindowSegmenter

WRAPPED = "A long line of a paragraph that was wrapped at a\ncolumn goes on here."

# The segments of each caption, separated by "|" in place of the blanks between them.
HARD_CASES = [
    # decimals, versions, numbers
    "A 3.5 mm lens.|It costs $4.50 today.",
    "Version 1.2.3 is out.|Get it.",
    "It was built in 1990.|The roof is red.",
    "Room 5.|Red door.",
    "Fig. 3 shows No. 5 of vol. 2.",
    "It costs $1,000.50.|Cheap.",
    "Preis: 1.000,50 Euro.|Gut.",
    "The temperature is -3.5°C.|Cold.",
    "A score of 3-2.|They won.",
    "Open 24/7.|Come in at 10:30.|It is 50% off.",
    "It was made in the 1990s.|A cat.",
    "It is red.|3 cats sit.",
    # abbreviations
    "Cats, e.g. a tabby, vs. dogs, i.e. a pug.|Done.",
    "Mr. and Mrs. Jones met Dr. Smith on Elm St. in D.C. today.|Fine.",
    "They met at 5 p.m. on Sunday.|It rained.",
    "They met at 5 p.m.|The sun was low.",
    "It is approx. 3 m tall and weighs 2 lbs. in total.|Heavy.",
    "A board of 5 ft. by 3 in. in oak.|Plain.",
    "A lens of 85 mm.|Bokeh.",
    "A wall of 3 m.|The roof is red.",
    "A car at 90 km/h.|The road is wet.",
    "Apples, pears, etc. are shown.|Fine.",
    "They sell pears, etc.|The shop is red.",
    "She holds a Ph.D. in physics.|Good.",
    "A vase, c. 1850, stands there.|It is blue.",
    "Smith et al. show it.|Fine.",
    "Fifth Ave. and Main St. at night.|Cars pass.",
    "Two tbsp. of sugar and 1 tsp. of salt.|Mix.",
    "St. Peter's Basilica stands tall.|People pray.",
    "He sat.|The art is in the sun.|The cat has a fig.|It sleeps.",
    "Is it red?|No.|Is it blue?|Yes.",
    # initials
    "J. R. R. Tolkien wrote it.|He died.",
    "A poster of J.R.R. Tolkien hangs there.|It is old.",
    "George W. Bush waves.|People cheer.",
    "The U.S. flag waves.|It is red.",
    "Dr. A. B. Smith Jr. waves.|He left.",
    "He lives in the U.S.|She lives in the U.K. now.",
    "Mr. T. waves.|A cat.",
    "I saw it.|I ran.|So do I.|The cat sleeps.",
    # URLs and file names
    "See www.example.com or https://a.b/c?d=e.f for more.|Then stop.",
    "A file named a.b.c.png lies there.|It opens.",
    "Visit example.com.|Then a cat.",
    "Write to a.b@c.com.|Or call.",
    "An H.264 video.|@user.name posts.",
    # ellipses and other stops
    "Wait... what is that?|A cat!",
    "Wait...|It moves.",
    "“Wait…”|“It moves.”",
    "Wait… what is that?|A dog…|A cat.",
    "Wow!!|Really?!|Yes.",
    "A cat...a dog...|A bird.",
    "A cat . . . sleeps.|A dog runs.",
    "Wait.. what?|OK.",
    "The Yahoo! logo glows.|It is purple.",
    "Who?|me.|Why?",
    "Hello .|World .|Bye",
    # quotes and brackets
    '"Stop!" she said.|He did.',
    "He said “Stop.”|Then he left.",
    "“Hi!”|“Bye!”|They left.",
    "A sign reads 'NO ENTRY.' in red.|It hangs low.",
    "A cat (it is old.) sleeps.|Good.",
    'He asked "why?" and left.|Fine.',
    '"Hi! Bye!" she said.|He left.',
    "‘It is late.’|‘Go home.’",
    "«Привет.»|Он ушёл.",
    "(It rains.)|(It snows.)|The sky is dark.",
    "A cat.|(It is old. It sleeps.)|A dog.",
    "[A cat. A dog.]|A bird.",
    "A cat.[1]|A dog.[2]|A bird.",
    "It is 5'4\".|The door is low.",
    # lower case and missing stops
    "the scene is calm.|the sky is blue.|a dog runs",
    "no punctuation at all here",
    "4k.|uhd.|trending",
    # lists and lines
    "1. A red circle.|2. A blue square.",
    "A. A red one.|B. A blue one.",
    "1) A red circle.|2) A blue square.",
    "(a) A cat.|(b) A dog.",
    "[1] A cat.|[2] A dog.",
    "i. one cat.|ii. two dogs.",
    "I. A cat.|II. A dog.|III. A bird.",
    "1.1 A cat.|1.2 A dog.",
    "- a red cat\n|- a blue dog\n|- a green bird",
    "• red\n|• blue",
    "First line\n|Second line",
    "First.\r\n|Second.\r\n|Third",
    "First paragraph\n\n|second paragraph.",
    WRAPPED,
    "A long line of a caption that ends without a stop\n|Another line",
    "A cat.\n|🐈\n|A dog.",
    # other scripts
    "这是一只猫。|它在睡觉！|你看到了吗？",
    "他说：“你好。”|然后走了。",
    "「やめて。」と彼女は言った。|彼は止まった。",
    "मैं घर जा रहा हूँ।|तुम कहाँ हो?",
    "¿Qué?|¡No!|Sí.",
    "这是3.5米高的树。|它……很大。|真的！",
    "猫（かわいい。）が寝る。|「走れ。走れ。」と言った。",
    "고양이가 잔다.|개가 달린다.",
    "القط نائم؟|نعم.",
    "Ο σκύλος τρέχει.|Η γάτα κοιμάται;",
    # emoji, scenes
    "A cat 🐈.|A dog 🐕!|Fun 😀😀.",
    "A cat 🐈 sleeps.|🐕 A dog runs.|👍🏽 Yes.",
    "⭐ A cat.|❤️ A dog.",
    "A large red circle sits in the top left.|A small blue square sits in the centre.",
    # nothing but punctuation never is a segment of its own
    "...",
    "?!?",
    "A cat.\n---\n|A dog.",
    "*** A cat.|A dog. ***",
    "",
    "  \n ",
]


@pytest.mark.parametrize("case", HARD_CASES)
def test_hard_cases(case):
    parts = case.split("|")
    caption = parts[0]
    for part in parts[1:]:
        glued = caption.endswith("\n") or ord(part[0]) > 0x2FFF or ord(caption[-1]) > 0x2FFF
        caption += ("" if glued else " ") + part
    segments = SentenceSegmenter().split(caption)
    assert [s.text.strip() for s in segments] == [part.strip() for part in parts]


def test_the_rules_of_the_table_are_needed():
    assert len(HARD_CASES) == len(set(HARD_CASES)) >= 100


ALPHABET = [
    *"ab Z.?!;:,\"'()[]-•*1é\u0301ß؟।。！？…“”「」『』\n\r\t\v\x1c\x85\xa0\u2028\u3000\u200b\ufeff",
    *[
        "🐈",
        "👩‍👩‍👧",
        "\ud800",
        "\udfff",
        '"!',
        ';"',
        "...",
        "e.g. ",
        "Dr. ",
        "3.5",
        "1. ",
        "lbs. a",
    ],
    *["https://a.b/c?d", "\r\n", "\n\n", "a wrapped line that is longer than forty characters\nb"],
]


def odd_captions(num_captions):
    draw = random.Random(0)
    for _ in range(num_captions):
        yield "".join(draw.choices(ALPHABET, k=draw.choice((1, 2, 5, 20, 80))))
    yield "".join(draw.choices(ALPHABET, k=num_captions))
    yield "Z\u3000. \u3000Z\x85.\u2028A\xa0."  # blanks of several bytes before a stop
    yield "x" * 10_000
    yield "." * 10_000
    yield "\n" * 10_000


@pytest.mark.parametrize(
    ("segmenter", "num_captions"),
    [
        (SentenceSegmenter(), 1500),
        (OfficialSegmenter(), 1500),
        (ClauseSegmenter(), 1500),
        (ClauseSegmenter(min_words=1), 1500),
        (WindowSegmenter(), 100),  # fewer: cleaning of odd characters is slow
        (WindowSegmenter(num_tokens=3), 50),
    ],
)
def test_spans_tile_any_caption(segmenter, num_captions):
    for caption in odd_captions(num_captions):
        segments = segmenter.split(caption)
        bounds = [segment.start for segment in segments] + [len(caption)]
        assert bounds[0] == 0
        assert [segment.end for segment in segments] == bounds[1:]
        assert len(bounds) == 2 or bounds == sorted(set(bounds))
        if not isinstance(segmenter, OfficialSegmenter):  # which rewrites text
            assert all(s.text == caption[s.start : s.end] for s in segments)


def test_every_sentence_segment_has_a_word_if_the_caption_has():
    for caption in ["...A. ... B. ---", "\n\n? A\n.\n.\nB", "“ ” A. “ ” 🐈. ! B"]:
        segments = SentenceSegmenter().split(caption)
        assert all(any(c.isalnum() or c == "🐈" for c in segment.text) for segment in segments)


def test_official_spans_cover_the_dropped_stops():
    caption = 'A cat."! ?B;" c'
    segments = OfficialSegmenter().split(caption)
    assert [s.text for s in segments] == ["A cat.", " .", "B.", " c."]
    assert [caption[s.start : s.end] for s in segments] == ['A cat."!', " ?", 'B;"', " c"]


def test_long_captions_are_split_fast():
    sentence = "In the lower left, e.g. near a 3.5 m wall, an old woman stands. Is she 80? "
    caption = sentence * 40
    assert len(caption.split()) > 600
    times = []
    for _ in range(5):
        start = time.process_time()
        segments = SentenceSegmenter().split(caption)
        times.append(time.process_time() - start)
    assert len(segments) == 80
    assert min(times) < 0.005  # 0.0003 measured; the rest is for a busy machine


@pytest.mark.parametrize(
    "unit", ["“a. ", "猫在睡觉。", "lbs. a ", ".\n", "a wrapped line of forty characters or so\n"]
)
def test_time_grows_linearly(unit):
    def seconds(num_chars):
        caption = unit * (num_chars // len(unit))
        start = time.process_time()
        SentenceSegmenter().split(caption)
        return time.process_time() - start

    short, long = (min(seconds(n) for _ in range(3)) for n in (8_000, 64_000))
    assert long < 30 * short  # 8 if linear, 64 if quadratic


@pytest.mark.parametrize("sentence", ["猫在睡觉。", "A cat sleeps. ", "the cat sleeps. "])
def test_huge_lines_are_cut_at_sentences_only(sentence):
    segments = SentenceSegmenter().split(sentence * 5_000)
    assert {segment.text for segment in segments} == {sentence}
