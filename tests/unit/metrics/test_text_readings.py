"""Readings of captions: whole, and means of their first segments."""

import pytest
import torch
from toy_scorer import toy_caption, toy_scorer

from segalign.errors import ConfigError
from segalign.metrics.text_readings import TextReadings, segment_positions
from segalign.text.segmenter import SentenceSegmenter


def test_means_are_those_of_the_first_segments():
    scorer = toy_scorer(SentenceSegmenter())
    captions = [toy_caption(number) for number in range(4)]
    readings = TextReadings((1, 3))
    assert readings.names == ("single", "first 1", "first 3", "average")
    with torch.no_grad():
        whole, segments = scorer.text_features(captions), scorer.segment_features(captions)
        found = readings.features(whole, segments)
        assert [len(part) for part in segments.split()] == [2, 3, 4, 5]
        for row, caption in enumerate(captions):
            texts = scorer.split(caption)
            for place, count in enumerate((1, 3, None), start=1):
                expected = scorer.text_features(texts[:count]).mean(0)
                torch.testing.assert_close(found[row, place], expected, rtol=0, atol=1e-6)
    assert torch.equal(found[:, 0], whole)
    assert found[3, 3].norm() < 0.9999
    assert found.dtype == torch.float32


def test_segments_are_numbered_by_caption():
    assert segment_positions(torch.tensor([0, 0, 0, 1, 2, 2])).tolist() == [0, 1, 2, 0, 0, 1]


def test_any_scorer_reads_in_segments_with_a_given_segmenter():
    scorer = toy_scorer(SentenceSegmenter())
    captions = [toy_caption(3), "dog and " * 100 + "owl. It rains.", ""]
    theirs = scorer.segment_features(captions)
    found = toy_scorer().segment_features(captions, segmenter=SentenceSegmenter())
    assert found.texts == theirs.texts
    assert torch.equal(found.owner, theirs.owner)
    assert torch.equal(found.features, theirs.features)


@pytest.mark.parametrize("numbers", [(2, 1), (1, 1), (0, 2)])
def test_numbers_must_ascend(numbers):
    with pytest.raises(ConfigError, match=r"ascending positive numbers; got \["):
        TextReadings(numbers)
