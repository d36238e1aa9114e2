"""Colours of segments: steps, borders, and what has no score."""

import math

import pytest

from segalign.evaluation.heat import NO_STEP, HeatScale, heat_segments


def test_steps_are_of_equal_width():
    scale = HeatScale(0.0, 7.0)
    assert [scale.step(score) for score in (-1, 0, 0.99, 1, 3.5, 6.99, 7, 8)] == [
        0, 0, 0, 1, 3, 6, 6, 6,
    ]  # fmt: skip
    assert scale.step(math.nan) == NO_STEP
    assert scale.labels() == [
        "below 1.000", "1.000 to 2.000", "2.000 to 3.000", "3.000 to 4.000", "4.000 to 5.000",
        "5.000 to 6.000", "above 6.000",
    ]  # fmt: skip


def test_few_far_scores_do_not_stretch_the_scale():
    scores = [float(number) for number in range(99)] + [1e6, -1e6, math.nan]
    scale = HeatScale.of(scores)
    assert (scale.low, scale.high) == (4, 94)
    assert HeatScale.of([math.nan]) == HeatScale(0, 1)
    assert HeatScale.of([2.0]).step(2.0) == 3


def test_segments_join_to_the_caption_and_the_lowest_is_marked():
    caption = "One. Two. Three."
    spans = [[0, 5], [5, 10], [10, 16]]
    found = heat_segments(caption, spans, [0.3, 0.1, None], HeatScale(0.1, 0.3))
    assert "".join(one.text for one in found) == caption
    assert [(one.score, one.step, one.is_lowest) for one in found] == [
        ("0.300", 6, False), ("0.100", 0, True), ("-", NO_STEP, False),
    ]  # fmt: skip
    equal = heat_segments(caption, spans, [0.2, 0.2, 0.2], HeatScale(0.1, 0.3))
    assert not any(one.is_lowest for one in equal)
    with pytest.raises(ValueError, match="shorter"):
        heat_segments(caption, spans, [0.1], HeatScale(0, 1))
