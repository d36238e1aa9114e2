"""Buckets of pairs, at their borders and against the other definition of token positions."""

import pytest
from toy_scorer import toy_scorer

from segalign.errors import DataError
from segalign.metrics.pair_buckets import (
    SEGMENT_GROUPS,
    fact_place,
    fact_segment,
    length_bucket,
    pair_buckets,
    segment_group,
)
from segalign.scenes.accuracy import FactRecord, token_bucket
from segalign.scenes.samples import make_sample
from segalign.text.segmenter import SentenceSegmenter
from segalign.text.tokenizer import char_token_positions

SENTENCES = SentenceSegmenter()


@pytest.fixture(scope="module")
def scorer():
    return toy_scorer()


@pytest.mark.parametrize(
    ("num_words", "bucket"),
    [(1, "1-77"), (75, "1-77"), (76, "78-154"), (152, "78-154"), (153, "155-308"),
     (306, "155-308"), (307, "over_308")],
)  # fmt: skip
def test_length_counts_start_and_end(scorer, num_words, bucket):
    assert length_bucket(scorer, "dog " * num_words) == f"length/{bucket}"


def test_fact_places_are_those_of_the_scenes(scorer):
    places = set()
    for index in range(8):
        sample = make_sample("3x3", 0, index, length="long")
        positions = char_token_positions(sample.caption, scorer.tower.tokenizer)
        for *_, start, end in sample.metadata["facts"]:
            record = FactRecord("shape", 0, "", positions[start], positions[end - 1])
            expected = (token_bucket(record) or "across_77").replace("32", "77")
            assert fact_place(scorer, sample.caption, start, end) == expected
            places.add(expected)
    assert places == {"within_77", "across_77", "past_77"}


def test_fact_places_at_the_border(scorer):
    caption = "dog " * 100
    assert fact_place(scorer, caption, 0, 4 * 75) == "within_77"
    assert fact_place(scorer, caption, 0, 4 * 76) == "across_77"
    assert fact_place(scorer, caption, 4 * 74, 4 * 76) == "across_77"
    assert fact_place(scorer, caption, 4 * 75, 4 * 76) == "past_77"


def test_text_that_cleaning_changes_has_a_place(scorer):
    caption = "A “red” fox &amp; an owl. It rains."
    start = caption.index("It")
    metadata = {"edited": {"start": start, "end": len(caption)}}
    assert pair_buckets(scorer, SENTENCES, caption, metadata) == (
        "all", "length/1-77", "within_77", "fact_in_segment/2-3",
    )  # fmt: skip


def test_a_segment_is_found_by_its_first_character(scorer):
    caption = "One fox. " * 9
    found = [fact_segment(scorer, SENTENCES, caption, 9 * number) for number in range(9)]
    groups = ["1", "2-3", "2-3", "4-7", "4-7", "4-7", "4-7", "from_8", "from_8"]
    assert found == [f"fact_in_segment/{group}" for group in groups]
    assert [SEGMENT_GROUPS[segment_group(number)] for number in (0, 1, 2, 3, 6, 7, 50)] == [
        "1", "2-3", "2-3", "4-7", "4-7", "8+", "8+",
    ]  # fmt: skip


def test_pieces_of_a_long_segment_count(scorer):
    caption = "dog and " * 100 + "owl."
    assert len(scorer.pieces(caption, SENTENCES)) == 3
    assert fact_segment(scorer, SENTENCES, caption, len(caption) - 4) == "fact_in_segment/2-3"


@pytest.mark.parametrize("metadata", [{}, {"edited": None}])
def test_pairs_without_a_fact_have_a_length(scorer, metadata):
    assert pair_buckets(scorer, SENTENCES, "A fox.", metadata) == ("all", "length/1-77")


@pytest.mark.parametrize(
    "edited",
    [{"start": 3, "end": 3}, {"start": -1, "end": 3}, {"start": 0, "end": 7}, {"start": 0},
     {"start": True, "end": 3}, {"start": 0.0, "end": 3}, "0:3", [0, 3]],
    ids=str,
)  # fmt: skip
def test_edits_must_be_characters_of_the_caption(scorer, edited):
    with pytest.raises(DataError, match="characters of its caption of 6; got") as caught:
        pair_buckets(scorer, SENTENCES, "A fox.", {"edited": edited})
    assert "\n" not in str(caught.value)
