"""Groups of scores at their borders, and what is missing."""

import math
import random

import pytest

from segalign.metrics.score_groups import by_length, by_position, finite, mean, offsets


def test_lengths_at_their_borders():
    tokens = [1, 77, 78, 154, 155, 308, 309, None, 5]
    groups = by_length(tokens, [1.0, 2, 3, 4, 5, 6, 7, None, math.nan])
    assert groups == {
        "length/1-77": [1, 2], "length/78-154": [3, 4], "length/155-308": [5, 6],
        "length/over_308": [7],
    }  # fmt: skip


def test_positions_at_their_borders():
    groups = by_position([list(range(9)), None, [10.0]])
    assert groups == {"1": [0, 10], "2-3": [1, 2], "4-7": [3, 4, 5, 6], "from_8": [7, 8]}
    assert by_position([None]) == {}


def test_offsets_are_from_the_own_mean():
    assert offsets([[1.0, 2.0, 6.0], None, [5.0], [math.nan, 1.0]]) == [[-2, -1, 3]]


def test_means_know_no_order():
    scores = [random.Random(0).gauss(0, 1) * 10**k for k in range(-9, 9) for _ in range(20)]
    shuffled = random.Random(1).sample(scores, len(scores))
    assert sum(shuffled) != sum(scores)
    assert mean(shuffled) == mean(scores) == pytest.approx(sum(scores) / len(scores))
    assert finite([1.0, None, math.inf, math.nan]) == [1.0]
