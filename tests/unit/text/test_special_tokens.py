import pytest
import torch

from segalign.errors import ConfigError
from segalign.text.special_tokens import (
    SpecialTokenPolicy,
    count_kept,
    kept_positions,
    padding_vector,
)

IDS = (8, 5, 0, 6, 9)  # start, three words, end


@pytest.mark.parametrize(
    ("settings", "is_first", "expected"),
    [
        ({}, True, [0, 1, 2, 3]),
        ({}, False, [0, 1, 2, 3]),
        ({"start": "first"}, True, [0, 1, 2, 3]),
        ({"start": "first"}, False, [1, 2, 3]),
        ({"end": "keep"}, False, [0, 1, 2, 3, 4]),
        ({"drop_pad_words": True}, False, [0, 1, 3]),
        ({"start": "first", "end": "keep", "drop_pad_words": True}, False, [1, 3, 4]),
    ],
)
def test_kept_positions(settings, is_first, expected):
    policy = SpecialTokenPolicy(**settings)
    assert kept_positions(IDS, policy, 0, is_first=is_first).tolist() == expected
    assert count_kept(IDS[1:-1], policy, 0, is_first=is_first) == len(expected)


def test_start_and_end_stay_if_they_equal_the_padding():
    policy = SpecialTokenPolicy(end="keep", drop_pad_words=True)
    assert kept_positions((9, 9), policy, 9, is_first=True).tolist() == [0, 1]


def test_pad_star_averages_the_last_positions():
    states = torch.arange(77.0).unsqueeze(1)
    assert padding_vector(states, SpecialTokenPolicy()).item() == (17 + 76) / 2
    assert padding_vector(states, SpecialTokenPolicy(num_pad_positions=2)).item() == 75.5


def test_eos_padding_is_the_empty_prompts_end_token():
    states = torch.arange(77.0).unsqueeze(1)
    assert padding_vector(states, SpecialTokenPolicy(pad="eos")).item() == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "all"}, "`policy.start` must be one of `keep`, `first`; got 'all'"),
        ({"end": "no"}, "`policy.end` must be one of `drop`, `keep`; got 'no'"),
        ({"pad": "zero"}, "`policy.pad` must be one of `pad_star`, `eos`; got 'zero'"),
        ({"num_pad_positions": 0}, "must be at least 1; got 0"),
    ],
)
def test_refuses_unknown_choices(settings, message):
    with pytest.raises(ConfigError, match=message):
        SpecialTokenPolicy(**settings)
