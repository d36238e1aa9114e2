"""Means, Student's intervals and paired differences, against tables and closed forms."""

import math
import random

import pytest

from segalign.launch.findings.intervals import mean_interval, paired_difference, t_quantile

# Two-sided 95 %, as statistical tables print them.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 29: 2.045,
         30: 2.042, 60: 2.000, 120: 1.980, 1_000_000: 1.960}  # fmt: skip


@pytest.mark.parametrize("degrees", TABLE)
def test_quantiles_are_those_of_the_tables(degrees):
    assert t_quantile(degrees) == pytest.approx(TABLE[degrees], abs=5e-4)


@pytest.mark.parametrize(
    ("degrees", "exact"), [(1, math.tan(0.475 * math.pi)), (2, 0.95 * math.sqrt(2 / (1 - 0.95**2)))]
)
def test_quantiles_are_exact_where_they_have_a_closed_form(degrees, exact):
    assert t_quantile(degrees) == pytest.approx(exact, rel=1e-12)


def test_the_interval_of_three_values():
    found = mean_interval([1.0, 2.0, 3.0])
    half = 4.302652729749464 / math.sqrt(3)  # the deviation is 1
    assert (found.mean, found.num) == (2.0, 3)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), rel=1e-12)
    assert found.half == pytest.approx(half)


def test_a_single_value_has_no_interval():
    found = mean_interval([0.3])
    assert (found.mean, found.num) == (0.3, 1)
    assert not found.is_known
    assert not found.excludes_zero


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_has_no_interval(bad):
    found = mean_interval([1.0, bad, 2.0])
    assert not math.isfinite(found.mean)
    assert not found.is_known


def test_no_value_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_a_difference_is_free_of_what_seeds_share():
    base = {0: 1.0, 1: 5.0, 2: 9.0}
    changes = {0: 1.0, 1: 1.1, 2: 0.9}
    values = {seed: value + changes[seed] for seed, value in base.items()}
    found = paired_difference(values, base)
    assert found is not None
    assert found.mean == pytest.approx(1.0)
    assert found.half == pytest.approx(4.302652729749464 * 0.1 / math.sqrt(3))
    assert found.excludes_zero
    assert not mean_interval(list(values.values())).excludes_zero


def test_a_difference_is_over_common_finite_seeds_alone():
    found = paired_difference({0: 1.0, 1: math.nan, 2: 3.0, 4: 8.0}, {0: 0.5, 1: 1.0, 2: 1.0, 3: 9})
    assert found is not None
    assert (found.mean, found.num) == (1.25, 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_the_same_values_do_not_differ():
    found = paired_difference({0: 0.1, 1: 0.7}, {0: 0.1, 1: 0.7})
    assert found is not None
    assert (found.low, found.high) == (0.0, 0.0)
    assert not found.excludes_zero


def test_intervals_cover_as_often_as_they_say():
    draws = random.Random(0)
    samples = [[draws.gauss(1.0, 2.0) for _ in range(3)] for _ in range(4000)]
    intervals = [mean_interval(sample) for sample in samples]
    covered = sum(one.low < 1.0 < one.high for one in intervals) / len(intervals)
    assert covered == pytest.approx(0.95, abs=0.012)  # 3.5 deviations of the share
