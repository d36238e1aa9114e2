"""Pair accuracy in closed cases."""

import math

import pytest
import torch

from segalign.errors import DataError
from segalign.metrics.pair_accuracy import PairAccuracy
from segalign.metrics.pair_buckets import BUCKETS

FIRST, SECOND, TIE = [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]


def add(metric, scores, probs, valid=None, buckets=None, segments=None):
    count = len(scores)
    valid = [True] * count if valid is None else valid
    scores = torch.tensor(scores)
    metric.update(
        scores if scores.ndim == 3 else scores.unsqueeze(-1),
        torch.tensor(probs),
        torch.tensor(valid),
        [("all",)] * count if buckets is None else buckets,
        [torch.zeros(0, 2)] * count if segments is None else segments,
    )


def accuracy(found, bucket="all", way=0):
    return found["accuracy"][way, BUCKETS.index(bucket)].item()


def test_the_preferred_image_must_score_higher():
    metric = PairAccuracy(1)
    add(
        metric,
        [[2.0, 1], [2, 1], [1, 2], [1, 2], [3, 1]],
        [FIRST, SECOND, SECOND, FIRST, [0.6, 0.4]],
    )
    assert accuracy(metric.compute()) == 3 / 5


def test_a_tie_of_the_model_is_half():
    metric = PairAccuracy(1)
    add(metric, [[1.0, 1], [2, 1], [1, 1]], [FIRST, FIRST, SECOND])
    assert accuracy(metric.compute()) == 2 / 3


def test_pairs_without_preference_are_left_out():
    metric = PairAccuracy(1)
    add(metric, [[2.0, 1], [1, 2], [math.nan, 2]], [FIRST, TIE, TIE], valid=[True, True, False])
    found = metric.compute()
    assert (accuracy(found), int(found["num_pairs"][0]), int(found["num_left_out"])) == (1, 1, 1)


def test_padded_pairs_do_not_count():
    metric = PairAccuracy(1)
    add(metric, [[2.0, 1], [1, 2]], [FIRST, FIRST], valid=[True, False])
    add(metric, [[math.nan, 1]], [FIRST], valid=[False])
    assert accuracy(metric.compute()) == 1


def test_ways_and_buckets_are_counted_apart():
    metric = PairAccuracy(2)
    scores = [[[2.0, 1], [1, 1]], [[2, 1], [1, 2]], [[0, 1], [1, 0]]]
    buckets = [("all", "past_77"), ("all", "within_77"), ("all", "past_77")]
    add(metric, scores, [FIRST, FIRST, FIRST], buckets=buckets)
    found = metric.compute()
    assert [accuracy(found, bucket) for bucket in ("all", "within_77", "past_77")] == [
        2 / 3,
        1,
        0.5,
    ]
    assert [accuracy(found, bucket, 1) for bucket in ("all", "past_77")] == pytest.approx(
        [0.5, 0.75]
    )
    assert found["num_pairs"][BUCKETS.index("past_77")] == 2
    assert math.isnan(accuracy(found, "across_77"))


def test_segments_score_alone():
    metric = PairAccuracy(1)
    right, wrong, tie = [1.0, 0], [0.0, 1], [1.0, 1]
    segments = [
        torch.tensor([right, wrong, tie, right, right, wrong, tie, wrong, wrong]),
        torch.tensor([right, right]),
        torch.tensor([wrong] * 4),
    ]
    add(metric, [[2.0, 1]] * 3, [FIRST, SECOND, TIE], segments=segments)
    found = metric.compute()
    # 1: right, then wrong; 2-3: wrong, tie, wrong; 4-7: two right, wrong, tie; 8+: two wrong.
    assert found["segment_accuracy"].tolist() == pytest.approx([0.5, 0.5 / 3, 2.5 / 4, 0])
    assert found["num_segments"].tolist() == [2, 3, 4, 2]


def test_all_ties_are_refused():
    metric = PairAccuracy(1)
    add(metric, [[2.0, 1]] * 3, [TIE] * 3)
    with pytest.raises(DataError, match="got none, and 3 ties") as caught:
        metric.compute()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["whole", "segment"])
def test_scores_must_be_finite(where):
    bad, good = torch.tensor([[math.nan, 1]]), torch.tensor([[0.0, 1]])
    whole, segment = (bad, good) if where == "whole" else (good, bad)
    with pytest.raises(DataError, match="finite scores"):
        add(PairAccuracy(1), whole.tolist(), [FIRST], segments=[segment])
