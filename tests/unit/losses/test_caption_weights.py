"""Pairs weigh one over the number of their caption's pairs."""

import math

import pytest
import torch

from segalign.errors import DataError
from segalign.losses.caption_weights import pair_weights


def weigh(captions, num_pairs=None, valid=None):
    valid = torch.ones(len(captions)) > 0 if valid is None else torch.tensor(valid)
    return pair_weights(captions, num_pairs or [None] * len(captions), valid)


@pytest.mark.parametrize("captions", [["a", "a", "a", "b"], ["a", "b", "c"], ["a", "a"]], ids=str)
def test_every_caption_weighs_alike(captions):
    weights = weigh(captions)
    sums = [sum(w for w, c in zip(weights.tolist(), captions, strict=True) if c == one)
            for one in set(captions)]  # fmt: skip
    assert max(sums) == pytest.approx(min(sums))
    assert weights.mean().item() == pytest.approx(1)


def test_numbers_of_the_data_come_before_those_of_the_batch():
    # One over 1, 4 and, in this batch, 2; their mean is 4.5 / 8.
    weights = weigh(["a", "b", "c", "c"], [1, 4, None, None])
    torch.testing.assert_close(weights, torch.tensor([16 / 9, 4 / 9, 8 / 9, 8 / 9]))


def test_invalid_pairs_neither_count_nor_scale():
    weights = weigh(["a", "a", "b", ""], valid=[True, False, True, False])
    assert weights[[0, 2]].tolist() == [1, 1]
    assert torch.isfinite(weights).all()
    assert torch.isfinite(weigh(["", ""], valid=[False, False])).all()


@pytest.mark.parametrize("count", [0, -2, 0.5, "3", math.nan, math.inf, [1]], ids=repr)
def test_a_number_of_pairs_is_at_least_one(count):
    message = r"^expected `num_pairs` .* at least 1; got .*; correct .*`weigh_captions: false`$"
    with pytest.raises(DataError, match=message):
        weigh(["a", "b"], [1, count])
